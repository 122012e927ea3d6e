// Draws one dashboard with Grafana's own panels from what Prometheus answered, without a Grafana.
import { createRoot } from 'react-dom/client';
import {
  createTheme, dateTime, FieldType, getDisplayProcessor, ThemeContext,
} from '@grafana/data';
import {
  BigValue, BigValueColorMode, BigValueGraphMode, BigValueJustifyMode, BigValueTextMode, GlobalStyles, PanelChrome,
  TimeSeries,
} from '@grafana/ui';

const WIDTH = 1600, GAP = 8, ROW = 30;
const CELL = (WIDTH - GAP) / 24;
const theme = createTheme({ colors: { mode: 'dark' } });

const plain = (expression, rate) =>
  expression.replaceAll('$__rate_interval', rate).replace(/\$(namespace|model|replica|adapter)\b/g, '.*');

const named = (format, labels, title) =>
  format ? format.replace(/\{\{(\w+)\}\}/g, (_, label) => labels[label] ?? '') : Object.values(labels).join(' ') || title;

// Grafana's fields of every series of a panel, with a hole wherever Prometheus had nothing.
function frames(panel, { shown, rate, start, end, step }) {
  let index = 0;
  return panel.targets.flatMap((target) => (shown[plain(target.expr, rate)] ?? []).map((series) => {
    const name = named(target.legendFormat, series.metric, panel.title);
    const { defaults } = panel.fieldConfig;
    const config = { color: { mode: 'palette-classic' }, ...defaults, displayName: name,
      custom: { drawStyle: 'line', lineWidth: 1, fillOpacity: 0, showPoints: 'never', spanNulls: false,
        axisPlacement: 'auto', scaleDistribution: { type: 'linear' }, ...defaults.custom } };
    const known = new Map(series.values.map((it) => [Math.round((it[0] - start) / step), Number(it[1])]));
    const places = [...Array(Math.round((end - start) / step) + 1).keys()];
    const value = { name: 'Value', type: FieldType.number, labels: series.metric, config,
      values: places.map((it) => (Number.isFinite(known.get(it)) ? known.get(it) : null)),
      state: { displayName: name, seriesIndex: index++ } };
    value.display = getDisplayProcessor({ field: value, theme });
    const time = { name: 'Time', type: FieldType.time, config: {}, values: places.map((it) => (start + it * step) * 1000) };
    time.display = getDisplayProcessor({ field: time, theme, timeZone: 'utc' });
    return { fields: [time, value], length: places.length, meta: { type: 'timeseries-multi' } };
  }));
}

// When each mark begins: Prometheus shows a change for as long as its window.
function marks(board, { shown, rate, step }) {
  return board.annotations.list.flatMap((mark) => (shown[plain(mark.expr, rate)] ?? []).flatMap((series) =>
    series.values.filter((it, at, all) => at === 0 || it[0] - all[at - 1][0] > 1.5 * step)
      .map((it) => ({ time: it[0] * 1000, color: theme.visualization.getColorByName(mark.iconColor) }))));
}

const marked = new WeakSet();
// A dashed line through the panel and a triangle below it, as Grafana draws a mark.
function drawMarks(builder, all) {
  if (marked.has(builder)) return;
  marked.add(builder);
  builder.addHook('draw', (plot) => {
    const { ctx, bbox } = plot;
    for (const { time, color } of all) {
      const x = plot.valToPos(time, 'x', true), bottom = bbox.top + bbox.height;
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.save();
      ctx.strokeStyle = ctx.fillStyle = color;
      ctx.setLineDash([5, 5]);
      ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bottom); ctx.stroke();
      ctx.beginPath(); ctx.moveTo(x - 5, bottom + 6); ctx.lineTo(x + 5, bottom + 6); ctx.lineTo(x, bottom); ctx.fill();
      ctx.restore();
    }
  });
}

function Lines({ panel, data, range, width, height, marked: all }) {
  return data.length === 0 ? <NoData /> : (
    <TimeSeries frames={data} structureRev={1} timeRange={range} timeZone="utc" width={width} height={height}
      legend={{ calcs: [], displayMode: 'list', placement: 'bottom', showLegend: true }} options={panel.options ?? {}}>
      {(builder) => { drawMarks(builder, all); return null; }}
    </TimeSeries>
  );
}

function Figure({ data, width, height }) {
  const last = data[0]?.fields[1].values.findLast((it) => it !== null);
  if (last === undefined) return <NoData />;
  const field = data[0].fields[1];
  field.config.color = { mode: 'thresholds' };
  const numbers = field.values.filter((it) => it !== null);
  const [min, max] = [Math.min(...numbers), Math.max(...numbers)];
  field.state.range = { min, max, delta: max - min };
  const display = getDisplayProcessor({ field, theme });
  return <BigValue value={display(last)} width={width} height={height} theme={theme} colorMode={BigValueColorMode.Value}
    graphMode={BigValueGraphMode.Area} justifyMode={BigValueJustifyMode.Auto} textMode={BigValueTextMode.Value}
    sparkline={{ y: field, x: data[0].fields[0] }} />;
}

// The labels of each series that is there at the end, a row each, with the widths, the order and the pages that the
// panel asks for. Grafana's own table wants more of Grafana than this.
const ROW_OF_TABLE = 31;
function Rows({ panel, shown, rate, end, width, height }) {
  const { excludeByName: hidden, indexByName: order } = panel.transformations[0].options;
  const series = panel.targets.flatMap((it) => shown[plain(it.expr, rate)] ?? [])
    .filter((it) => it.values.at(-1)[0] > end - 30);
  const labels = [...new Set(series.flatMap((it) => Object.keys(it.metric)))].filter((it) => !hidden[it])
    .sort((one, other) => (order[one] ?? 99) - (order[other] ?? 99));
  const widthOf = (label) => panel.fieldConfig.overrides.find((it) => it.matcher.options === label)
    ?.properties.find((it) => it.id === 'custom.width')?.value;
  const cell = { textAlign: 'left', padding: '6px 10px', borderBottom: `1px solid ${theme.colors.border.weak}`,
    overflow: 'hidden', textOverflow: 'ellipsis', whiteSpace: 'nowrap' };
  const page = Math.floor(height / ROW_OF_TABLE) - 2;
  return (
    <>
      <table style={{ width, fontSize: 13, tableLayout: 'fixed' }}>
        <thead><tr>{labels.map((it) => (
          <th key={it} style={{ ...cell, width: widthOf(it), color: theme.colors.text.link }}>{it}</th>
        ))}</tr></thead>
        <tbody>
          {series.slice(0, page).map((it, row) => (
            <tr key={row}>{labels.map((label) => <td key={label} style={cell}>{it.metric[label]}</td>)}</tr>
          ))}
        </tbody>
      </table>
      <div style={{ fontSize: 12, padding: 8, textAlign: 'right', color: theme.colors.text.secondary }}>
        1 - {Math.min(page, series.length)} of {series.length} rows
      </div>
    </>
  );
}

const NoData = () => <div style={{ textAlign: 'center', paddingTop: 40, opacity: 0.5 }}>No data</div>;

function Panel({ panel, ...rest }) {
  const { x, y, w, h } = panel.gridPos;
  const place = { position: 'absolute', left: GAP + x * CELL, top: rest.top + y * (ROW + GAP) };
  const width = w * CELL - GAP, height = h * (ROW + GAP) - GAP;
  if (panel.type === 'row') {
    return <div style={{ ...place, width, height: ROW, fontSize: 16, fontWeight: 500, lineHeight: '30px' }}>⌄ {panel.title}</div>;
  }
  const kinds = { timeseries: Lines, stat: Figure, table: Rows };
  const Kind = kinds[panel.type];
  return (
    <div style={place}>
      <PanelChrome title={panel.title} description={panel.description} width={width} height={height}>
        {(inside, high) => <Kind panel={panel} width={inside} height={high} data={frames(panel, rest)} {...rest} />}
      </PanelChrome>
    </div>
  );
}

function Board({ board, shown, rate, start, end, step }) {
  const range = { from: dateTime(start * 1000), to: dateTime(end * 1000), raw: { from: 'now-1h', to: 'now' } };
  const top = 56, all = marks(board, { shown, rate, step });
  const bottom = Math.max(...board.panels.map((it) => it.gridPos.y + it.gridPos.h)) * (ROW + GAP) + top + GAP;
  return (
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <div id="board" style={{ position: 'relative', width: WIDTH + GAP, height: bottom, background: theme.colors.background.canvas }}>
        <div style={{ padding: '14px 12px', fontSize: 18, fontWeight: 500 }}>{board.title}</div>
        {board.panels.map((panel, index) => (
          <Panel key={index} {...{ panel, shown, rate, range, start, end, step, top, marked: all }} />
        ))}
      </div>
    </ThemeContext.Provider>
  );
}

createRoot(document.getElementById('root')).render(<Board {...window.graft} />);

"""What the dashboards are made of: variables, rows, and panels of one look. A panel is its title and its queries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models

TAG = "graft"
WIDTH = 24  # of a dashboard, in Grafana's columns
_SOURCE = models.DataSourceRef(type_val="prometheus", uid="$datasource")

# What a query selects by. Every variable may be "all", which also matches series without the label.
OF_NODE = 'namespace=~"$namespace",replica=~"$replica"'
OF_MODEL = f'{OF_NODE},model_name=~"$model"'
OF_ADAPTER = f'{OF_MODEL},adapter=~"$adapter"'
# Of what may have no namespace or base model at all: alerts, and NVIDIA's exporter, which gives the pod's a prefix.
OF_ALERT = 'namespace=~"$namespace|",model_name=~"$model|"'
OF_GPU = 'exported_namespace=~"$namespace|"'
RATE = "$__rate_interval"

TOKENS, TOKENS_A_SECOND = "suffix: tokens", "suffix: tok/s"  # units of our own, as Grafana writes them

Query = tuple[str, str]  # expression, legend
Parts = tuple[Any, ...]  # rows and panels, in their order


def board(uid: str, title: str, description: str) -> dashboard.Dashboard:
    """An empty dashboard with the variables and the links that all of them have."""
    built = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("30s")
        .link(
            dashboard.DashboardLink("Graft")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .annotation(_Changes("Published", "blue", 'verb=~"publish|promote",outcome="done"'))
        .annotation(_Changes("Rolled back", "orange", 'verb="rollback",outcome="done"'))
    )
    for name, label, query in (
        ("namespace", "Namespace", "label_values(graft_replica_up, namespace)"),
        ("model", "Base model", 'label_values(graft_engine_up{namespace=~"$namespace"}, model_name)'),
        ("replica", "Replica", 'label_values(graft_replica_up{namespace=~"$namespace"}, replica)'),
        ("adapter", "Adapter", f"label_values(graft_requests_total{{{OF_MODEL}}}, adapter)"),
    ):
        built = built.with_variable(_variable(name, label, query))
    return built


class _Changes(dashboard.AnnotationQuery):
    """Marks in every panel the minutes in which the catalogue was changed."""

    def __init__(self, name: str, color: str, changes: str) -> None:
        super().__init__()
        expression = (
            f"sum by (namespace, model_name, verb) (increase(graft_changes_total{{{OF_MODEL},{changes}}}[1m])) > 0"
        )
        self._internal = _ChangesModel(name, _SOURCE, icon_color=color, expr=expression)


class _ChangesModel(models.AnnotationQuery):
    """With what Grafana's data source for Prometheus reads, and its SDK does not know."""

    def to_json(self) -> dict[str, object]:
        # A step as long as the window: each change falls into one.
        return super().to_json() | {
            "step": "60s",
            "titleFormat": "{{verb}}",
            "textFormat": "{{model_name}} {{namespace}}",
        }


def filled(empty: dashboard.Dashboard, parts: Iterable[Any]) -> dashboard.Dashboard:
    """With rows and panels, in this order."""
    for part in parts:
        empty = empty.with_row(part) if isinstance(part, dashboard.Row) else empty.with_panel(part)
    return empty


def row(title: str) -> dashboard.Row:
    return dashboard.Row(title)


def lines(
    title: str,
    queries: Sequence[Query],
    unit: str,
    description: str,
    *,
    width: int = 8,
    stacked: bool = False,
    highest: float | None = None,
) -> timeseries.Panel:
    """Values over time; `description` is what the panel says of itself behind its ⓘ."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(_SOURCE)
        .unit(unit)
        .min(0)
        .height(7)
        .span(width)
        .line_width(1.5)
        .fill_opacity(30 if stacked else 8)
        .show_points(common_models.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(common_models.TooltipDisplayMode.MULTI)
            .sort(common_models.SortOrder.DESCENDING)
        )
    )
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL).group("A"))
    if highest is not None:
        panel = panel.max(highest)
    elif unit == "percentunit":
        panel = panel.axis_soft_max(0.1)  # a share of nothing is a flat line, not one of a million percent
    for number, (expression, legend) in enumerate(queries):
        panel = panel.with_target(_query(expression, legend, number))
    return panel


def number(
    title: str,
    expression: str,
    unit: str,
    description: str,
    *,
    warns: float | None = None,
    alarms: float | None = None,
    falling: bool = False,
    width: int = 3,
) -> stat.Panel:
    """One figure; yellow from `warns` on and red from `alarms` on, below them if `falling`."""
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(_SOURCE)
        .unit(unit)
        .height(4)
        .span(width)
        .graph_mode(common_models.BigValueGraphMode.AREA)
        .color_mode(common_models.BigValueColorMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(
            dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(_steps(warns, alarms, falling))
        )
        .with_target(_query(expression, "", 0))
    )


def rows_of(
    title: str, expression: str, description: str, columns: Mapping[str, int], *, width: int = 12
) -> table.Panel:
    """The labels of each series as a row of a table, the `columns` with their widths in pixels, 0: what is left. More
    rows than fit are on further pages; what is too long for its cell is cut off, and shown whole by a click."""
    order: dict[str, Any] = {
        "excludeByName": dict.fromkeys(("Time", "Value", "__name__"), True),
        "indexByName": {name: number for number, name in enumerate(columns)},
    }
    panel = (
        table.Panel()
        .title(title)
        .description(description)
        .datasource(_SOURCE)
        .height(8)
        .span(width)
        .cell_height(common_models.TableCellHeight.SM)
        .footer(common.TableFooterOptions().enable_pagination(True))
        .with_target(_query(expression, "", 0).instant().format(_table_format()))
        .with_transformation(models.DataTransformerConfig(id_val="organize", options=order))
    )
    for name, pixels in columns.items():
        values = [models.DynamicConfigValue(id_val="custom.inspect", value=True)]
        if pixels:
            values.append(models.DynamicConfigValue(id_val="custom.width", value=pixels))
        panel = panel.override_by_name(name, values)
    return panel


def quantile(q: float, histogram: str, selector: str, by: str = "") -> str:
    """A quantile of a histogram over the rate interval, of all series together or by a label."""
    labels = f"le,{by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) (rate({histogram}_bucket{{{selector}}}[{RATE}])))"


def rate(counter: str, selector: str, by: str = "") -> str:
    return f"sum by ({by}) (rate({counter}{{{selector}}}[{RATE}]))"


def busiest(expression: str, legend: str = "{{adapter}}") -> Query:
    """Of an expression by adapter: more than ten lines can't be told apart, and there may be a hundred."""
    return f"topk(10, {expression})", legend


def share(part: str, whole: str) -> str:
    """0 where there is nothing of the whole."""
    return f"({part}) / ({whole} > 0)"


def failed_share(by: str = "", window: str = RATE) -> str:
    """Failed requests of all, by a label or of all together; 0 where all is well."""
    all_of = f"sum by ({by}) (rate(graft_requests_total{{{OF_ADAPTER}}}[{window}]))"
    failed = f"sum by ({by}) (rate(graft_failed_requests_total{{{OF_ADAPTER}}}[{window}]))"
    return share(f"{failed} or 0 * {all_of}", all_of)


def _query(expression: str, legend: str, number: int) -> prometheus.Dataquery:
    query = prometheus.Dataquery().expr(expression).ref_id(chr(ord("A") + number)).datasource(_SOURCE)
    return query.legend_format(legend) if legend else query


def _table_format() -> Any:
    from grafana_foundation_sdk.models.prometheus import PromQueryFormat

    return PromQueryFormat.TABLE


def _variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(_SOURCE)
        .query(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(text="All", value="$__all", selected=True))
    )


def _steps(warns: float | None, alarms: float | None, falling: bool) -> list[models.Threshold]:
    if falling:
        steps = [(None, "red"), (alarms, "yellow"), (warns, "green")]
    else:
        steps = [(None, "green"), (warns, "yellow"), (alarms, "red")]
    return [models.Threshold(value=value, color=color) for index, (value, color) in enumerate(steps)
            if index == 0 or value is not None]  # fmt: skip

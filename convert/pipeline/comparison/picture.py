"""The pictures of a comparison, as SVG to embed in a page. Text has the colour of the page's text, light or dark."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from convert.inputs.architecture import LINEARS, name_in_layer
from convert.pipeline.comparison.rows import Row

if TYPE_CHECKING:
    from convert.quality import ModelRetention

# Two colours that differ for every kind of colour vision, on white and on black. The markers differ in shape, too.
PASSED = "#2a78d6"
FAILED = "#eb6834"
_BETWEEN = "#b3b1aa"
# A placeholder: in the finished SVG it is replaced by the page's own text colour.
_INK = "#010203"

_LEAST_KL = 1e-7
_SLOWEST, _FASTEST = 60.0, 420.0  # marker areas in points²
_PLAIN = 130.0

_SETTINGS: dict[str, Any] = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "savefig.transparent": True,
    "svg.fonttype": "path",
    "svg.hashsalt": "graft",
    "text.color": _INK,
    "text.parse_math": False,  # a label may hold a $
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def trade_off(rows: Sequence[Row]) -> str:
    """Size against mean KL, one labelled point a row. The area of a point is its decode speed, where known."""
    return _svg(lambda figure: _draw_trade_off(figure, rows), 8.6, 4.6, "trade-off")


def layers(rows: Sequence[tuple[str, ModelRetention]]) -> str:
    """Retention of every module by layer, a strip for each row."""
    height = 0.75 + 1.15 * len(rows)
    return _svg(lambda figure: _draw_layers(figure, rows), 8.6, height, "layers")


def _svg(draw: Callable[[Any], None], width: float, height: float, key: str) -> str:
    """The drawing as SVG, the same text each time. `key` is put before every id, so that ids don't collide."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stream = io.StringIO()
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height), dpi=72)
        FigureCanvasAgg(figure)  # measures text, in the points that SVG counts in
        draw(figure)
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    for mark in (' id="', 'href="#', "url(#"):
        text = text.replace(mark, f"{mark}{key}-")
    return text


def _draw_trade_off(figure: Any, rows: Sequence[Row]) -> None:
    axes = figure.add_subplot()
    floor = _floor(rows)
    unit, name = (1e9, "GB") if max(row.size_bytes for row in rows) >= 1e9 else (1e6, "MB")
    places = [(row.size_bytes / unit, max(row.quality.kl_mean, floor)) for row in rows]
    axes.set_yscale("log")
    axes.set_ylim(floor / 2.2, max(kl for _, kl in places) * 6)
    largest = max(size for size, _ in places)
    axes.set_xlim(0, largest * 1.22)
    axes.grid(visible=True, color=_INK, alpha=0.12, linewidth=0.8)
    axes.set_axisbelow(True)
    for row, (size, kl) in zip(rows, places, strict=True):
        colour, marker = (PASSED, "o") if row.passes else (FAILED, "X")
        area = _area(row, rows)
        axes.scatter(size, kl, s=area, color=colour, marker=marker, alpha=0.9, linewidths=0, zorder=3)
        if row.chosen:
            axes.scatter(size, kl, s=area + 190, facecolors="none", edgecolors=_INK, linewidths=1.5, zorder=3)
    axes.set_xlabel(f"size on disk, {name}")
    axes.set_ylabel("mean KL to the function as trained\nnats per token, log scale")
    _name_zero(axes, rows, floor)
    figure.canvas.draw()
    _label(figure, axes, [row.label for row in rows], places, [row.chosen for row in rows])


def _floor(rows: Sequence[Row]) -> float:
    """The height at which a KL of zero is drawn: a decade below the smallest KL above zero."""
    positive = [row.quality.kl_mean for row in rows if row.quality.kl_mean > _LEAST_KL]
    exponent = math.floor(math.log10(min(positive))) - 1 if positive else -7
    return max(_LEAST_KL, float(10.0**exponent))


def _name_zero(axes: Any, rows: Sequence[Row], floor: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    holds_zero = any(row.quality.kl_mean <= floor for row in rows)
    axes.yaxis.set_major_locator(LogLocator(base=10, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: "0" if holds_zero and value <= floor * 1.01 else f"{value:g}")
    )


def _area(row: Row, rows: Sequence[Row]) -> float:
    speeds = [measured.decode_tokens_per_s for measured in rows if measured.decode_tokens_per_s]
    if not speeds:
        return _PLAIN
    return _SLOWEST + (_FASTEST - _SLOWEST) * (row.decode_tokens_per_s or 0.0) / max(speeds)


def _label(
    figure: Any, axes: Any, labels: Sequence[str], places: Sequence[tuple[float, float]], bold: Sequence[bool]
) -> None:
    """Draw each label beside its point, at the first of `_SPOTS` where it covers no point and no other label."""
    renderer = figure.canvas.get_renderer()
    taken = []
    for place in places:
        x, y = axes.transData.transform(place)
        taken.append((x - 13, y - 13, x + 13, y + 13))
    frame = axes.get_window_extent(renderer).padded(-2)
    for label, place, strong in zip(labels, places, bold, strict=True):
        text = axes.annotate(
            label,
            place,
            (0, 0),
            textcoords="offset points",
            fontsize=9.5,
            fontweight="bold" if strong else "normal",
            zorder=4,
        )
        for offset, across, upright in _SPOTS:
            text.xyann = offset
            text.set_ha(across)
            text.set_va(upright)
            box = text.get_window_extent(renderer).extents
            inside = frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1
            if inside and not any(_overlap(box, taken_box) for taken_box in taken):
                break
        taken.append(tuple(box))


# Right, left, above, below and diagonally; then the same further away.
_SPOTS: tuple[tuple[tuple[float, float], str, str], ...] = tuple(
    spot
    for far in (0.0, 12.0, 24.0)
    for spot in (
        ((14.0, far), "left", "center"),
        ((-14.0, far), "right", "center"),
        ((0.0, 13.0 + far), "center", "bottom"),
        ((0.0, -13.0 - far), "center", "top"),
        ((14.0, -far), "left", "center"),
        ((-14.0, -far), "right", "center"),
    )
)


def _overlap(box: Sequence[float], taken_box: Sequence[float]) -> bool:
    """Whether two boxes (left, bottom, right, top) share an area."""
    left, bottom, right, top = taken_box
    return box[0] < right and left < box[2] and box[1] < top and bottom < box[3]


def _draw_layers(figure: Any, rows: Sequence[tuple[str, ModelRetention]]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list("kept", [FAILED, _BETWEEN, PASSED])
    strips = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    kinds = _kinds(retained for _, retained in rows)
    names = [kind.rpartition(".")[2].removesuffix("_proj") for kind in kinds]
    mesh = None
    for axes, (label, retained) in zip(strips, rows, strict=True):
        grid = _grid(retained, kinds)
        edges = [layer - 0.5 for layer in range(len(grid[0]) + 1)]
        # The edges hide the hairlines that viewers draw between cells.
        mesh = axes.pcolormesh(
            edges, range(len(names) + 1), grid, cmap=scale, vmin=0, vmax=1, edgecolors="face", linewidth=0.5
        )
        axes.invert_yaxis()
        axes.set_yticks([place + 0.5 for place in range(len(names))], names, fontsize=6.5)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        summary = retained.summary
        axes.set_title(f"{label}: mean {summary.mean:.3f}, least {summary.least:.3f}", loc="left", fontsize=9.5)
    strips[-1].set_xlabel("layer")
    bar = figure.colorbar(
        mesh, ax=list(strips), shrink=min(1.0, 2.0 / len(rows)), aspect=14, pad=0.01, ticks=[0, 0.5, 1]
    )
    bar.set_label("share of the delta kept", fontsize=8)
    bar.outline.set_visible(False)


def _kinds(all_retained: Iterable[ModelRetention]) -> list[str]:
    """The names of the linear layers with a delta, in the order of a layer; all names where only the head has one."""
    places = [name_in_layer(tensor.module) for retained in all_retained for tensor in retained.tensors]
    with_delta = {place[1] for place in places if place}
    return [name for name in LINEARS if name in with_delta or not with_delta]


def _grid(retained: ModelRetention, kinds: Sequence[str]) -> list[list[float]]:
    """Retention by kind of module and layer; NaN, which stays blank, where there is no delta."""
    places = {name_in_layer(tensor.module): tensor.retention for tensor in retained.tensors}
    count = max((place[0] for place in places if place), default=0) + 1
    return [[places.get((layer, kind), math.nan) for layer in range(count)] for kind in kinds]

"""The pictures of a comparison, as PNG bytes: utility over epsilon, and samples side by side. No pyplot, no display."""

import math
import statistics
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import matplotlib.image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, ScalarFormatter
from PIL import Image  # matplotlib brings it

from lightning_dp.benchmark.rows import Result, Row

# By Okabe and Ito: told apart also without colour vision.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "-.", ":")
_SHEET_COLUMNS = 4


def utility_plot(rows: Sequence[Row], metric: str) -> bytes | None:
    """Return the plot of a metric over the target epsilon, bars for the spread over seeds.

    PROVED rows are lines, with one mark per mechanism; runs without privacy are dashed lines, as a reference. Rows of
    other levels have no epsilon and are left out.

    Args:
        rows: Rows of one data set, relation, delta and metric protocol.
        metric: Its name.

    Returns: PNG bytes; None where no PROVED row has the metric.
    """
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.target_epsilon is not None and row.values(metric):
            lines.setdefault(row.label, []).append(row)
    if not lines:
        return None
    methods = list(dict.fromkeys(row.first.card.title for row in rows))
    mechanisms = list(dict.fromkeys(row.first.mechanism for row in rows))
    labels = [*lines, *(row.label for row in rows if row.first.card.claim["level"] == "NONPRIVATE")]
    figure, axes = _axes(metric, width=6.4 if len(lines) < 8 else 7.6)
    for label, points in lines.items():
        points = sorted(points, key=lambda row: row.target_epsilon or 0.0)
        _draw_line(axes, label, points, metric, _look(points[0], labels, methods, mechanisms))
    for row in rows:
        if row.first.card.claim["level"] == "NONPRIVATE" and row.values(metric):
            colour = _look(row, labels, methods, mechanisms)["color"]
            level = statistics.fmean(row.values(metric))
            axes.axhline(level, color=colour, linestyle="--", linewidth=1.0, label=_literal(f"{row.label}: no privacy"))
    _label_epsilons(
        axes, sorted({row.target_epsilon for group in lines.values() for row in group if row.target_epsilon})
    )
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _png(figure)


def _look(row: Row, labels: list[str], methods: list[str], mechanisms: list[str]) -> dict[str, Any]:
    """Return colour, mark and line: a colour for each line while they suffice, else one for each method.

    Where there are more methods than colours, the second seven have open marks and dash-dotted lines, and so on.
    """
    is_few = len(labels) <= len(_COLOURS)
    number = labels.index(row.label) if is_few else methods.index(row.first.card.title)
    mark = mechanisms.index(row.first.mechanism)
    colour, turn = _COLOURS[number % len(_COLOURS)], number // len(_COLOURS)
    return {
        "color": colour,
        "marker": _MARKS[mark % len(_MARKS)],
        "linestyle": _LINES[turn % len(_LINES)],
        "markerfacecolor": "white" if turn % 2 else colour,
    }


def _draw_line(axes: Axes, label: str, points: Sequence[Row], metric: str, look: dict[str, Any]) -> None:
    values = [point.values(metric) for point in points]
    axes.errorbar(
        [point.target_epsilon or math.nan for point in points],
        [statistics.fmean(found) for found in values],
        yerr=[statistics.stdev(found) if len(found) > 1 else 0.0 for found in values],
        label=_literal(label),
        linewidth=1.6,
        markersize=5,
        capsize=3,
        **look,
    )


def _label_epsilons(axes: Axes, epsilons: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(epsilons)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.15)


def sample_sheet(results: Sequence[Result]) -> bytes | None:
    """Return the sample grids of some runs side by side.

    Args:
        results: The runs; those without a grid are left out.

    Returns: PNG bytes; None where no run has a grid.
    """
    shown = [result for result in results if _has_grid(result)]
    if not shown:
        return None
    columns = min(_SHEET_COLUMNS, len(shown))
    num_rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(2.9 * columns, 3.35 * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(num_rows, columns, squeeze=False).flatten()
    for panel in panels:
        panel.set_axis_off()
    for panel, result in zip(panels, shown, strict=False):
        panel.imshow(matplotlib.image.imread(str(result.run_dir / str(result.card.sample_grid))))
        panel.set_title(_literal(_sheet_title(result)), fontsize=8)
    return _png(figure, dpi=80, colours=64)  # sheets are published: megabytes otherwise


def _has_grid(result: Result) -> bool:
    return result.card.sample_grid is not None and (result.run_dir / result.card.sample_grid).is_file()


def _sheet_title(result: Result) -> str:
    row = Row((result,))
    privacy = str(result.card.claim["level"]) if row.target_epsilon is None else f"epsilon {row.target_epsilon:g}"
    return f"{result.card.title}\n{result.mechanism}\n{privacy}"  # side by side, a longer line would meet the next


def _axes(metric: str, *, width: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel("target epsilon")
    axes.set_ylabel(_literal(metric))
    axes.grid(color="#e3e7ec", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _literal(text: str) -> str:
    """Return text that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")


def _png(figure: Figure, *, dpi: int = 120, colours: int | None = None) -> bytes:
    """Return the figure; with a palette of so many colours, if a number is given."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": ""})
    if colours is None:
        return buffer.getvalue()
    small = BytesIO()
    Image.open(buffer).convert("RGB").quantize(colours).save(small, format="png", optimize=True)
    return small.getvalue()

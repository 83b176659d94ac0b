"""The plots of a run card, as PNG bytes. Drawn on figures of their own: no pyplot, no global backend, no display."""

from collections.abc import Mapping, Sequence
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLOURS = ("#1f5fa8", "#c2571a", "#2b8a5e", "#7b4fa3", "#8c6d1f")  # told apart also without colour vision
_MARKS = ("o", "s", "^", "D", "v")
Curve = Sequence[Sequence[float]]


def epsilon_plot(curve: Curve, *, target: float | None = None) -> bytes:
    """Return the plot of epsilon over the number of releases.

    Args:
        curve: (releases, epsilon) pairs.
        target: The budget, drawn as a line, or None.

    Returns: PNG bytes.
    """
    figure, axes = _figure("Privacy spent", "epsilon")
    axes.plot(*_columns(curve), color=_COLOURS[0], linewidth=2, marker="o" if len(curve) < 2 else None)
    if isinstance(target, int | float):
        axes.axhline(target, color="#b3261e", linestyle="--", linewidth=1.2)
        label = axes.annotate(f"budget {target:g}", (0, target), (4, -4), ("axes fraction", "data"), "offset points")
        label.set(va="top", color="#b3261e")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.15)
    return _png(figure)


def metric_plots(curves: Mapping[str, Curve]) -> list[tuple[str, bytes]]:
    """Return one plot per family of metrics, the part of the name before the first slash.

    Args:
        curves: (releases, value) pairs per metric name. Empty curves are left out.

    Returns: (family, PNG bytes) pairs in the order of the families' first metrics.
    """
    families: dict[str, dict[str, Curve]] = {}
    for name, curve in curves.items():
        if len(curve):
            family, _, member = name.partition("/")
            families.setdefault(family, {})[member or family] = curve
    return [(family, _family_plot(family, members)) for family, members in families.items()]


def _family_plot(family: str, members: Mapping[str, Curve]) -> bytes:
    figure, axes = _figure(family, family)
    for index, (name, curve) in enumerate(members.items()):
        colour, mark = _COLOURS[index % len(_COLOURS)], _MARKS[index % len(_MARKS)]
        axes.plot(*_columns(curve), label=_literal(name), linewidth=1.8, markersize=4, color=colour, marker=mark)
    if len(members) > 1:
        axes.legend(frameon=False)
    return _png(figure)


def _columns(curve: Curve) -> tuple[list[float], list[float]]:
    return [float(x) for x, _ in curve], [float(y) for _, y in curve]


def _figure(title: str, unit: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 3.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(_literal(title), loc="left", fontsize=11)
    axes.set_xlabel("releases")
    axes.set_ylabel(_literal(unit))
    axes.grid(color="#e3e7ec", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _literal(text: str) -> str:
    """Return text that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": ""})
    return buffer.getvalue()

"""The plot of a run card, as PNG bytes. Drawn on a figure of its own: no pyplot, no global backend, no display."""

from collections.abc import Sequence
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Curve = Sequence[Sequence[float]]


def epsilon_plot(curve: Curve, *, target: float | None = None) -> bytes:
    """Return the plot of epsilon over the number of releases.

    Args:
        curve: (releases, epsilon) pairs.
        target: The budget, drawn as a line, or None.

    Returns: PNG bytes.
    """
    figure, axes = _figure("Privacy spent", "epsilon")
    releases, spent = ([float(pair[place]) for pair in curve] for place in (0, 1))
    axes.plot(releases, spent, color="#1f5fa8", linewidth=2, marker="o" if len(curve) < 2 else None)
    if isinstance(target, int | float):
        axes.axhline(target, color="#b3261e", linestyle="--", linewidth=1.2)
        label = axes.annotate(f"budget {target:g}", (0, target), (4, -4), ("axes fraction", "data"), "offset points")
        label.set(va="top", color="#b3261e")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.15)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": ""})
    return buffer.getvalue()


def _figure(title: str, unit: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 3.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("releases")
    axes.set_ylabel(unit)
    axes.grid(color="#e3e7ec", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes

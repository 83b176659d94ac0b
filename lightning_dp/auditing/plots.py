"""The plots of audits, as PNG bytes. Drawn on figures of their own: no pyplot, no global backend, no display."""

from io import BytesIO

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_dp.auditing.result import AuditResult

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # by Okabe and Ito
_SMALLEST = 1e-4
_BINS = 50


def audit_plot(result: AuditResult) -> bytes | None:
    """Return the plot of an audit.

    Args:
        result: The audit.

    Returns: PNG bytes; None where it has nothing to draw.
    """
    plot = result.plot
    if plot is None:
        return None
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(result.audit, loc="left", fontsize=11)
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    axes.grid(color="#e3e7ec", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    values = [value for found in plot.histograms.values() for value in found]
    edges = np.linspace(min(values), max(values), _BINS).tolist() if values and max(values) > min(values) else None
    for number, (label, found) in enumerate(plot.histograms.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        bins = edges if edges is not None else _BINS
        axes.hist(found, bins=bins, density=True, histtype="step", label=label, color=colour, linewidth=1.6)
    for number, line in enumerate(plot.lines):
        colour = "#b3261e" if line.is_dashed else _COLOURS[number % len(_COLOURS)]
        x, y = np.asarray(line.x), np.asarray(line.y)
        if plot.log_x:
            x = np.maximum(x, _SMALLEST)
        if plot.log_y:
            y = np.maximum(y, _SMALLEST)
        mark = "o" if len(x) < 2 else None
        axes.plot(
            x, y, label=line.label, color=colour, linestyle="--" if line.is_dashed else "-", linewidth=1.6, marker=mark
        )
    if plot.log_x:
        axes.set_xscale("log")
    if plot.log_y:
        axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": ""})
    return buffer.getvalue()

"""What an audit answers: a lower bound with its confidence beside the claim, a verdict, what it can and cannot find."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

ALARM_CONFIDENCE = 0.99999
"""A violation is said at this confidence only: right mechanisms raise an alarm once in a hundred thousand audits."""


class Verdict(StrEnum):
    """What an audit says of a claim."""

    CONSISTENT = "consistent"
    INCONCLUSIVE = "inconclusive"
    VIOLATED = "violated"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve of a plot.

    Attributes:
        label: What it is.
        x: Horizontal values.
        y: Vertical values.
        is_dashed: Drawn as a reference.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    is_dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Plot:
    """What to draw of an audit; numbers only.

    Attributes:
        x_label: Horizontal axis.
        y_label: Vertical axis.
        lines: Curves.
        histograms: Values by label.
        log_x: Logarithmic horizontal axis.
        log_y: Logarithmic vertical axis.
    """

    x_label: str
    y_label: str
    lines: tuple[Line, ...] = ()
    histograms: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """The answer of one audit.

    Attributes:
        audit: Its name.
        subject: What was audited.
        lower_bound: Empirical lower bound on epsilon at `delta`; None where the audit gives no number.
        confidence: With which `lower_bound` holds; 1 where nothing in it is random.
        claimed_epsilon: Epsilon of what was audited, by the accountant; None where the audit needs none.
        delta: Delta of both.
        verdict: What follows.
        summary: What was measured, in one line.
        finds: What the audit can find.
        misses: What it cannot.
        measured: Numbers behind the verdict, by name.
        plot: What to draw, or None.
    """

    audit: str
    subject: str
    lower_bound: float | None
    confidence: float
    claimed_epsilon: float | None
    delta: float
    verdict: Verdict
    summary: str
    finds: str
    misses: str
    measured: Mapping[str, float] = field(default_factory=dict)
    plot: Plot | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the plot, JSON-ready; infinities are words."""
        return {
            "audit": self.audit,
            "subject": self.subject,
            "verdict": str(self.verdict),
            "lower_bound": _plain(self.lower_bound),
            "confidence": self.confidence,
            "claimed_epsilon": _plain(self.claimed_epsilon),
            "delta": self.delta,
            "summary": self.summary,
            "measured": {name: _plain(value) for name, value in self.measured.items()},
            "finds": self.finds,
            "misses": self.misses,
        }


def worst_verdict(results: Sequence[AuditResult]) -> Verdict:
    """Return the gravest verdict; consistent if there is none."""
    order = list(Verdict)
    return max((result.verdict for result in results), key=order.index, default=Verdict.CONSISTENT)


def judge(*, is_alarm: bool, is_doubt: bool) -> Verdict:
    """Return the verdict of an audit from what holds at the alarm's confidence and at its own.

    Args:
        is_alarm: The claim is refuted at `ALARM_CONFIDENCE`.
        is_doubt: It is refuted at the (lower) confidence of the audit.
    """
    if is_alarm:
        return Verdict.VIOLATED
    return Verdict.INCONCLUSIVE if is_doubt else Verdict.CONSISTENT


def _plain(value: float | None) -> float | str | None:
    if value is None or math.isfinite(value):
        return None if value is None else float(value)
    return "not a number" if math.isnan(value) else "infinity" if value > 0 else "-infinity"

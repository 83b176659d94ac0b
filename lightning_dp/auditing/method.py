"""Audit of a whole method: train it twice on neighbouring records under equal coins, noise and transcript.

In the second world every release hands out what the first world released, that of a warm start included, so all that
was learned from releases is the same at every step. What may differ then is what the record itself sends, by the
charged sensitivity at most, at every step: a record that reaches another teacher through shared state shows here. And
whatever leaves (the released networks, the numbers that are logged) must be the same to the last bit.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from callbacks import GradientPrivatizer
from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.composition import Counts
from lightning_dp.accounting.events import AdditiveRelease, GaussianRelease, TernaryRelease
from lightning_dp.auditing.bounds import epsilon_of_mu, std_interval
from lightning_dp.auditing.door import NoiseLawOf
from lightning_dp.auditing.result import ALARM_CONFIDENCE, AuditResult, Line, Plot, judge
from lightning_dp.auditing.transcripts import MethodRun, Overheard, Transcript, play
from lightning_dp.auditing.worlds import record_changes, unchanged
from lightning_dp.wording import counted

__all__ = ["MethodRun", "audit_method"]

FINDS = (
    "a record that reaches more rows than stated (shared optimizer state, duplicates, batch statistics), a bound that "
    "is not kept at some step, anything that leaves past the door: networks, logged numbers, releases that no ledger "
    "holds"
)
MISSES = "records and steps that were not tried; what only a run of full length brings about; secrecy of the coins"

_TOLERANCE = 1e-6
_TINY = 1e-9
_UNFORMED = ("record", "statistic")  # kinds of rows whose sum is made without them where norms decide


@dataclass
class _Part:
    """What neighbours did to the releases of one mechanism.

    Attributes:
        name: Before its words; empty for the method's own releases.
        heard: The first world.
        shifts: How far each release moved, by the change.
        most_rows: Rows of one release that changed, at most.
    """

    name: str
    heard: Overheard
    shifts: dict[str, list[float]] = field(default_factory=dict)
    most_rows: int = 0

    def compare(self, other: Overheard, change: str) -> None:
        """Take in one neighbouring world."""
        self.shifts[change] = self.heard.shifts(other)
        self.most_rows = max(self.most_rows, self.heard.changed_rows(other))

    @property
    def worst(self) -> str:
        """The change that moved a release furthest."""
        return max(self.shifts, key=lambda name: max(self.shifts[name]))

    @property
    def largest(self) -> float:
        """How far it moved one."""
        return max(self.shifts[self.worst])

    @property
    def limit(self) -> float:
        """How far it may."""
        return self.heard.mechanism.l2_sensitivity(self.heard.plan.spec, self.heard.plan.relation)

    def mu(self, change: str) -> float:
        """Return how far a change moved all releases together, in units of their noise."""
        std = self.heard.mechanism.noise_std(self.heard.plan)
        return math.hypot(*self.shifts[change]) / std if std > 0 else math.inf

    @property
    def is_gaussian(self) -> bool:
        """Whether `mu` says what the releases cost."""
        event = self.heard.event
        is_plain = isinstance(event, GaussianRelease) and not isinstance(event, TernaryRelease)
        return is_plain and self.heard.sampling.scheme == "full"

    def problems(self) -> list[str]:
        """Return, in words, what is not as it was stated."""
        found, plan = [], self.heard.plan
        if self.largest > self.limit * (1 + _TOLERANCE) + _TINY:
            found.append(f"moved by {self.largest:.6g}, beyond {self.limit:.6g}")
        allowed = max(change.num_replaced + change.num_toggled for change in plan.spec.alternatives(plan.relation))
        if self.most_rows > allowed:
            found.append(f"{self.most_rows} rows changed, {allowed} may")
        if isinstance(self.heard.event, AdditiveRelease):
            (low, high), stated = _noise_interval(self.heard), NoiseLawOf(self.heard.mechanism, plan).std
            if not low <= stated <= high:
                found.append(f"noise std in [{low:.4g}, {high:.4g}], {stated:.4g} is stated")
        return [f"{self.name}{words}" for words in found]

    def summary(self) -> str:
        """Return what was measured, in words."""
        num = len(self.heard.measured)
        moved = f"moved a release by {self.largest:.6g} at most, {self.limit:.6g} is charged"
        return f"{self.name}{self.worst}: {moved}, over {counted(num, 'release')}"


def audit_method(
    make_run: Callable[[], MethodRun],
    *,
    steps: int = 3,
    record: int | None = None,
    privatizer: type[GradientPrivatizer] = GradientPrivatizer,
) -> AuditResult:
    """Compare runs of a method on neighbouring records.

    Args:
        make_run: Makes module, data and mechanism of a run, equal at every call.
        steps: Releases of a run, beside that of a warm start.
        record: Which record changes; None takes the last.
        privatizer: Class of the callback that opens the door.

    Raises:
        ConfigurationError: The relation cannot be played out on this method's records.
    """
    first = make_run()
    last = first.data.num_records - 1 if record is None else record
    present = tuple({0, last})  # the first and the last may leave
    base = play(first, steps, unchanged(last), None, privatizer, present=present)
    parts = [_Part("" if heard is base.own else "warm start, ", heard) for heard in base.parts]
    made = sum(len(heard.measured) for heard in base.parts)
    leaks = [f"{base.ledger_length} releases in the ledger, {made} made"] * (base.ledger_length != made)
    changes = record_changes(base.own.plan, last)
    for change in changes:
        other = play(make_run(), steps, change, base, privatizer, present=present)
        leaks += base.differences(other)
        for part, heard in zip(parts, other.parts, strict=True):
            part.compare(heard, change.name)
    if any(heard.plan.spec.kind in _UNFORMED for heard in base.parts):  # once more with rows in sight
        base_rows = play(make_run(), steps, unchanged(last), base, privatizer, present=present, with_rows=True)
        for change in changes:
            other = play(make_run(), steps, change, base, privatizer, present=present, with_rows=True)
            for part, one, two in zip(parts, base_rows.parts, other.parts, strict=True):
                part.most_rows = max(part.most_rows, one.changed_rows(two))
    return _judge(first, base, parts, leaks)


def _judge(run: MethodRun, base: Transcript, parts: "Sequence[_Part]", leaks: list[str]) -> AuditResult:
    """Return what follows from the shifts, from what differs in what leaves, and from the noise."""
    settings, own = run.privacy, parts[-1]
    counts: Counts = {(part.heard.event, part.heard.sampling): len(part.heard.measured) for part in parts}
    problems = [words for part in parts for words in part.problems()]
    if leaks:
        problems.append("differs in what leaves: " + ", ".join(dict.fromkeys(leaks)))
    mu = max(math.hypot(*(part.mu(change) for part in parts)) for change in own.shifts)
    measured = {
        "largest_shift": own.largest,
        "sensitivity": own.limit,
        "ratio": own.largest / own.limit,
        "changed_rows": float(max(part.most_rows for part in parts)),
        "leaks": float(len(leaks)),
    }
    if len(parts) > 1:
        measured["warm_start_ratio"] = parts[0].largest / parts[0].limit
    return AuditResult(
        audit="method",
        subject=(
            f"{type(run.module).__name__} with {type(run.mechanism).__name__}"
            f"{' after a warm start' * (len(parts) > 1)}, {settings.neighboring_relation}"
        ),
        lower_bound=epsilon_of_mu(mu, settings.target_delta) if all(part.is_gaussian for part in parts) else None,
        confidence=1.0,
        claimed_epsilon=compute_epsilon(counts, delta=settings.target_delta, relation=own.heard.plan.relation).epsilon,
        delta=settings.target_delta,
        # A record that never took part shows nothing.
        verdict=judge(is_alarm=bool(problems), is_doubt=any(part.most_rows == 0 for part in parts)),
        summary="; ".join([*(part.summary() for part in parts), *problems]),
        finds=FINDS,
        misses=MISSES,
        measured=measured,
        plot=_plot(parts),
    )


def _plot(parts: "Sequence[_Part]") -> Plot:
    """Return every release's shift as a share of what is charged."""
    lines, start, last = [], 1.0, 1.0
    for part in parts:
        for name, found in part.shifts.items():
            releases = tuple(start + step for step in range(len(found)))
            last = releases[-1]
            lines.append(Line(label=part.name + name, x=releases, y=tuple(one / part.limit for one in found)))
        start = last + 1
    return Plot(
        x_label="release",
        y_label="shift / sensitivity",
        lines=(*lines, Line(label="charged", x=(1.0, last), y=(1.0, 1.0), is_dashed=True)),
    )


def _noise_interval(heard: Overheard) -> tuple[float, float]:
    """Return the interval of the std of the noise of a run, at the confidence of an alarm."""
    noise = torch.cat(
        [
            noisy - measured
            for noisy, measured in zip(heard.noisy, heard.measured, strict=True)
            if len(noisy) == len(measured)
        ]
    )
    energy = float(noise.square().sum())
    return std_interval(energy, len(noise), ALARM_CONFIDENCE) if len(noise) else (0.0, math.inf)

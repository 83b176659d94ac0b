"""Rows of a comparison: runs that differ in their seed alone, their mean and spread, and which may be called best."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_dp.benchmark.records import card_metrics, protocol_of
from lightning_dp.evaluation.card_text import is_proved, number_text
from lightning_dp.evaluation.report import RunCard

MIN_SEEDS = 3
RULE = (
    "Mean and standard deviation over seeds. A number is bold where its row is best: only among rows with a PROVED "
    "claim, equal target epsilon, delta, relation, data and metric protocol, if that row and every other one has at "
    f"least {MIN_SEEDS} seeds, its worst seed beats the best seed of every other row, and its mean leads by more than "
    "the sum of the two standard deviations. Otherwise no winner is marked."
)
"""When a winner is marked, in words."""

_LOWER_IS_BETTER = ("fid", "kid")
_ORDER = ("accuracy/test", "accuracy/cnn", "accuracy/mlp", "accuracy/logistic", "fid", "kid", "precision", "recall")


@dataclass(frozen=True)
class Result:
    """One run, as its card tells it.

    Attributes:
        card: The run card.
        run_dir: The run folder.
    """

    card: RunCard
    run_dir: Path

    @property
    def is_proved(self) -> bool:
        """Whether its epsilon may be shown and ranked."""
        return is_proved(self.card.claim)

    @property
    def mechanism(self) -> str:
        """Name of the mechanism."""
        return str(self.card.claim.get("mechanism") or self.card.mechanism.get("mechanism", "unknown"))

    @property
    def data(self) -> str:
        """Name of the data set."""
        return str(self.card.data.get("name", "unknown"))

    @property
    def seed(self) -> Any:
        """Public seed."""
        return self.card.config.get("seed_everything")

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Quality by name."""
        return card_metrics(self.card)

    @property
    def _asked(self) -> float | None:
        """What the noise was calibrated to; tells rows apart, and is shown for PROVED claims only."""
        if str(self.card.claim["level"]).upper() == "NONPRIVATE":
            return None
        found = self.card.config.get("privacy", {}).get("target_epsilon")
        return None if found is None else float(found)

    @property
    def row_key(self) -> tuple[Any, ...]:
        """What runs of one row have in common."""
        claim, data = self.card.claim, self.card.data
        return (
            *(self.data, str(data.get("fingerprint")), claim["relation"], float(claim["delta"])),
            *(protocol_of(self.card), self.card.title, self.mechanism, str(claim["level"]).upper(), self._asked),
        )


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone.

    Attributes:
        results: At least one; those of one `row_key`.
    """

    results: tuple[Result, ...]

    @property
    def first(self) -> Result:
        """Any of the runs, for what they have in common."""
        return self.results[0]

    @property
    def label(self) -> str:
        """Method and mechanism."""
        return f"{self.first.card.title}, {self.first.mechanism}"

    @property
    def is_proved(self) -> bool:
        """Whether the row's epsilon may be shown and ranked."""
        return self.first.is_proved

    @property
    def target_epsilon(self) -> float | None:
        """Epsilon that was asked; None unless the claim is PROVED."""
        return self.first._asked if self.is_proved else None

    @property
    def epsilon(self) -> float | None:
        """The largest epsilon that a run of the row has spent; None unless the claim is PROVED."""
        return max(result.card.claim["epsilon"] for result in self.results) if self.is_proved else None

    @property
    def protocol(self) -> str | None:
        """Hash of the metric protocol."""
        return protocol_of(self.first.card)

    @property
    def block_key(self) -> tuple[Any, ...]:
        """What rows that may be ranked against each other have in common."""
        *common, _, _, level, asked = self.first.row_key
        return (*common, level, asked)

    def values(self, metric: str) -> list[float]:
        """Return the metric of every run that has it and where it is a number."""
        found = (result.metrics.get(metric, math.nan) for result in self.results)
        return [value for value in found if math.isfinite(value)]

    def text(self, metric: str) -> str:
        """Return mean and spread, e.g. `0.912 ± 0.004`; a dash without a value."""
        values = self.values(metric)
        if not values:
            return "-"
        mean = statistics.fmean(values)
        digits = 3 if abs(mean) < 2 else 1
        if len(values) < 2:
            return f"{mean:.{digits}f}"
        return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"

    def cost(self, name: str) -> list[float]:
        """Return an entry of the cost of every run that states it."""
        found = (result.card.cost.get(name) for result in self.results)
        return [float(value) for value in found if isinstance(value, int | float)]


def rows_of(results: Iterable[Result]) -> list[Row]:
    """Return the rows of some runs, in the order in which they first appear."""
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(result.row_key, []).append(result)
    return [Row(tuple(group)) for group in groups.values()]


def blocks_of(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the rows in groups that may be ranked against each other, in the order in which they first appear."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.block_key, []).append(row)
    return list(groups.values())


def metrics_of(rows: Iterable[Row]) -> list[str]:
    """Return the metrics that any of the rows has, in the order of the tables."""
    found = {name for row in rows for result in row.results for name in result.metrics}
    return [*(name for name in _ORDER if name in found), *sorted(found - set(_ORDER))]


def best_row(rows: Sequence[Row], metric: str) -> Row | None:
    """Return the row that is best beyond the spread over seeds, by `RULE`; None where there is none.

    Args:
        rows: One block of `blocks_of`.
        metric: Its name; `fid` and `kid` are better when lower.
    """
    sign = -1.0 if metric in _LOWER_IS_BETTER else 1.0
    scores = [(row, [sign * value for value in row.values(metric)]) for row in rows]
    if len(rows) < 2 or not all(row.is_proved and len(values) >= MIN_SEEDS for row, values in scores):
        return None
    if len({row.block_key for row in rows}) > 1:
        return None
    best, ours = max(scores, key=lambda pair: statistics.fmean(pair[1]))
    for row, theirs in scores:
        lead = statistics.fmean(ours) - statistics.fmean(theirs)
        spread = statistics.stdev(ours) + statistics.stdev(theirs)
        if row is not best and not (min(ours) > max(theirs) and lead > spread):
            return None
    return best


def mean_text(values: Sequence[float]) -> str:
    """Return the mean as a number with four digits; a dash without a value."""
    return number_text(statistics.fmean(values)) if values else "-"

"""Audit F: statistics that a Poisson sampler passes and its imitations fail; each is close to standard normal."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lightning_dp.auditing.result import ALARM_CONFIDENCE, AuditResult, Line, Plot, judge

FINDS = (
    "batches of fixed size, shuffled passes, dropped last batches, caps, skipped empty batches, one mask on two ranks, "
    "coins that a resume replays"
)
MISSES = "noise; what a method does with the records that it drew; dependence of higher order than pairs"

_ALARM = 6.0  # of variables that are normal only nearly
_DOUBT = 4.0


class Sampler(Protocol):
    """Draws the records of one step after the other."""

    def draw(self) -> Tensor:
        """Return the records of the next step, distinct indices."""
        ...


def masks(sampler: Sampler, num_records: int, num_steps: int) -> Tensor:
    """Return inclusions of `num_steps` steps, (num_steps, num_records), float64 zeros and ones."""
    joins = torch.zeros(num_steps, num_records, dtype=torch.float64)
    for row in joins:
        row[sampler.draw()] = 1
    return joins


def rate_z(joins: Tensor, rate: float) -> float:
    """Return the z of the number of inclusions: catches dropped last batches and capped batches."""
    return (joins.sum().item() - joins.numel() * rate) / math.sqrt(joins.numel() * rate * (1 - rate))


def batch_variance_z(joins: Tensor, rate: float) -> float:
    """Return the z of the spread of batch sizes: catches fixed sizes, for which it is about -sqrt(steps / 2)."""
    steps, records = joins.shape
    variance = ((joins.sum(1) - records * rate) ** 2).mean().item()
    return (variance / (records * rate * (1 - rate)) - 1) * math.sqrt(steps / 2)


def record_variance_z(joins: Tensor, rate: float) -> float:
    """Return the z of the spread of how often records joined: catches passes, in which all join equally often."""
    return batch_variance_z(joins.T, rate)


def repeat_z(joins: Tensor, rate: float) -> float:
    """Return the z of records that join two steps in a row: catches shuffled passes, which exclude them."""
    return _overlap_z(joins[:-1], joins[1:], rate)


def cross_z(joins: Tensor, others: Tensor, rate: float) -> float:
    """Return the z of records that join the same step of two samplers: catches one stream used twice."""
    return _overlap_z(joins, others, rate)


def empty_z(joins: Tensor, rate: float) -> float:
    """Return the z of the number of empty batches: catches steps that were skipped because they were empty."""
    steps, records = joins.shape
    chance = (1 - rate) ** records
    if chance * steps < 5:  # too rare to be told by their number
        return 0.0
    return ((joins.sum(1) == 0).sum().item() - steps * chance) / math.sqrt(steps * chance * (1 - chance))


def _overlap_z(first: Tensor, second: Tensor, rate: float) -> float:
    both = (first - rate) * (second - rate)
    return both.sum().item() / (math.sqrt(both.numel()) * rate * (1 - rate))


def statistics(joins: Tensor, rate: float) -> dict[str, float]:
    """Return all statistics of one stream."""
    return {
        "rate": rate_z(joins, rate),
        "batch_variance": batch_variance_z(joins, rate),
        "record_variance": record_variance_z(joins, rate),
        "repeat": repeat_z(joins, rate),
    }


def audit_sampler(
    make_sampler: Callable[[], Sampler], *, num_records: int = 1000, rate: float = 0.05, steps: int = 400
) -> AuditResult:
    """Compare the coins of a sampler with fair ones, and with those of another start of it.

    Args:
        make_sampler: Makes the sampler as a start of a process does; called twice.
        num_records: Records that it draws from.
        rate: The rate that is charged.
        steps: Steps that are drawn.
    """
    joins = masks(make_sampler(), num_records, steps)
    again = masks(make_sampler(), num_records, steps)  # another rank, or the same one after a resume
    found = {
        **statistics(joins, rate),
        "empty": empty_z(joins, rate),
        "two starts": cross_z(joins, again, rate),
        "halves": cross_z(joins[: steps // 2], joins[steps // 2 : 2 * (steps // 2)], rate),
    }
    name, worst = max(found.items(), key=lambda item: abs(item[1]))
    sizes = joins.sum(1).tolist()
    grid = [float(size) for size in range(int(min(sizes)), int(max(sizes)) + 1)]
    return AuditResult(
        audit="sampler",
        subject=f"Poisson sampling of {num_records} records at rate {rate:g}, {steps} steps",
        lower_bound=None,
        confidence=ALARM_CONFIDENCE,
        claimed_epsilon=None,
        delta=0.0,
        verdict=judge(is_alarm=abs(worst) > _ALARM, is_doubt=abs(worst) > _DOUBT),
        summary=f"largest |z| {abs(worst):.2f} ({name}); alarm at {_ALARM:g}",
        finds=FINDS,
        misses=MISSES,
        measured={f"z {name}": value for name, value in found.items()},
        plot=Plot(
            x_label="batch size",
            y_label="density",
            histograms={"drawn": tuple(sizes)},
            lines=(Line(label="expected", x=tuple(grid), y=tuple(_normal(grid, num_records, rate)), is_dashed=True),),
        ),
    )


def _normal(grid: list[float], num_records: int, rate: float) -> list[float]:
    mean, variance = num_records * rate, num_records * rate * (1 - rate)
    return [
        math.exp(-((size - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance) if variance else 0.0
        for size in grid
    ]

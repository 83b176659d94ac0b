"""Choosing hyper-parameters on the private records, and its price: repeat a random number of times, keep the best.

Every repetition is one whole run under one plan, its settings drawn at random from a list; only the best leaves, and
neither the others nor their number. The number must be random: "we ran exactly ten" is composition, not this.
"""

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

from dp_accounting import NeighboringRelation

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.composition import Counts, canonical_terms, checked_delta, has_non_private
from lightning_dp.accounting.events import Sampling, SelectionRelease, parse_relation, relation_name
from lightning_dp.errors import ConfigurationError

Setting = TypeVar("Setting")
Result = TypeVar("Result")

_FULL = Sampling(scheme="full")
_MAX_REPEATS = 100_000


@dataclass(frozen=True, kw_only=True)
class RepeatLaw:
    """The law of the number of repetitions.

    Args:
        mean: Its mean, >= 1.
        shape: infinity (Poisson, which may be 0: then nothing is released), 1 (geometric), 0 (logarithmic), or any
            other number > 0 (truncated negative binomial). Smaller is cheaper and spreads further.

    Raises:
        ConfigurationError: Out of range.

    References:
        Papernot and Steinke (2022), "Hyperparameter Tuning with Renyi Differential Privacy", Theorems 2 and 6.
    """

    mean: float
    shape: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 1 <= self.mean <= _MAX_REPEATS / 100):
            raise ConfigurationError(f"Expected 1 <= mean <= {_MAX_REPEATS // 100} repetitions, got mean={self.mean}.")
        if not self.shape >= 0:
            raise ConfigurationError(f"Expected shape >= 0 of the law of repetitions, got shape={self.shape}.")

    def probability(self, count: int) -> float:
        """Return the probability of so many repetitions."""
        if math.isinf(self.shape):
            return math.exp(count * math.log(self.mean) - self.mean - math.lgamma(count + 1))
        if count < 1 or self.mean == 1:
            return float(count == 1)
        gamma = _gamma(self.mean, self.shape)
        log_tail = count * math.log1p(-gamma)
        if self.shape == 0:
            return math.exp(log_tail) / (count * math.log(1 / gamma))
        log_ways = math.lgamma(count + self.shape) - math.lgamma(count + 1) - math.lgamma(self.shape)
        return math.exp(log_ways + log_tail) / (gamma**-self.shape - 1.0)

    def draw(self) -> int:
        """Return a number of repetitions from the operating system's randomness; it must not be released."""
        left, count = secrets.randbits(53) / 2**53, 0
        while count < _MAX_REPEATS:
            left -= self.probability(count)
            if left < 0:
                return count
            count += 1
        return count


@lru_cache(maxsize=64)
def _gamma(mean: float, shape: float) -> float:
    """Return the parameter whose law has this mean; the mean falls as it grows."""
    low, high = 1e-12, 1.0 - 1e-12
    for _ in range(200):
        middle = math.sqrt(low * high)
        if _mean_of(middle, shape) > mean:
            low = middle
        else:
            high = middle
    return high


def _mean_of(gamma: float, shape: float) -> float:
    if shape == 0:
        return (1 / gamma - 1) / math.log(1 / gamma)
    return shape * (1 - gamma) / (gamma * -math.expm1(shape * math.log(gamma)))


def selection_event(
    plans: Sequence[Counts], law: RepeatLaw, *, relation: str | NeighboringRelation
) -> SelectionRelease:
    """Return the event of choosing the best of a random number of runs.

    Each run, with the score by which it is chosen, must release no more than its plan: a score on private records is a
    release of its own and belongs in the plan; one on public or held-out records is free. What the runs print, log or
    save must not leave.

    Args:
        plans: What a run of each setting releases at most.
        law: The law of the number of runs.
        relation: The relation of the events' sensitivities.

    Raises:
        ConfigurationError: A release without privacy, or no plan.
    """
    return SelectionRelease(
        plans=tuple(canonical_terms(plan) for plan in plans),
        mean=float(law.mean),
        shape=None if math.isinf(law.shape) else float(law.shape),
        relation=relation_name(parse_relation(relation)),
    )


def selection_epsilon(counts: Counts, law: RepeatLaw, *, delta: float, relation: str | NeighboringRelation) -> float:
    """Return what the best of a random number of runs of one plan costs.

    Guarantee: an upper bound on epsilon of releasing the best run alone, by Renyi divergence.

    Args:
        counts: What one run releases at most, whatever its settings, as for `selection_event`.
        law: The law of the number of runs.
        delta: Delta of the statement.
        relation: The relation of the events' sensitivities.

    Raises:
        ConfigurationError: An invalid delta or relation.
    """
    delta, terms = checked_delta(delta), canonical_terms(counts)
    if not terms or has_non_private(terms):
        return math.inf if terms else 0.0
    event = selection_event([counts], law, relation=relation)
    return compute_epsilon({(event, _FULL): 1}, delta=delta, relation=relation).epsilon


@dataclass(frozen=True)
class Selected(Generic[Setting, Result]):
    """The best run, all that may leave of a selection.

    Attributes:
        setting: Its settings.
        result: What it released.
        score: Its score.
    """

    setting: Setting
    result: Result
    score: float


def select_best(
    settings: Sequence[Setting], run: Callable[[Setting], tuple[Result, float]], law: RepeatLaw
) -> Selected[Setting, Result] | None:
    """Run with settings drawn at random, a random number of times, and return the best.

    Guarantee: `selection_epsilon` of what one call of `run` costs at most, if nothing but the return value leaves: keep
    the others' folders and logs private, or delete them, and do not tell how many there were or how long it took.

    Args:
        settings: What may be chosen; a setting may be drawn several times.
        run: Makes one run; returns what it released, and its score (higher is better, no NaN).
        law: The law of the number of runs.

    Returns:
        The best, ties broken at random by order; None if the number drawn was 0 (Poisson only).

    Raises:
        ConfigurationError: No settings, or a score that is no number.
    """
    if not settings:
        raise ConfigurationError("Expected at least one setting to choose from, got none.")
    best: Selected[Setting, Result] | None = None
    for _ in range(law.draw()):
        setting = secrets.choice(settings)
        result, score = run(setting)
        if math.isnan(score):
            raise ConfigurationError("Expected a score that is a number, got nan; give a failed run the lowest score.")
        if best is None or score > best.score:
            best = Selected(setting, result, score)
    return best

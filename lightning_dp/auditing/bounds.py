"""From error rates of an attacker to lower bounds on epsilon; every bound holds with a stated confidence.

Symbols: a and b are upper limits of an attacker's false positive and false negative rate. Differential privacy forces
1 - b <= e^epsilon a + delta(epsilon) for every epsilon and the same with a and b exchanged, so rates that are too small
refute a claim.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from dp_accounting import NeighboringRelation, get_epsilon_gaussian
from numpy.typing import NDArray
from scipy import stats

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.composition import Counts
from lightning_dp.accounting.events import ReleaseEvent, Sampling

PROFILE_DELTAS = (0.5, 0.2, 0.05, 1e-2, 1e-3, 1e-4)
"""Where a claim is tested beside its own delta: the whole curve was claimed, and most of it can be seen in few runs."""

FINE_DELTAS = (*(0.02 * step for step in range(1, 46)), 1e-3, 1e-4)
"""The same where nothing is sampled, and a point costs nothing."""

_CHOOSING = 0.999  # of the limits by which a threshold is chosen: a few lucky trials far out must not win
_FEW_SCORES = 20_000  # as many thresholds can be tried one by one
_LARGEST_MU = 1e3  # beyond it the closed form of the Gaussian leaves the floats
_SMALLEST_MU = 1e-6


@dataclass(frozen=True)
class Errors:
    """How often an attacker with a threshold fixed beforehand was wrong.

    Attributes:
        false_positives: Trials without the canary that looked like trials with it.
        num_without: Trials without it.
        false_negatives: Trials with the canary that looked like trials without it.
        num_with: Trials with it.
    """

    false_positives: int
    num_without: int
    false_negatives: int
    num_with: int

    def upper(self, confidence: float) -> tuple[float, float]:
        """Return upper limits (a, b) of both rates that hold together with this confidence (Clopper and Pearson)."""
        alpha = (1 - confidence) / 2
        return (
            clopper_pearson_upper(self.false_positives, self.num_without, alpha),
            clopper_pearson_upper(self.false_negatives, self.num_with, alpha),
        )

    def epsilon(self, *, delta: float, confidence: float) -> float:
        """Return a lower bound on epsilon at `delta`, of whatever mechanism."""
        return epsilon_of_rates(*self.upper(confidence), delta)

    def mu(self, *, confidence: float) -> float:
        """Return a lower bound on mu of a mechanism that is mu-GDP with the best mu."""
        a, b = self.upper(confidence)
        return max(0.0, float(stats.norm.isf(a) - stats.norm.ppf(b)))


def epsilon_of_rates(a: float, b: float, delta: float) -> float:
    """Return the epsilon that limits a and b of both error rates force on whatever mechanism, at delta."""
    ways = [((1 - b - delta), a), ((1 - a - delta), b)]
    return max(0.0, *(math.log(power / rate) for power, rate in ways if power > 0 and rate > 0))


def clopper_pearson_upper(count: float, num: int, alpha: float) -> float:
    """Return an upper limit of a rate, of which `count` of `num` trials were seen; wrong with chance alpha at most."""
    return 1.0 if count >= num else float(stats.beta.ppf(1 - alpha, count + 1, num - count))


def clopper_pearson_interval(count: int, num: int, confidence: float) -> tuple[float, float]:
    """Return the two-sided Clopper-Pearson interval of a rate."""
    alpha = (1 - confidence) / 2
    low = 0.0 if count == 0 else float(stats.beta.ppf(alpha, count, num - count + 1))
    return low, clopper_pearson_upper(count, num, alpha)


def middle_errors(without: NDArray[np.float64], with_it: NDArray[np.float64]) -> Errors:
    """Return the errors of the threshold in the middle, found on the first half of the trials, counted on the second.

    The best one for scores that are normal and differ in mean; nothing is chosen among many, hence nothing lost to it.

    Args:
        without: Scores of trials without the canary, independent.
        with_it: Scores of trials with it; larger ones.
    """
    half, half_with = len(without) // 2, len(with_it) // 2
    return _errors_at(float(np.median(without[:half]) + np.median(with_it[:half_with])) / 2, without, with_it)


def tail_errors(without: NDArray[np.float64], with_it: NDArray[np.float64], *, delta: float) -> Errors:
    """Return the errors of the threshold with the largest bound on epsilon, chosen on the first half of the trials.

    Args:
        without: Scores of trials without the canary, independent.
        with_it: Scores of trials with it; larger ones.
        delta: At which epsilon is bounded.
    """
    first, second = np.sort(without[: len(without) // 2]), np.sort(with_it[: len(with_it) // 2])
    candidates = _thresholds(np.unique(np.concatenate([first, second])))
    positives = len(first) - np.searchsorted(first, candidates, side="right")
    negatives = np.searchsorted(second, candidates, side="right")
    with np.errstate(invalid="ignore", divide="ignore"):
        a = stats.beta.ppf(_CHOOSING, positives + 1, np.maximum(len(first) - positives, 1e-9))
        b = stats.beta.ppf(_CHOOSING, negatives + 1, np.maximum(len(second) - negatives, 1e-9))
        gains = np.fmax(np.log((1 - b - delta) / a), np.log((1 - a - delta) / b))
    return _errors_at(float(candidates[int(np.nanargmax(gains))]), without, with_it)


def _thresholds(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return all of few sorted scores; of many, those at ranks that grow in steps of 2 % from either end."""
    if len(scores) <= _FEW_SCORES:
        return scores
    ranks = np.unique(np.geomspace(1, len(scores), 500).astype(np.int64))
    return scores[np.unique(np.concatenate([ranks - 1, len(scores) - ranks]))]


def _errors_at(threshold: float, without: NDArray[np.float64], with_it: NDArray[np.float64]) -> Errors:
    """Return the errors on the second half of the trials."""
    rest, rest_with = without[len(without) // 2 :], with_it[len(with_it) // 2 :]
    return Errors(int((rest > threshold).sum()), len(rest), int((rest_with <= threshold).sum()), len(rest_with))


def epsilon_of_mu(mu: float, delta: float) -> float:
    """Return epsilon of a mu-GDP mechanism at delta."""
    if mu < _SMALLEST_MU:
        return 0.0
    if mu > _LARGEST_MU:
        return math.inf
    with np.errstate(divide="ignore"):  # of a delta that underflows on the way
        return float(get_epsilon_gaussian(1 / mu, delta))


def privacy_profile(
    counts: Counts, *, relation: NeighboringRelation, deltas: Sequence[float] | None = None
) -> tuple[tuple[float, float], ...]:
    """Return points (epsilon, delta) of the curve that the accountant proves for some releases.

    Args:
        counts: The releases.
        relation: Of the claim.
        deltas: Where; None takes many points unless something is sampled.
    """
    if deltas is None:
        is_sampled = any(sampling.rate < 1 for _, sampling in counts)
        deltas = PROFILE_DELTAS if is_sampled else FINE_DELTAS
    return _profile(tuple(counts.items()), relation, tuple(deltas))


@lru_cache(maxsize=16)  # several audits of one mechanism ask for the same curve
def _profile(
    counts: tuple[tuple[tuple[ReleaseEvent, Sampling], int], ...],
    relation: NeighboringRelation,
    deltas: tuple[float, ...],
) -> tuple[tuple[float, float], ...]:
    return tuple((compute_epsilon(dict(counts), delta=delta, relation=relation).epsilon, delta) for delta in deltas)


def is_refuted(profile: Sequence[tuple[float, float]], errors: Errors, *, confidence: float) -> bool:
    """Tell whether error rates contradict a point of the claimed curve.

    Args:
        profile: Points (epsilon, delta) that were claimed together.
        errors: An attacker's errors.
        confidence: Of the limits of both rates; one event covers all points.
    """
    a, b = errors.upper(confidence)
    return any(
        1 - b - delta > math.exp(min(epsilon, 700.0)) * a or 1 - a - delta > math.exp(min(epsilon, 700.0)) * b
        for epsilon, delta in profile
    )


def one_run_epsilon(*, num_canaries: int, guesses: int, right: int, delta: float, confidence: float) -> float:
    """Return a lower bound on epsilon from guesses about many canaries of one run.

    Each canary was in or out by a fair coin; `guesses` of them were guessed, the number fixed beforehand.

    Args:
        num_canaries: m.
        guesses: r <= m.
        right: Correct ones.
        delta: Delta of the claim.
        confidence: Of the bound.

    References:
        Steinke, Nasr and Jagielski (2023) "Privacy auditing with one (1) training run", Theorem 5.2.
    """
    level = 1 - confidence

    def is_possible(epsilon: float) -> bool:
        rate = 1 / (1 + math.exp(-epsilon))
        tail = float(stats.binom.sf(right - 1, guesses, rate))
        counts = np.arange(1, right + 1)
        below = stats.binom.cdf(right - 1, guesses, rate) - stats.binom.cdf(right - counts - 1, guesses, rate)
        extra = float((2 * num_canaries / counts * below).max(initial=0.0))
        return tail + delta * extra >= level

    if right == 0 or is_possible(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while not is_possible(high) and high < 64:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if is_possible(middle) else (middle, high)
    return low


def std_interval(energy: float, degrees: int, confidence: float) -> tuple[float, float]:
    """Return the two-sided chi-square interval of a standard deviation.

    Args:
        energy: Sum of squared deviations from the means that were estimated.
        degrees: Numbers minus estimated means.
        confidence: Of the interval.
    """
    alpha = (1 - confidence) / 2
    low, high = stats.chi2.ppf([alpha, 1 - alpha], degrees)
    return math.sqrt(energy / high), math.sqrt(energy / low)

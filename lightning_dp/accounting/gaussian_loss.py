"""dp-accounting's privacy loss distribution of one Gaussian release, built from arrays.

The library calls the inverse of the loss once for each point of its grid, a few hundred thousand times where noise is
small: seconds before anything is composed. Here the same formulae take the grid as a whole; grid, hockey-stick
divergence and connect-the-dots masses stay the library's. A test compares the masses with the library's own, from which
they differ by less than its rounding.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.pld import pld_pmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from numpy.typing import NDArray

Array = NDArray[np.float64]

_CLOSE = 1e-9  # relative distance to a loss that is never exceeded, below which the library takes the two as equal


@lru_cache(maxsize=32)  # some megabytes each
def one_gaussian_release(
    noise_multiplier: float, rate: float, relation: NeighboringRelation, interval: float
) -> PrivacyLossDistribution:
    """Return the pessimistic distribution of one Gaussian release; the same for any number of releases.

    Args:
        noise_multiplier: Noise std over the norm bound of one record (half of the sensitivity under replace-one).
        rate: Probability that a record takes part, in (0, 1].
        relation: The neighbouring relation.
        interval: Distance of the losses that it is rounded to.
    """

    def masses(adjacency: AdjacencyType) -> pld_pmf.PLDPmf:
        loss = GaussianPrivacyLoss(noise_multiplier, sampling_prob=rate, adjacency_type=adjacency)
        bounds = loss.connect_dots_bounds()
        low, high = math.floor(bounds.epsilon_lower / interval), math.ceil(bounds.epsilon_upper / interval)
        deltas = _divergences(loss, noise_multiplier, np.arange(low, high + 1) * interval)
        return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, low, high, deltas)

    if relation is NeighboringRelation.REPLACE_ONE:
        return PrivacyLossDistribution(masses(AdjacencyType.REPLACE))
    removed = masses(AdjacencyType.REMOVE)
    return PrivacyLossDistribution(removed, masses(AdjacencyType.ADD) if rate < 1 else None)


def _divergences(loss: Any, std: float, epsilons: Array) -> Array:
    """Return the hockey-stick divergences at losses: upper mass beyond them less exp(epsilon) times the lower one."""
    deltas, rate = np.zeros_like(epsilons), loss.sampling_prob
    is_reached = np.ones(len(epsilons), dtype=bool)
    if rate < 1 and loss.adjacency_type is AdjacencyType.ADD:
        is_reached = epsilons < -math.log1p(-rate)  # no loss is larger
    elif rate < 1 and loss.adjacency_type is AdjacencyType.REMOVE:
        is_reached = epsilons > math.log1p(-rate)  # every loss is larger
        deltas[~is_reached] = -np.expm1(epsilons[~is_reached])
    reached = epsilons[is_reached]
    points = _points(loss, std, reached)
    deltas[is_reached] = loss.mu_upper_cdf(points) - np.exp(reached + loss.mu_lower_log_cdf(points))
    return np.clip(deltas, 0, 1)


def _points(loss: Any, std: float, losses: Array) -> Array:
    """Return where the loss, which falls, takes these values; the norm bound is 1."""
    rate, variance = loss.sampling_prob, std**2
    if loss.adjacency_type is AdjacencyType.REPLACE:
        return _points_of_replacement(rate, variance, losses)
    if rate == 1.0:
        points = -0.5 - losses * variance
        return points if loss.adjacency_type is AdjacencyType.REMOVE else 1 + points
    sign = 1.0 if loss.adjacency_type is AdjacencyType.REMOVE else -1.0
    # The loss without sampling is +-log(1 + (exp(+-loss) - 1) / rate).
    first, second = sign * losses + np.log(1 / rate), np.log(1 / rate - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        unsampled = sign * (first + np.log1p(-np.exp(second - first)))
    last = sign * math.log(1 - rate)
    is_last = np.abs(losses - last) <= _CLOSE * np.maximum(np.abs(losses), abs(last))
    unsampled = np.where(is_last, -sign * np.inf, unsampled)
    points = -0.5 - unsampled * variance
    return points if loss.adjacency_type is AdjacencyType.REMOVE else 1 + points


def _points_of_replacement(rate: float, variance: float, losses: Array) -> Array:
    """Return the same for one record that is replaced: its two values are a norm bound away from its absence."""
    if rate == 1.0:
        return -losses * variance / 2
    log_alpha = 0.5 / variance + math.log1p(-rate) - math.log(rate)
    halves = np.abs(losses) / 2
    with np.errstate(divide="ignore"):
        log_sinh = halves + np.log1p(-np.exp(-2 * halves)) - math.log(2)
    term = log_alpha + log_sinh
    # arcsinh(exp(term)), whatever the size of the term
    arcsinh = np.logaddexp(0.5 * np.logaddexp(0, 2 * term), term)
    return np.where(losses == 0, 0.0, variance * (-np.sign(losses) * arcsinh - losses / 2))

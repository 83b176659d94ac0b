"""Renyi divergence of thresholded noisy votes: what the ternary output really costs.

A coordinate with integer vote v leaves as one of three symbols: v + N(0, s^2) above +t, below -t, or between. Releasing
the symbol alone costs 0.64 to 0.81 of the Gaussian it came from, depending on t / s. dp-accounting has no such event,
hence this curve; composition over coordinates and releases is a plain sum, and dp-accounting converts to epsilon.

Legend: v vote, s noise_std, t threshold, a Renyi order, P and Q the outcome laws of two neighbouring votes.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

from lightning_dp.accounting.events import TernaryRelease

Array = NDArray[np.float64]

_LOG_ROOT_TWO_PI = 0.5 * np.log(2 * np.pi)


def ternary_rdp(event: TernaryRelease, orders: tuple[float, ...]) -> Array:
    """Return the Renyi divergence bound of one release at each order.

    The bound is the largest over the event's alternatives of (coordinates moved by 2) * D(2) + (coordinates moved by 1)
    * D(1), where D(step) is the worst divergence over every integer vote and both directions. It is never above the
    Gaussian's a * mu^2 / 2, by the data-processing inequality.

    Args:
        event: The release.
        orders: Renyi orders, each > 1.

    Returns:
        Divergences, shape (num_orders,), float64, in nats.
    """
    gaussian = np.asarray(orders) * (event.mu * event.mu / 2)
    alternatives = []
    for moved_by_two, moved_by_one in event.changes:
        total = np.zeros(len(orders))
        for coordinates, step in ((moved_by_two, 2), (moved_by_one, 1)):
            if coordinates:
                total += coordinates * worst_divergence(
                    event.noise_std, event.threshold, event.max_abs_vote, step, orders
                )
        alternatives.append(total)
    bound: Array = np.minimum(np.max(alternatives, axis=0), gaussian)
    return bound


@lru_cache(maxsize=256)
def worst_divergence(
    noise_std: float, threshold: float, max_abs_vote: int, step: int, orders: tuple[float, ...]
) -> Array:
    """Return the largest Renyi divergence between the symbols of votes v and v + step, over all integer v.

    Both directions are covered: swapping the signs maps the pair (v + step, v) onto (-v - step, -v), another pair of
    the same scan. Both votes of a pair lie in [-max_abs_vote, max_abs_vote].

    Args:
        noise_std: s, in votes, > 0.
        threshold: t, in votes, >= 0.
        max_abs_vote: Largest absolute vote, >= 1.
        step: How far a neighbour moves the vote, 1 or 2.
        orders: Renyi orders, each > 1.

    Returns:
        Divergences, shape (num_orders,), read-only.
    """
    votes = np.arange(-max_abs_vote, max_abs_vote - step + 1, dtype=np.float64)
    log_p = log_outcomes(votes, noise_std, threshold)
    log_q = log_outcomes(votes + step, noise_std, threshold)
    worst = np.array([renyi_divergence(log_p, log_q, order).max() for order in orders])
    worst.setflags(write=False)  # shared by the cache
    return worst


def log_outcomes(votes: Array, noise_std: float, threshold: float) -> Array:
    """Return the log probabilities of below, between and above.

    Args:
        votes: v, shape (n,).
        noise_std: s, in votes, > 0.
        threshold: t, in votes, >= 0.

    Returns:
        Shape (n, 3), float64; minus infinity for an impossible outcome (between, when the threshold is 0).
    """
    to_low, to_high = (-threshold - votes) / noise_std, (threshold - votes) / noise_std
    # The mass between is a difference of two tails; take the tails on the side where they are small.
    far = to_low > 0
    near, wide = np.where(far, -to_high, to_low), np.where(far, -to_low, to_high)
    log_wide, log_near = special.log_ndtr(wide), special.log_ndtr(near)
    width, middle = 2 * threshold / noise_std, -votes / noise_std
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = log_wide + np.log(-np.expm1(log_near - log_wide))
        # A narrow band is density times width, to order width^4; the difference of tails would round to nothing.
        narrow = np.log(width) - 0.5 * middle**2 - _LOG_ROOT_TWO_PI + np.log1p(width**2 * (middle**2 - 1) / 24)
    log_between = np.where(width * np.maximum(1.0, np.abs(middle)) < 1e-3, narrow, difference)
    return np.stack([special.log_ndtr(to_low), log_between, special.log_ndtr(-to_high)], axis=-1)


def renyi_divergence(log_p: Array, log_q: Array, order: float) -> Array:
    """Return the Renyi divergences D_a(P || Q) of discrete laws given by log probabilities.

    With x = log P / Q, the moment sum Q e^(a x) is 1 plus something tiny for near laws. Because sum Q e^x = 1, that
    something is sum Q (e^(a x) - 1 - a (e^x - 1)), summed without cancellation; far laws use log-sum-exp.

    Args:
        log_p: Shape (n, num_outcomes).
        log_q: Same shape; an outcome impossible under P is skipped, impossible under Q alone makes the result infinite.
        order: a > 1.

    Returns:
        Shape (n,), in nats, >= 0.
    """
    possible = np.isfinite(log_p)
    log_p = np.where(possible, log_p, 0.0)
    ratio = np.where(possible, log_p - log_q, 0.0)
    skipped_by_both = ~possible & np.isneginf(log_q)  # the band between, when the threshold is 0
    if np.abs(ratio).max() * order < 1.0 and (possible | skipped_by_both).all():
        excess = (np.exp(log_q) * (np.expm1(order * ratio) - order * np.expm1(ratio))).sum(axis=-1)
        moment = np.log1p(excess)
    else:
        exponent = np.where(possible, order * log_p - np.where(possible, (order - 1.0) * log_q, 0.0), -np.inf)
        peak = exponent.max(axis=-1, keepdims=True)
        peak = np.where(np.isfinite(peak), peak, 0.0)  # infinite: an outcome that Q lacks
        moment = (peak + np.log(np.exp(exponent - peak).sum(axis=-1, keepdims=True)))[:, 0]
    result: Array = np.maximum(moment, 0.0) / (order - 1.0)
    return result

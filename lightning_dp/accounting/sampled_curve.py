"""Renyi divergence of discrete Gaussian noise, and what Poisson sampling takes off it.

Let p0 be the law of the noise (independent on whole numbers, symmetric around 0) and p1 the law moved by the whole
vector v that a record adds, |v| <= D. With r = p1 / p0 and a sampling rate q, the pair of a sampled release under
add-or-remove-one or zero-out is p0 and P = (1 - q) p0 + q p1 = p0 (1 - q + q r).

* E_p0[r^k] = exp((k - 1) D_k(p1 || p0)) <= exp(k (k - 1) rho), rho = D^2 / 2 s^2 (Canonne, Kamath and Steinke 2020,
  Proposition 5, one factor for each coordinate). So for a whole order a, E_p0[(1 - q + q r)^a], expanded by the
  binomial theorem, is at most what it is for Gaussian noise, where the moments are equal to the bound.
* The other direction, E_p0[(1 - q + q r)^(1 - a)], is never larger. x -> v - x swaps p0 and p1 and turns r into 1 / r,
  so E_p0[f(r)] is the mean of (f(r) + r f(1/r)) / 2 over p0, and it is enough to compare, for A = 1 - q + q r and
  B = q + (1 - q) r, A^a + r^(1 - a) B^a with A^(1 - a) + r^a B^(1 - a), r >= 1. With C = r / B <= A (A B >= r) and
  h(x) = (x^a - x^(1 - a)) / (x - 1), their difference is (A - 1) (h(A) - h(C)), because B (C - 1) = A - 1. It is not
  negative: with x = exp(2 u), h = sinh((2 a - 1) u) / sinh(u), which grows with u > 0.
* (a - 1) D_a is convex in a (Hoelder) and 0 at a = 1, so between whole orders the chord is a bound.

Which other records are sampled only mixes such pairs, which the joint convexity of the moments covers.
"""

import math
from functools import lru_cache

import numpy as np
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from numpy.typing import NDArray
from scipy.special import logsumexp

from lightning_dp.accounting.events import DiscreteGaussianRelease
from lightning_dp.accounting.sampling import Sampling

Array = NDArray[np.float64]

_GRID_STEP = 0.02  # of the noise's std; the integrand is analytic and as wide as that std
_GRID_MARGIN = 40.0
_MAX_GRID_MU = 10.0  # less noise than this is charged as if nothing were sampled
_ROUNDING = 1e-9  # relative; and absolute in the log-moment: a sum of some thousand terms in double precision
_LOG_ROUNDING = 1e-12
_MAX_NOISE_MULTIPLIER = 1e50  # its square leaves the floats; less noise is a sound stand-in


def discrete_gaussian_rdp(event: DiscreteGaussianRelease, sampling: Sampling, orders: tuple[float, ...]) -> Array:
    """Return a bound on the Renyi divergence of one release at each order.

    Args:
        event: The release.
        sampling: How records enter it; the gain of Poisson sampling holds for add-or-remove-one and zero-out.
        orders: Renyi orders, each > 1, rising.

    Returns:
        Divergences, shape (num_orders,), float64, in nats.
    """
    a = np.asarray(orders, dtype=np.float64)
    unsampled: Array = a * (event.mu * event.mu / 2)
    if sampling.rate == 1.0:
        return unsampled
    whole = np.array(sorted({1.0, *np.floor(a), *np.ceil(a)}))
    accountant = RdpAccountant(list(whole[1:]), NeighboringRelation.ADD_OR_REMOVE_ONE)
    noise_multiplier = min(event.noise_multiplier, _MAX_NOISE_MULTIPLIER)
    accountant.compose(PoissonSampledDpEvent(sampling.rate, GaussianDpEvent(noise_multiplier)))
    moments = np.concatenate([[0.0], (whole[1:] - 1) * np.asarray(accountant.rdp)])
    chord = np.interp(a, whole, np.where(np.isnan(moments) | (moments < 0), np.inf, moments)) / (a - 1)
    return np.fmin(chord, unsampled)


@lru_cache(maxsize=1024)
def replace_one_renyi(noise_multiplier: float, rate: float, order: float) -> float:
    """Return the Renyi divergence of one Poisson-sampled Gaussian release under replace-one.

    The pair is that of the PLD accountant: without the record N(0, s^2), with it N(+-c, s^2), where c is half of the
    sensitivity and the record is there with probability `rate` on both sides. A pair that dominates every hockey-stick
    divergence dominates every Renyi divergence too. Integrated by the trapezoidal rule, which converges geometrically
    for integrands like this one.

    Args:
        noise_multiplier: Noise std over L2 sensitivity under replace-one (2c).
        rate: Probability that a record takes part.
        order: Order > 1.

    Returns:
        The divergence, never below the true one; infinity where there is too little noise to integrate.
    """
    mu = 1.0 / (2.0 * noise_multiplier)
    if not mu <= _MAX_GRID_MU:
        return math.inf
    reach = 2.0 * order * mu + _GRID_MARGIN
    x = np.arange(-reach, reach + _GRID_STEP, _GRID_STEP)
    base = -0.5 * x * x - 0.5 * math.log(2.0 * math.pi)
    absent = np.log1p(-rate) if rate < 1.0 else -np.inf
    up = base + np.logaddexp(absent, math.log(rate) + mu * x - 0.5 * mu * mu)
    down = base + np.logaddexp(absent, math.log(rate) - mu * x - 0.5 * mu * mu)
    log_moment = float(logsumexp(order * up + (1.0 - order) * down)) + math.log(_GRID_STEP)
    return (max(0.0, log_moment) * (1.0 + _ROUNDING) + _LOG_ROUNDING) / (order - 1.0)

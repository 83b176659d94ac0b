"""Renyi divergence of von Mises-Fisher directions: what a direction with a private natural parameter costs.

A direction y on the unit sphere of R^d has density exp(<eta, y> - A(|eta|)), and

    D_a(eta || eta') = [A(|a eta + (1 - a) eta'|) - a A(|eta|) + (a - 1) A(|eta'|)] / (a - 1).

With j_k the positive zeros of the Bessel function J_(d/2 - 1), A(x) = sum_k log(1 + x^2 / j_k^2) (Hadamard's product),
so m(x) = A'(x) / x = sum_k 2 / (x^2 + j_k^2) decreases from m(0) = 1/d, and the Hessian of A(|eta|), whose eigenvalues
are m and A'' = m + x m', is at most m(|eta|) times the identity. From this follow, for |eta - eta'| <= D:

* D_a <= a D^2 / (2 d): zero-concentrated with rho = D^2 / (2 d), the price of Gaussian noise of std sqrt(d) per unit of
  the natural parameter.
* D_a <= 2 D times the integral over (0, h) of (1 - u/h) m(u), h = a D / 2. Along the line through eta and eta', D_a is
  the integral of the second derivative of A against a triangle of base a; the second derivative is at most
  D^2 m(distance to the foot of the perpendicular from 0), and moving both to a common centre only adds (Hardy and
  Littlewood's rearrangement inequality). With m replaced by 1/d it is the first bound.
* If both lie in the ball of radius D / 2: D_a <= [A((2a - 1) D/2) - A(D/2)] / (a - 1), reached by opposite points. D_a
  grows with |eta'| (A(|.|) is convex), with the angle, and then with |eta|.

Legend: a Renyi order, d dimension, D distance of natural parameters, m and A as above.
"""

import numpy as np
from numpy.typing import NDArray

from lightning_dp.accounting.bessel import mean_resultant_length
from lightning_dp.accounting.events import VonMisesFisherRelease

Array = NDArray[np.float64]

_MAX_PARAMETER = 1e7  # beyond it the ratios take long, and the plain bounds are given: no run has use for such a level
_ROUNDING = 1e-12  # far above the error of the integrals, so that rounding cannot lower a price
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(40)


def von_mises_fisher_rdp(event: VonMisesFisherRelease, orders: tuple[float, ...]) -> Array:
    """Return a bound on the Renyi divergence of one release at each order; exact for `is_centred` parameters.

    Args:
        event: The release.
        orders: Renyi orders, each > 1, rising.

    Returns:
        Divergences, shape (num_orders,), float64, in nats; never above a * rho or above the event's pure epsilon.
    """
    a, distance = np.asarray(orders, dtype=np.float64), event.distance
    plain_bound = np.minimum(a * event.rho, event.pure_epsilon)
    a = a[2 * a * distance <= _MAX_PARAMETER]  # orders rise
    if event.is_centred:
        radius = distance / 2
        rise, _ = _integrals(event.dim, (2 * a - 1) * radius)
        start, _ = _integrals(event.dim, np.array([radius]))
        curve = (rise - start) / (a - 1)
    else:
        height = a * distance / 2
        rise, slope = _integrals(event.dim, height)
        curve = 2 * distance * (slope - rise / height)
    bound: Array = plain_bound.copy()
    bound[: len(a)] = np.minimum(plain_bound[: len(a)], event.num_draws * (1 + _ROUNDING) * curve)
    return bound


def log_normaliser(dim: int, concentration: Array) -> Array:
    """Return A(x), the log of the mean of exp(x y_1) over the unit sphere, without cancellation.

    Args:
        dim: d, >= 2.
        concentration: x >= 0, shape (n,).

    Returns:
        Shape (n,), float64, relative error about 1e-14.
    """
    return _integrals(dim, np.asarray(concentration, dtype=np.float64))[0]


def _integrals(dim: int, ends: Array) -> tuple[Array, Array]:
    """Return the integrals over (0, end) of A'(u), which is A(end), and of A'(u) / u."""
    highest = float(ends.max(initial=0.0))
    # The nearest poles of A' are +-i j_1 with j_1 > max(d/2 - 1, 2.4): 40 points are exact on panels of such a width.
    edges = [0.0, float(max(dim / 2 - 1, 2.0))]
    while edges[-1] < highest:
        edges.append(2 * edges[-1])
    grid = np.unique(np.concatenate([np.asarray(edges), ends]))
    grid = grid[grid <= highest] if highest > 0 else np.zeros(1)
    half = np.diff(grid)[:, None] / 2
    points = grid[:-1, None] + half * (_NODES + 1)  # (num_panels, 40)
    lengths = mean_resultant_length(dim, points)
    panels = np.stack([lengths, lengths / points]) * (half * _WEIGHTS)
    sums = np.concatenate([np.zeros((2, 1)), np.cumsum(panels.sum(axis=-1), axis=-1)], axis=-1)
    found = np.searchsorted(grid, ends)
    return sums[0][found], sums[1][found]

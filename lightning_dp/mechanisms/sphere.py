"""Draws of von Mises-Fisher directions: density proportional to exp(<eta, y>) on the unit sphere of R^d.

Wood's (1994) rejection sampler for the component W along eta, then a uniform direction across it. No difference of
nearly equal numbers is taken (1 - W is never formed from W), so it holds from d = 2 to 1e7 and for concentrations from
0 to 1e9.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def sample_directions(natural: Array, stream: np.random.Generator) -> Array:
    """Return one direction for each natural parameter.

    Args:
        natural: eta, float64, (n, d), d >= 2; zero gives a uniform direction.
        stream: A secret generator.

    Returns:
        Unit vectors, float64, (n, d).

    Raises:
        ValueError: d is below 2, or a natural parameter is not finite.
    """
    num, dim = natural.shape
    concentrations = np.linalg.norm(natural, axis=1)
    if dim < 2 or not np.isfinite(concentrations).all():
        raise ValueError(f"Expected finite natural parameters of dimension >= 2, got shape {natural.shape}.")
    is_uniform = concentrations == 0
    means = natural / np.where(is_uniform, 1.0, concentrations)[:, None]
    means[is_uniform, 0] = 1.0  # any direction: with concentration 0 the law has none
    gaps, rests = sample_gaps(dim, concentrations, stream)
    across = stream.standard_normal((num, dim))
    for _ in range(2):  # once more, because little may be left of a draw that nearly fell on the mean
        across -= means * (means * across).sum(axis=1, keepdims=True)
        across /= np.linalg.norm(across, axis=1, keepdims=True)
    # |y|^2 = (1 - gap)^2 + gap * rest = 1, because gap + rest = 2.
    directions: Array = (1 - gaps)[:, None] * means + np.sqrt(gaps * rests)[:, None] * across
    return directions


def sample_gaps(dim: int, concentrations: Array, stream: np.random.Generator) -> tuple[Array, Array]:
    """Return 1 - W and 1 + W, each to full relative precision; W is the component of a direction along its mean.

    The density of W is proportional to (1 - w^2)^((d - 3) / 2) exp(k w). A proposal from Wood's envelope is accepted
    with probability exp(k (W - x0)) ((1 - x0 W) / (1 - x0^2))^m, m = d - 1; about two thirds or more are.

    Args:
        dim: d, >= 2.
        concentrations: k >= 0, finite, (n,).
        stream: A secret generator.

    Returns:
        1 - W and 1 + W, (n,) each.
    """
    m = dim - 1
    root = np.sqrt(4 * concentrations**2 + m**2)
    slope = m / (2 * concentrations + root)  # b of the paper
    start = 2 * concentrations / (m + root)  # x0 = (1 - b) / (1 + b)
    start_gap = 2 * slope / (1 + slope)  # 1 - x0
    gaps, rests = np.empty_like(concentrations), np.empty_like(concentrations)
    pending = np.arange(len(concentrations))
    while len(pending):
        # X / (X + Y) is Beta(m/2, m/2); keeping X and Y keeps both tails.
        up, down = stream.standard_gamma(m / 2, (2, len(pending)))
        b, x0, gap0 = slope[pending], start[pending], start_gap[pending]
        gap, rest = 2 * b * up / (down + b * up), 2 * down / (down + b * up)
        log_ratio = concentrations[pending] * (gap0 - gap) + m * np.log((gap0 + x0 * gap) / (gap0 * (1 + x0)))
        accepted = log_ratio >= -stream.standard_exponential(len(pending))
        gaps[pending[accepted]], rests[pending[accepted]] = gap[accepted], rest[accepted]
        pending = pending[~accepted]
    return gaps, rests

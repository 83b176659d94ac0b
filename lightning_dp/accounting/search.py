"""Monotone searches over an epsilon curve: the largest count and the smallest noise that keep a budget."""

import math
from collections.abc import Callable

MAX_COUNT = 10**9
"""Counts are not searched beyond this."""

_MAX_STEPS = 200
_NARROWEST = 1e-12  # relative bracket at which a jump of the curve is taken as reached


def largest_count(epsilon_of: Callable[[int], float], budget: float, guess: int = 1) -> int:
    """Return the largest count whose epsilon is within the budget.

    Args:
        epsilon_of: Epsilon of a count >= 1; not decreasing in the count.
        budget: Epsilon that may not be passed.
        guess: Where to look first; a good one saves evaluations and changes nothing else.

    Returns:
        The count, 0 if one release is already too much, `MAX_COUNT` if the search ended there. `epsilon_of` was
        evaluated at the returned count.
    """
    low, low_eps = 0, 0.0  # within the budget
    high, high_eps = 0, math.inf  # beyond it; 0 means not found yet
    probe = min(max(guess, 1), MAX_COUNT)
    halve = False
    while high == 0 or high - low > 1:
        epsilon = epsilon_of(probe)
        width = high - low
        if epsilon <= budget:
            low, low_eps = probe, epsilon
            if low >= MAX_COUNT:
                break
        else:
            high, high_eps = probe, epsilon
        if high == 0:
            # Epsilon grows at least like the root of the count, up to lower-order terms; overshoot a little.
            growth = (budget / low_eps) ** 2 if low_eps > 0 else 16.0
            probe = min(MAX_COUNT, math.ceil(low * min(max(1.05 * growth, 1.05), 16.0)) + 1)
            continue
        halve = not halve and (high - low) * 2 > width
        probe = (low + high) // 2 if halve else _interpolate(low, low_eps, high, high_eps, budget)
        probe = min(max(probe, low + 1), high - 1)
    return low


def _interpolate(low: int, low_eps: float, high: int, high_eps: float, budget: float) -> int:
    """Return where a power law through both ends meets the budget; the middle where there is no such law."""
    if low < 1 or low_eps <= 0 or not math.isfinite(high_eps) or high_eps <= low_eps:
        return (low + high) // 2
    share = math.log(budget / low_eps) / math.log(high_eps / low_eps)
    return int(low * (high / low) ** share)


def smallest_noise(
    epsilon_of: Callable[[float], float], target: float, *, guess: float, rel_tol: float = 1e-5
) -> float:
    """Return the smallest noise whose epsilon is within the target, up to a tolerance on the private side.

    Args:
        epsilon_of: Epsilon at a noise > 0; not increasing in the noise.
        target: Epsilon that may not be passed, > 0.
        guess: Where to look first, > 0.
        rel_tol: How far below the target epsilon may end, relative to it.

    Returns:
        The noise; its epsilon was evaluated and is at most the target. Infinity if no noise up to 1e300 suffices.
    """
    low, low_eps = 0.0, math.inf  # too little noise
    high, high_eps = math.inf, 0.0  # enough noise
    probe = guess
    for step in range(_MAX_STEPS):
        epsilon = epsilon_of(probe)
        if epsilon <= target:
            high, high_eps = probe, epsilon
        else:
            low, low_eps = probe, epsilon
        if high_eps >= target * (1.0 - rel_tol) or high <= low * (1.0 + _NARROWEST) or high < 1e-300:
            break
        if low > 1e300:
            break
        probe = _next_noise(low, low_eps, high, high_eps, target * (1.0 - 0.5 * rel_tol), step=step)
    return high


def _next_noise(low: float, low_eps: float, high: float, high_eps: float, target: float, *, step: int) -> float:
    """Return the next noise to try: secant on the log-log curve, else the geometric middle, else outwards."""
    # Epsilon falls at least like 1 / noise nearly everywhere, so a good guess needs a small step to be bracketed.
    least = min(0.05, 1e-6 * 8.0**step)
    if low == 0.0:
        ratio = high_eps / target
        return high * min(max(ratio, 1 / 64), 1 - least)
    if math.isinf(high):
        ratio = low_eps / target
        return low * min(max(ratio, 1 + least), 64.0)
    middle = math.sqrt(low) * math.sqrt(high)
    if step % 3 == 2 or high_eps <= 0 or math.isinf(low_eps):
        return middle
    share = math.log(target / low_eps) / math.log(high_eps / low_eps)
    probe: float = low * (high / low) ** share
    return probe if low < probe < high else middle

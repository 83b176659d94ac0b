"""Noise in whole numbers, drawn exactly: no rounding of floating-point numbers enters its law.

rounded_gaussian: round(s Z) for a standard normal Z. Added to a whole number it is the Gaussian mechanism, rounded
afterwards: post-processing, so whatever holds for Gaussian noise of std s holds for it.

discrete_gaussian: mass proportional to exp(-k^2 / 2 s^2) on the whole numbers (Canonne, Kamath and Steinke 2020).

Both start from uniform bits. A coordinate of a rounded Gaussian is a coin for the sign and a uniform V in (0, 1/2)
whose place among the tails P(Z > (k - 1/2) / s), k = 1, 2, ..., is its size. 63 bits of V are looked at first.
Floating-point numbers say which k are possible, within an error a thousand times that of the inverse they call; where
two are, about once in 2^38 / s draws, `certain` decides, looking at as many further bits as it takes. A discrete
Gaussian is a rounded one that is kept with probability r(k) / r(0) (`certain.cell_ratio`), or else drawn again; all but
about one in 8 s^2 draws are kept at a glance, since the ratio is above 1 - k^2 / 8 s^4 (cosh u < exp(u^2 / 2)).

The bits come from SHAKE-256 under the noise secret (`NoiseSource.bits`), a cryptographic stream.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.certain import cell_ratio, is_below, normal_tail

WholeLaw = Literal["rounded_gaussian", "discrete_gaussian"]
Bits = Callable[[int, str], bytes]
"""Returns that many fresh random bytes under a name; the same name gives the same bytes, more of them a longer run."""

Whole = NDArray[np.int64]
Heads = NDArray[np.uint64]

MAX_SCALE = 2.0**36
"""Larger noise would need more and more exact decisions, and sums beyond what float64 holds exactly."""

_BLOCK = 2**20  # coordinates drawn at a time; part of the law of nothing
_HEAD_BITS = 64
_SLACK = 2.0**-40  # of normal quantiles computed in floating point; measured errors are below 2^-50 (1 + z)


def whole_noise(law: WholeLaw, size: int, *, scale: Fraction, bits: Bits) -> Whole:
    """Return independent draws.

    Args:
        law: rounded_gaussian or discrete_gaussian.
        size: How many.
        scale: s, the std of the Gaussian behind it, in (0, `MAX_SCALE`]; exact.
        bits: The source of random bits.

    Raises:
        ConfigurationError: The scale is out of range.
    """
    if not 0 < scale <= MAX_SCALE:
        raise ConfigurationError(
            f"Expected 0 < noise std <= 2^36 steps of the grid, got {float(scale):g}. Lower privacy.noise_multiplier, "
            "or use mechanism.noise=gaussian."
        )
    drawn = np.empty(size, dtype=np.int64)
    for block, start in enumerate(range(0, size, _BLOCK)):
        part = drawn[start : start + _BLOCK]
        missing = np.arange(len(part))
        attempt = 0
        while len(missing):
            name = f"{block}/{attempt}"
            candidates = _rounded_gaussian(len(missing), scale, bits, name)
            if law == "discrete_gaussian":
                kept = _is_kept(np.abs(candidates), scale, bits, name)
                part[missing[kept]] = candidates[kept]
                missing = missing[~kept]
            else:
                part[:] = candidates
                missing = missing[:0]
            attempt += 1
    return drawn


def _rounded_gaussian(size: int, scale: Fraction, bits: Bits, name: str) -> Whole:
    words = _heads(size, bits, f"{name}/value")
    is_negative, heads = (words >> np.uint64(63)).astype(bool), words & np.uint64(2**63 - 1)
    # V lies between head and head + 1, over 2^64; sizes fall with V.
    low, high = _size_bound(heads, 1, -_SLACK, scale), _size_bound(heads, 0, _SLACK, scale)
    sizes = np.maximum(low, 0.0).astype(np.int64)
    for place in np.flatnonzero(low != high):
        sizes[place] = _decided_size(int(sizes[place]), int(heads[place]), scale, _more(bits, f"{name}/value/{place}"))
    return np.where(is_negative, -sizes, sizes)


def _size_bound(heads: Heads, above: int, slack: float, scale: Fraction) -> NDArray[np.float64]:
    """Return the nearest whole number to s times a bound on the normal quantile; infinite where there is none."""
    tails = (heads.astype(np.float64) + above) * 2.0**-_HEAD_BITS
    quantiles = -ndtri(tails)  # >= 0 up to rounding; infinite at 0
    rounded: NDArray[np.float64] = np.floor(float(scale) * (quantiles + slack * (1 + quantiles)) + 0.5)
    return rounded


def _decided_size(least: int, head: int, scale: Fraction, more: Callable[[int], int]) -> int:
    """Return the largest k >= least with V < P(s Z > k - 1/2), or least."""

    def reaches(k: int) -> bool:
        return is_below(head, _HEAD_BITS, more, normal_tail(Fraction(2 * k - 1, 2) / scale))

    step = 1
    while reaches(least + step):
        step *= 2
    high = least + step
    low = least + step // 2  # reached, or least itself
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reaches(middle) else (low, middle)
    return low


def _is_kept(sizes: Whole, scale: Fraction, bits: Bits, name: str) -> NDArray[np.bool_]:
    """Return which candidates of these sizes a discrete Gaussian keeps."""
    coins = _heads(len(sizes), bits, f"{name}/keep")
    loss = np.minimum(sizes.astype(np.float64) ** 2 / (8 * float(scale) ** 4), 1.0)
    kept = coins.astype(np.float64) < 2.0**_HEAD_BITS * (1 - loss * (1 + _SLACK) - _SLACK)
    for place in np.flatnonzero(~kept):
        size, coin = int(sizes[place]), int(coins[place])
        low, high = _keep_bounds(size, scale)
        if low < coin + 1 and coin < high:
            more = _more(bits, f"{name}/keep/{place}")
            kept[place] = is_below(coin, _HEAD_BITS, more, cell_ratio(size, scale))
        else:
            kept[place] = coin + 1 <= low
    return kept


@lru_cache(maxsize=4096)
def _keep_bounds(size: int, scale: Fraction) -> tuple[int, int]:
    return cell_ratio(size, scale)(_HEAD_BITS)


def _heads(size: int, bits: Bits, name: str) -> Heads:
    return np.frombuffer(bits(8 * size, name), dtype="<u8")


def _more(bits: Bits, name: str) -> Callable[[int], int]:
    """Return what gives the bits behind a head, for the few coordinates that need them; multiples of 8."""
    return lambda count: int.from_bytes(bits(count // 8, name), "big")

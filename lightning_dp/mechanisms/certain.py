"""Numbers known to lie between two whole multiples of 2^-bits: what an exact sampler compares its random bits with.

Computed with `decimal`, whose operations, root and exponential included, round correctly at any precision; the few
units by which sums of them may be off are covered many times over.
"""

import math
from collections.abc import Callable
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal, localcontext
from fractions import Fraction
from functools import lru_cache

Enclosure = Callable[[int], tuple[int, int]]
"""Takes a number of bits; returns whole numbers between which 2^bits times the value lies, few of them apart."""

_GUARD_DIGITS = 12  # relative errors below are at most 10^-precision times a few thousand
_DIGITS_PER_BIT = math.log10(2)


def normal_tail(x: Fraction) -> Enclosure:
    """Return an enclosure of P(Z > x) for a standard normal Z.

    With S(x) the sum over n of x^(2n+1) / (1 * 3 * ... * (2n+1)), whose terms are positive, it is
    1/2 - exp(-x^2 / 2) / sqrt(2 pi) * S(x).

    Args:
        x: Any number >= 0.
    """
    return lambda bits: _enclosed(_normal_tail(x, _digits(bits)), bits)


def cell_ratio(k: int, scale: Fraction) -> Enclosure:
    """Return an enclosure of r(k) / r(0), where r is the mass at k of a discrete over that of a rounded Gaussian.

    The masses are exp(-k^2 / 2 s^2), but for a factor, and P(k - 1/2 < s Z < k + 1/2). The ratio is 1 at most: r(k) is
    the inverse of the integral over |t| < 1/2 of cosh(k t / s^2) exp(-t^2 / 2 s^2), but for the same factor.

    Args:
        k: A whole number >= 0.
        scale: s > 0.
    """

    def enclosure(bits: int) -> tuple[int, int]:
        low, high = Fraction(2 * k - 1, 2) / scale, Fraction(2 * k + 1, 2) / scale
        # The cells' masses are differences of tails: as many more digits as the smaller one has zeros.
        zeros = int(float(high) ** 2 / 2 / math.log(10)) + int(abs(math.log10(float(scale)))) + 4
        digits = _digits(bits) + 2 * zeros
        with localcontext(Context(prec=digits)):
            cell = _normal_tail(low, digits) - _normal_tail(high, digits) if k else Decimal(0)
            centre = 1 - 2 * _normal_tail(Fraction(1, 2) / scale, digits)
            ratio = _exp_half_square(Fraction(k) / scale) * centre / cell if k else Decimal(1)
        return _enclosed(ratio, bits)

    return enclosure


def is_below(head: int, num_bits: int, more: Callable[[int], int], threshold: Enclosure) -> bool:
    """Tell whether a uniform number is below a threshold, looking at as many of its bits as it takes.

    Args:
        head: The first bits of the uniform number, as a whole number.
        num_bits: How many they are.
        more: Returns that many of the bits that follow, as a whole number; the shorter is the beginning of the longer.
        threshold: What it is compared with.
    """
    extra = 0
    while True:
        low, high = threshold(num_bits + extra)
        value = (head << extra) + (more(extra) if extra else 0)
        if value + 1 <= low:
            return True
        if value >= high:
            return False
        extra = extra * 2 or 64


def _digits(bits: int) -> int:
    return math.ceil(bits * _DIGITS_PER_BIT) + _GUARD_DIGITS + 2


def _enclosed(value: Decimal, bits: int) -> tuple[int, int]:
    """Return whole numbers around 2^bits times a value that is known up to 10^-8 of 2^-bits."""
    with localcontext(Context(prec=_digits(bits) + 10)):
        scaled, slack = value * 2**bits, Decimal("1e-6")
        low = int((scaled - slack).to_integral_value(ROUND_FLOOR))
        return low, int((scaled + slack).to_integral_value(ROUND_CEILING))


def _normal_tail(x: Fraction, digits: int) -> Decimal:
    """Return P(Z > x), off by less than 10^(8 - digits), absolutely."""
    with localcontext(Context(prec=digits)):
        square = Decimal(x.numerator) ** 2 / Decimal(x.denominator) ** 2
        term = total = Decimal(x.numerator) / Decimal(x.denominator)
        n = 0
        # Beyond 2n + 3 > 2 x^2 what is left out is less than the last term.
        while term > total.scaleb(-digits) or 2 * n + 3 <= 2 * square:
            n += 1
            term = term * square / (2 * n + 1)
            total += term
        return Decimal("0.5") - _exp_half_square(x) / (2 * _pi(digits)).sqrt() * total


def _exp_half_square(x: Fraction) -> Decimal:
    """Return exp(-x^2 / 2) in the precision of the context and a few digits less."""
    return (-(Decimal(x.numerator) ** 2) / (2 * Decimal(x.denominator) ** 2)).exp()


@lru_cache(maxsize=16)
def _pi(digits: int) -> Decimal:
    """Return pi (Machin 1706: 16 arctan(1/5) - 4 arctan(1/239)) in fixed point."""
    unit = 10 ** (digits + 10)

    def arctan_of_inverse(x: int) -> int:
        power, total, n = unit // x, unit // x, 1
        while power:
            power //= -x * x
            n += 2
            total += power // n
        return total

    with localcontext(Context(prec=digits)):
        return Decimal(16 * arctan_of_inverse(5) - 4 * arctan_of_inverse(239)) / unit

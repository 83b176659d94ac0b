"""Enclosures against mpmath at five times their precision; comparisons that need more bits than the head."""

import random
from fractions import Fraction

import mpmath
import pytest

from lightning_dp.mechanisms.certain import cell_ratio, is_below, normal_tail


@pytest.fixture(autouse=True)
def _precise():
    with mpmath.workprec(2600):
        yield


def as_mpf(x: Fraction):
    return mpmath.mpf(x.numerator) / x.denominator


def tail(x):
    return mpmath.erfc(x / mpmath.sqrt(2)) / 2


@pytest.mark.parametrize("bits", [64, 128, 512])
@pytest.mark.parametrize("x", [0, 1e-12, 1e-3, 0.5, 1, 3.3, 8, 9.5, 12, 40, Fraction(1, 3)])
def test_tail_of_the_normal(x, bits):
    low, high = normal_tail(Fraction(x))(bits)
    exact = tail(as_mpf(Fraction(x))) * mpmath.mpf(2) ** bits
    assert low <= exact <= high
    assert high - low <= 2


@pytest.mark.parametrize("bits", [64, 192])
@pytest.mark.parametrize("scale", [0.1, 0.5, 3.0, 5000.0, 2.0**20])
@pytest.mark.parametrize("multiple", [0, 0.3, 1, 4, 8])
def test_ratio_of_the_cells(scale, multiple, bits):
    s, k = mpmath.mpf(scale), round(multiple * scale) + (multiple > 0)

    def cell(k):
        return tail((k - mpmath.mpf("0.5")) / s) - tail((k + mpmath.mpf("0.5")) / s)

    exact = mpmath.exp(-(mpmath.mpf(k) ** 2) / 2 / s**2) * cell(0) / cell(k)
    low, high = cell_ratio(k, Fraction(scale))(bits)
    assert low <= exact * mpmath.mpf(2) ** bits <= high
    assert high - low <= 2
    # The bound by which nearly all draws are kept at a glance.
    assert exact >= 1 - mpmath.mpf(k) ** 2 / (8 * s**4)


def test_a_comparison_looks_at_as_many_bits_as_it_takes():
    exact = [normal_tail(Fraction(17, 10))(bits)[0] for bits in (64, 128, 256, 512, 1024)]
    asked = []

    def threshold(bits):
        asked.append(bits)
        return normal_tail(Fraction(17, 10))(bits)

    digits = normal_tail(Fraction(17, 10))(4000)[0]
    for agreed, offset in ((100, 1), (100, -1), (700, 1), (700, -1)):
        # A number that agrees with the threshold in its first bits, and is then beside it.
        number = ((digits >> (4000 - agreed)) + offset) << (4000 - agreed) | random.Random(0).getrandbits(4000 - agreed)
        asked.clear()
        below = is_below(
            number >> 3936, 64, lambda count, n=number: (n >> (3936 - count)) & ((1 << count) - 1), threshold
        )
        assert below == (offset < 0)
        assert max(asked) >= agreed
    assert len(set(exact)) == 5


def test_a_threshold_of_one_is_above_every_number():
    assert is_below(2**64 - 1, 64, lambda count: 0, cell_ratio(0, Fraction(1)))

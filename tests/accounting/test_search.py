"""The searches return the boundary whatever the curve and the guess."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_dp.accounting.search import MAX_COUNT, largest_count, smallest_noise


@given(limit=st.integers(0, 10**8), guess=st.integers(-5, 2 * 10**9), power=st.floats(0.4, 3))
def test_largest_count_is_the_boundary(limit, guess, power):
    evaluated = []

    def curve(count):
        evaluated.append(count)
        return (count / (limit + 0.5)) ** power

    assert largest_count(curve, 1.0, guess=guess) == limit
    assert len(evaluated) < 120
    assert limit == 0 or limit in evaluated


@given(limit=st.integers(0, 10**6), guess=st.integers(1, 10**7))
def test_largest_count_of_a_jump(limit, guess):
    assert largest_count(lambda count: math.inf if count > limit else 0.0, 1.0, guess=guess) == limit


def test_largest_count_ends():
    assert largest_count(lambda count: 0.0, 1.0) == MAX_COUNT
    assert largest_count(lambda count: 0.5, 0.5) == MAX_COUNT


@given(
    scale=st.floats(1e-6, 1e6),
    power=st.floats(0.5, 4),
    target=st.floats(1e-3, 1e3),
    guess=st.floats(1e-8, 1e8),
)
def test_smallest_noise_is_within_tolerance_and_never_above(scale, power, target, guess):
    def curve(noise):
        return (scale / noise) ** power

    noise = smallest_noise(curve, target, guess=guess)
    assert target * (1 - 1e-5) <= curve(noise) <= target


def test_smallest_noise_at_a_jump_takes_the_private_side():
    noise = smallest_noise(lambda noise: 5.0 if noise < 3.0 else 0.0, 1.0, guess=1.0)
    assert noise == pytest.approx(3.0, rel=1e-9)
    assert noise >= 3.0


def test_smallest_noise_that_does_not_exist():
    assert smallest_noise(lambda noise: 2.0, 1.0, guess=1.0) == math.inf

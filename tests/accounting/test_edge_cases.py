"""Each edge at which dp-accounting or Opacus answers wrongly, hangs or dies (accounting, 1.3), and what ours does."""

import math

import numpy as np
import pytest
from dp_accounting import ComposedDpEvent, GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.events import (
    DiscreteGaussianRelease,
    GaussianRelease,
    NonPrivateRelease,
    RoundedGaussianRelease,
    Sampling,
)
from lightning_dp.errors import ConfigurationError

FULL = Sampling(scheme="full")
KINDS = (GaussianRelease, RoundedGaussianRelease, DiscreteGaussianRelease)
ACCOUNTANTS = ("auto", "pld", "rdp")


def poisson(rate):
    return Sampling(scheme="poisson", rate=rate)


def epsilon(noise, way=FULL, *, count=1, delta=1e-5, accountant="auto", kind=GaussianRelease):
    event = kind(noise_std=noise, l2_sensitivity=1.0)
    return compute_epsilon(
        {(event, way): count}, delta=delta, relation="add_or_remove_one", accountant=accountant
    ).epsilon


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [0, 0.0, -1.0, math.inf, -math.inf, math.nan])
def test_noise_that_is_no_noise_never_becomes_an_event(kind, noise):
    """RDP answers 0 for NaN, PLD dies of infinity with "cannot convert float NaN", sigma = 0 is infinite in both."""
    with pytest.raises(ConfigurationError, match="noise_std > 0"):
        epsilon(noise, kind=kind)


def test_the_library_still_answers_zero_for_noise_that_is_not_a_number():
    """Why the line above matters; when this fails, the guard has become a second one."""
    accountant = RdpAccountant()
    accountant.compose(GaussianDpEvent(math.nan))
    assert accountant.get_epsilon(1e-5) == 0


def test_whole_multipliers_are_cast_where_the_library_drops_a_composition():
    """2.13 instead of 4.07 for PoissonSampled(q, Composed([G(1), G(1)])) with an int."""

    def library(one):
        accountant = RdpAccountant()
        accountant.compose(
            PoissonSampledDpEvent(0.1, ComposedDpEvent([GaussianDpEvent(one), GaussianDpEvent(one)])), 10
        )
        return accountant.get_epsilon(1e-5)

    assert library(1) < library(1.0)  # the broken twin
    assert epsilon(np.int64(1), poisson(0.1), count=10) == epsilon(1.0, poisson(0.1), count=10)


@pytest.mark.parametrize("rate", [0, 0.0, -0.1, 1.5, math.nan, math.inf])
def test_rates_outside_zero_and_one_never_become_a_sampling(rate):
    """The library takes q = 0 for perfect privacy, whatever the noise; Opacus accepts 1.5."""
    with pytest.raises(ConfigurationError, match="rate"):
        poisson(rate)


@pytest.mark.parametrize("kind", KINDS)
def test_rate_one_is_the_plain_release(kind):
    assert epsilon(1.3, poisson(1.0), kind=kind) == epsilon(1.3, kind=kind)


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize("delta", [0.0, 1.0, 2.0, -1e-5])
def test_deltas_outside_zero_and_one_are_refused(accountant, delta):
    """PLD answers infinity for a negative one without a word, both answer 0 from 1 on."""
    with pytest.raises(ConfigurationError, match="0 < delta < 1"):
        epsilon(1.0, delta=delta, accountant=accountant)


@pytest.mark.parametrize("delta", [1e-18, 1e-300])
@pytest.mark.parametrize("way", [FULL, poisson(0.5)])
def test_tiny_deltas_are_finite_where_pld_fails(delta, way):
    assert 0 < epsilon(1.0, way, delta=delta) < 50
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    accountant.compose(GaussianDpEvent(1.0))
    assert math.isinf(accountant.get_epsilon(delta))
    with pytest.raises(ConfigurationError, match="below its floor"):
        epsilon(1.0, way, delta=delta, accountant="pld")


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_one_release_without_noise_is_infinite_and_none_is_zero(accountant):
    for count, expected in ((1, math.inf), (0, 0.0)):
        counts = {(NonPrivateRelease(), FULL): count}
        result = compute_epsilon(counts, delta=1e-5, relation="add_or_remove_one", accountant=accountant)
        assert result.epsilon == expected


@pytest.mark.parametrize("kind", KINDS)
def test_counts_of_zero_cost_nothing_and_negative_ones_are_refused(kind):
    assert epsilon(1.0, count=0, kind=kind) == 0.0
    with pytest.raises(ConfigurationError, match="integer >= 0"):
        epsilon(1.0, count=-1, kind=kind)


@pytest.mark.parametrize(("noise", "way"), [(1e-3, FULL), (0.02, poisson(0.01))])
@pytest.mark.parametrize("kind", KINDS)
def test_hardly_any_noise_is_a_large_number_where_pld_takes_gigabytes(noise, way, kind):
    result = epsilon(noise, way, kind=kind)
    assert 1e2 < result < math.inf
    with pytest.raises(ConfigurationError, match="PLD accountant cannot"):
        epsilon(noise, way, kind=kind, accountant="pld")


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize("way", [FULL, poisson(0.05)])
def test_large_deltas_cost_no_less_than_nothing_and_smaller_ones_more(way, accountant):
    """The PRV accountant has answered with epsilons below zero here."""
    found = [epsilon(1.0, way, count=30, delta=delta, accountant=accountant) for delta in (1e-5, 0.1, 0.5, 0.9, 0.999)]
    assert found == sorted(found, reverse=True)
    assert found[-1] >= 0

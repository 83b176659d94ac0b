"""Calibrated noise keeps the budget and wastes almost none of it; the number of releases is the exact boundary."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dp.accounting.accountants import compute_epsilon, would_exceed
from lightning_dp.accounting.calibration import calibrate_noise_multiplier, max_releases
from lightning_dp.accounting.events import (
    RELATION_NAMES,
    GaussianRelease,
    NonPrivateRelease,
    Sampling,
    TernaryRelease,
    ZCDPRelease,
)
from lightning_dp.errors import ConfigurationError

DELTA = 1e-5
FULL = Sampling(scheme="full")


def poisson(rate):
    return Sampling(scheme="poisson", rate=rate)


def unit(noise):
    return GaussianRelease(noise_std=noise, l2_sensitivity=1.0)


def topagg(noise, k=200, beta=0.7, num_teachers=4000):
    sensitivity = 2 * math.sqrt(k)
    return TernaryRelease(
        noise_std=noise * sensitivity,
        l2_sensitivity=sensitivity,
        threshold=beta * num_teachers,
        max_abs_vote=num_teachers,
        changes=((k, 0), (0, 2 * k)),
    )


def calibrate(target, count, sampling=FULL, make_event=unit, relation="add_or_remove_one", delta=DELTA):
    return calibrate_noise_multiplier(
        target_epsilon=target,
        target_delta=delta,
        num_releases=count,
        make_event=make_event,
        sampling=sampling,
        relation=relation,
    )


def releases(event, target, sampling=FULL, relation="add_or_remove_one", delta=DELTA):
    return max_releases(event=event, sampling=sampling, target_epsilon=target, target_delta=delta, relation=relation)


@pytest.mark.parametrize(
    ("target", "expected"),
    [(0.1, 30.749566), (0.5, 7.031827), (1, 3.730632), (2, 1.993812), (4, 1.081162), (8, 0.600229), (10, 0.499889)],
)
def test_closed_form_noise(target, expected):
    for relation in RELATION_NAMES:
        assert calibrate(target, 1, relation=relation) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("target", "expected"), [(1, 117.97293), (10, 15.807866)])
def test_a_thousand_unsampled_releases(target, expected):
    assert calibrate(target, 1000) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("delta", "target", "mu"),
    [
        (1e-5, 0.2, 0.06133),
        (1e-5, 0.5, 0.14221),
        (1e-5, 1, 0.26805),
        (1e-5, 2, 0.50155),
        (1e-5, 3, 0.71912),
        (1e-5, 5, 1.12124),
        (1e-5, 8, 1.66603),
        (1e-5, 10, 2.00045),
        (1e-6, 1, 0.23670),
        (1e-6, 5, 1.02036),
        (1e-6, 10, 1.84813),
    ],
)
def test_mu_budgets(delta, target, mu):
    assert 1 / calibrate(target, 1, delta=delta) == pytest.approx(mu, abs=6e-6)
    # design rule of a batch of B images in n steps: noise_std = 2 sqrt(k B n) / mu
    k, batch, steps = 200, 15, 86
    sensitivity = 2 * math.sqrt(k * batch)
    noise = calibrate(
        target, steps, make_event=lambda m: GaussianRelease(noise_std=m, l2_sensitivity=sensitivity), delta=delta
    )
    assert noise == pytest.approx(2 * math.sqrt(k * batch * steps) / mu, rel=1e-4)


@pytest.mark.parametrize(
    ("rate", "count", "target", "expected"),
    [
        (0.01, 10000, 1, 3.813240),
        (0.01, 10000, 3, 1.5651),
        pytest.param(0.01, 10000, 8, 0.882530, marks=pytest.mark.slow),
        (256 / 60000, 14062, 1, 2.025146),
        pytest.param(256 / 60000, 14062, 10, 0.612975, marks=pytest.mark.slow),
    ],
)
def test_sampled_noise(rate, count, target, expected):
    noise = calibrate(target, count, poisson(rate))
    assert noise == pytest.approx(expected, rel=1e-4)
    spent = compute_epsilon({(unit(noise), poisson(rate)): count}, delta=DELTA, relation="add_or_remove_one").epsilon
    assert target * (1 - 1e-3) <= spent <= target


def test_sampled_noise_under_replace_one():
    def doubled(noise):
        return GaussianRelease(noise_std=noise, l2_sensitivity=2.0)

    noise = calibrate(9.422323, 10000, poisson(0.01), doubled, "replace_one")
    assert noise == pytest.approx(1.1, rel=1e-4)


@pytest.mark.parametrize("relation", RELATION_NAMES)
def test_ternary_noise_is_below_the_gaussians(relation):
    noise = calibrate(1.0, 2361, make_event=topagg, relation=relation)
    assert noise * 2 * math.sqrt(200) == pytest.approx(5000, rel=1e-3)
    # the noise scales with the root of the releases that 5000 allows: 2245 by the exact Gaussian
    assert noise / calibrate(1.0, 2361, relation=relation) == pytest.approx(math.sqrt(2245 / 2361), rel=1e-3)
    assert releases(topagg(noise), 1.0, relation=relation) == 2361


def test_zcdp_noise():
    noise = calibrate(10.7255, 1, make_event=lambda m: ZCDPRelease(rho=0.5 / m**2), relation="replace_one")
    assert noise == pytest.approx(0.5, rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    target=st.floats(0.05, 50),
    delta=st.floats(1e-9, 1e-2),
    count=st.integers(1, 10**5),
    sensitivity=st.floats(1e-3, 1e3),
    relation=st.sampled_from(RELATION_NAMES),
)
def test_calibration_keeps_the_budget_to_the_last_planned_release(target, delta, count, sensitivity, relation):
    def make(noise):
        return GaussianRelease(noise_std=noise * sensitivity, l2_sensitivity=sensitivity)

    noise = calibrate(target, count, make_event=make, relation=relation, delta=delta)
    one = (make(noise), FULL)
    spent = compute_epsilon({one: count}, delta=delta, relation=relation).epsilon
    assert target * (1 - 1e-3) <= spent <= target
    budget = {"budget_epsilon": target, "delta": delta, "relation": relation}
    assert not would_exceed({one: count - 1}, one, **budget)
    assert releases(one[0], target, relation=relation, delta=delta) >= count


def test_datalens_number_of_releases():
    step = GaussianRelease(noise_std=5000.0, l2_sensitivity=2 * math.sqrt(200 * 15))
    assert releases(step, 1.0) == 149
    assert step.mu * math.sqrt(149) <= 0.26805 < step.mu * math.sqrt(150)


@pytest.mark.parametrize(
    ("k", "batch", "noise_std", "target", "allowed"),
    [
        (700, 30, 9000, 1, 69),
        (700, 15, 9000, 1, 138),
        (300, 15, 800, 10, 142),
        (350, 15, 1000, 10, 190),
        (500, 30, 700, 10, 32),
    ],
)
def test_datalens_rows(k, batch, noise_std, target, allowed):
    step = GaussianRelease(noise_std=noise_std, l2_sensitivity=2 * math.sqrt(k * batch))
    assert releases(step, target) == allowed


def test_sampled_number_of_releases():
    assert releases(unit(1.1), 3.0, poisson(0.01)) == 3712


def test_no_release_at_all():
    assert releases(unit(0.5), 1.0) == 0
    assert releases(unit(0.5), 1.0, poisson(0.5), "replace_one") == 0


@pytest.mark.parametrize("target", [0, -1.0, math.nan, math.inf, "1", None, True])
def test_senseless_targets_are_refused(target):
    with pytest.raises(ConfigurationError, match="finite target_epsilon > 0"):
        calibrate(target, 10)
    with pytest.raises(ConfigurationError, match="finite target_epsilon > 0"):
        releases(unit(1.0), target)


@pytest.mark.parametrize("delta", [0, 1, -1e-5, math.nan])
def test_senseless_deltas_are_refused(delta):
    with pytest.raises(ConfigurationError, match="0 < delta < 1"):
        calibrate(1.0, 10, delta=delta)
    with pytest.raises(ConfigurationError, match="0 < delta < 1"):
        releases(unit(1.0), 1.0, delta=delta)


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_senseless_counts_are_refused(count):
    with pytest.raises(ConfigurationError, match="num_releases"):
        calibrate(1.0, count)


def test_non_private_events_are_refused():
    with pytest.raises(ConfigurationError, match="private event"):
        calibrate(1.0, 10, make_event=lambda noise: NonPrivateRelease())
    with pytest.raises(ConfigurationError, match="private event"):
        releases(NonPrivateRelease(), 1.0)


def test_a_target_no_noise_reaches_is_refused():
    with pytest.raises(ConfigurationError, match="No noise multiplier reaches"):
        calibrate(1.0, 10, make_event=lambda noise: unit(0.5))

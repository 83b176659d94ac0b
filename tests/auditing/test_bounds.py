"""Bounds against closed forms, other programs' answers, and their own coverage."""

import math

import numpy as np
import pytest
from dp_accounting import NeighboringRelation
from scipy import stats

from lightning_dp.accounting.events import GaussianRelease, Sampling
from lightning_dp.auditing.bounds import (
    Errors,
    clopper_pearson_interval,
    clopper_pearson_upper,
    epsilon_of_mu,
    is_refuted,
    middle_errors,
    one_run_epsilon,
    privacy_profile,
    std_interval,
    tail_errors,
)

RELEASE = {(GaussianRelease(noise_std=1.0, l2_sensitivity=1.0), Sampling(scheme="full")): 1}
PROFILE = privacy_profile(RELEASE, relation=NeighboringRelation.ADD_OR_REMOVE_ONE)


@pytest.mark.parametrize("count", [0, 3, 50, 99])
def test_the_limit_is_clopper_and_pearsons(count):
    """The limit is the rate at which so few successes have the chance alpha."""
    limit = clopper_pearson_upper(count, 100, 0.025)
    assert stats.binom.cdf(count, 100, limit) == pytest.approx(0.025)
    low, high = clopper_pearson_interval(count, 100, 0.95)
    assert low <= count / 100 <= high == limit
    assert clopper_pearson_upper(100, 100, 0.025) == 1.0


def test_no_attack_on_a_thousand_trials_shows_more_than_five():
    """The ceiling of error rates: log(n / 3.7) (accounting, section 5.2)."""
    perfect = Errors(0, 1000, 0, 1000)
    assert perfect.epsilon(delta=1e-5, confidence=0.95) == pytest.approx(math.log(1000 / 3.7), abs=0.01)


def test_rates_of_a_known_mechanism_give_its_mu():
    """With very many trials the bounds come close to the truth, and stay below it."""
    num = 10_000_000
    miss = round(stats.norm.sf(0.5) * num)
    errors = Errors(miss, num, miss, num)
    assert 0.99 < errors.mu(confidence=0.95) < 1.0
    assert 0 < errors.epsilon(delta=1e-5, confidence=0.95) < epsilon_of_mu(1.0, 1e-5) == pytest.approx(4.3772, abs=1e-4)
    assert not is_refuted(PROFILE, errors, confidence=0.95)
    better = Errors(round(stats.norm.sf(0.51) * num), num, round(stats.norm.sf(0.51) * num), num)
    assert is_refuted(PROFILE, better, confidence=0.9999)


def test_power_of_two_thousand_trials():
    """Two times two thousand trials of a mechanism with mu 1 show a mu of .8 (accounting, section 5.3)."""
    stream = np.random.default_rng(0)
    found = [
        middle_errors(stream.standard_normal(2000), stream.standard_normal(2000) + 1).mu(confidence=0.95)
        for _ in range(50)
    ]
    assert 0.78 < np.mean(found) < 0.88
    assert np.mean(np.array(found) > 1.0) < 0.06


def test_tail_errors_bound_epsilon_of_any_mechanism():
    stream = np.random.default_rng(1)
    found = [
        tail_errors(stream.standard_normal(2000), stream.standard_normal(2000) + 1, delta=1e-5).epsilon(
            delta=1e-5, confidence=0.95
        )
        for _ in range(30)
    ]
    assert 0.8 < np.median(found) < 1.8  # the table has 1.64 for five thousand, 1.14 for a thousand
    assert max(found) < epsilon_of_mu(1.0, 1e-5)


def test_scores_without_any_difference_show_nothing():
    stream = np.random.default_rng(2)
    same = middle_errors(stream.standard_normal(2000), stream.standard_normal(2000))
    assert same.mu(confidence=0.9999) == 0.0
    assert same.epsilon(delta=1e-5, confidence=0.95) == 0.0


class TestOneRun:
    def test_pure_privacy_is_a_binomial_tail(self):
        """Without delta, epsilon is where so many right guesses have the chance 1 - confidence."""
        epsilon = one_run_epsilon(num_canaries=1000, guesses=100, right=95, delta=0.0, confidence=0.95)
        rate = math.exp(epsilon) / (1 + math.exp(epsilon))
        assert stats.binom.sf(94, 100, rate) == pytest.approx(0.05, rel=1e-6)

    def test_guesses_by_chance_show_nothing(self):
        assert one_run_epsilon(num_canaries=1000, guesses=100, right=50, delta=1e-5, confidence=0.95) == 0.0
        assert one_run_epsilon(num_canaries=1000, guesses=100, right=0, delta=1e-5, confidence=0.95) == 0.0

    def test_delta_and_more_canaries_lower_it(self):
        def bound(delta, num):
            return one_run_epsilon(num_canaries=num, guesses=100, right=100, delta=delta, confidence=0.95)

        assert bound(0.0, 100) > bound(1e-4, 100) > bound(1e-4, 1000) > 0

    def test_all_right_of_the_trial_audit(self):
        """160 of 160 among 4000 canaries: 3.86 (accounting, section 5.3)."""
        found = one_run_epsilon(num_canaries=4000, guesses=160, right=160, delta=1e-5, confidence=0.95)
        assert found == pytest.approx(3.86, abs=0.01)


def test_the_std_interval_covers():
    stream = np.random.default_rng(3)
    hits = 0
    for _ in range(400):
        low, high = std_interval(float((2 * stream.standard_normal(50)) ** 2 @ np.ones(50)), 50, 0.95)
        hits += low <= 2 <= high
    assert 0.92 < hits / 400 < 0.98


def test_epsilon_of_a_small_mu():
    found = [epsilon_of_mu(mu, 1e-5) for mu in (0.0, 1e-6, 1e-5, 1 / 9414.373661720861, 1e-3, 0.1, 1.0)]
    assert found == sorted(found)
    assert found[1] == 0.0
    assert 0 < found[3] < 1e-3

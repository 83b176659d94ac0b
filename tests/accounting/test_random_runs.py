"""Runs drawn at random, held against what is computed in another way: no epsilon may be below it."""

import math

import dp_accounting
import mpmath
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld import privacy_loss_distribution as pld

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.events import GaussianRelease, Sampling, parse_relation

FULL = Sampling(scheme="full")


def delta_of_gaussian(epsilon, mu):
    """Balle and Wang (2018), Theorem 8, to sixty digits."""
    with mpmath.workdps(60):
        epsilon, mu = mpmath.mpf(epsilon), mpmath.mpf(mu)
        return mpmath.ncdf(mu / 2 - epsilon / mu) - mpmath.exp(epsilon) * mpmath.ncdf(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize("seed", range(2))
def test_closed_form_against_sixty_digits(seed):
    stream = np.random.default_rng(seed)
    for _ in range(60):
        mu, count = 10 ** stream.uniform(-12, 6), int(10 ** stream.uniform(0, 6))
        delta = 10 ** -stream.choice([stream.uniform(0.001, 16), stream.uniform(16, 300)])
        event = GaussianRelease(noise_std=1.0, l2_sensitivity=float(mu / math.sqrt(count)))
        found = compute_epsilon({(event, FULL): count}, delta=delta, relation="replace_one").epsilon
        with mpmath.workdps(60):
            exact = mpmath.mpf(event.mu) * mpmath.sqrt(count)
        # Shown rounded up to a thousandth, so a rounding of 1e-9 promises nothing.
        assert delta_of_gaussian(found * (1 + 1e-9) + 1e-9, exact) <= delta * (1 + 1e-9), (mu, count, delta)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one", "replace_special"])
def test_sampled_runs_against_dp_accounting(relation, seed):
    stream = np.random.default_rng(100 + seed)
    noise, rate = float(stream.uniform(0.6, 6)), float(10 ** stream.uniform(-3, -0.7))
    count, delta = int(10 ** stream.uniform(0, 3)), 10 ** -stream.uniform(4, 9)
    extra = GaussianRelease(noise_std=float(stream.uniform(2, 20)), l2_sensitivity=1.0)
    run = {(GaussianRelease(noise_std=noise, l2_sensitivity=1.0), Sampling(scheme="poisson", rate=rate)): count}
    halves = 2.0 if relation == "replace_one" else 1.0  # theirs is over the norm bound, ours over the sensitivity
    theirs = PLDAccountant(parse_relation(relation), value_discretization_interval=1e-4)
    theirs.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(halves * noise)), count)
    if seed % 2:
        run[extra, FULL] = 2
        theirs.compose(dp_accounting.GaussianDpEvent(halves * extra.noise_multiplier), 2)
    found = compute_epsilon(run, delta=delta, relation=relation).epsilon
    assert found >= theirs.get_epsilon(delta) * (1 - 1e-4) - 2e-4


@pytest.mark.parametrize("seed", range(4))
def test_renyi_is_above_an_optimistic_distribution(seed):
    stream = np.random.default_rng(200 + seed)
    noise, rate = float(stream.uniform(0.6, 6)), float(10 ** stream.uniform(-3, -0.7))
    count, delta = int(10 ** stream.uniform(0, 3)), 10 ** -stream.uniform(4, 9)
    run = {(GaussianRelease(noise_std=noise, l2_sensitivity=1.0), Sampling(scheme="poisson", rate=rate)): count}
    below = pld.from_gaussian_mechanism(
        noise,
        sampling_prob=rate,
        pessimistic_estimate=False,
        use_connect_dots=False,
        value_discretization_interval=1e-4,
    ).self_compose(count)
    found = compute_epsilon(run, delta=delta, relation="add_or_remove_one", accountant="rdp").epsilon
    assert found >= below.get_epsilon_for_delta(delta)

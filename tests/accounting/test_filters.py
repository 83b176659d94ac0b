"""Rules for runs that are chosen in view of each other: limits are right, prices are never below the true ones."""

import contextlib
import math

import numpy as np
import pytest
from dp_accounting import NeighboringRelation

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.events import (
    GaussianRelease,
    NonPrivateRelease,
    Sampling,
    TernaryRelease,
    VonMisesFisherRelease,
    ZCDPRelease,
)
from lightning_dp.accounting.filters import best_order, joined, make_filter, rule_for, scaled
from lightning_dp.accounting.renyi import RDP_ORDERS
from lightning_dp.accounting.sampled_curve import replace_one_renyi
from lightning_dp.errors import ConfigurationError

FULL = Sampling(scheme="full")
REPLACE = NeighboringRelation.REPLACE_ONE
ADD = NeighboringRelation.ADD_OR_REMOVE_ONE
DELTA = 1e-5


def gaussian(noise, sensitivity=1.0):
    return GaussianRelease(noise_std=noise, l2_sensitivity=sensitivity)


def renyi(epsilon, delta=DELTA, counts=None, relation=ADD):
    """The rule at the order that suits these counts, or Gaussian noise."""
    order = best_order(counts or {(gaussian(1.0), FULL): 1}, relation, epsilon=epsilon, delta=delta)
    return make_filter("renyi", epsilon=epsilon, delta=delta, order=order)


def poisson(rate):
    return Sampling(scheme="poisson", rate=rate)


# Budgets of 1 / mu^2 at one release, from the closed form of one Gaussian (reference values).
@pytest.mark.parametrize(
    ("epsilon", "sigma"), [(0.1, 30.749566), (1, 3.730632), (2, 1.993812), (4, 1.081162), (8, 0.600229), (10, 0.499889)]
)
def test_the_gaussian_rule_is_exact(epsilon, sigma):
    rule = make_filter("gaussian", epsilon=epsilon, delta=DELTA)
    assert rule.limit == pytest.approx(1 / sigma**2, rel=1e-5)
    at_limit = {(gaussian(1 / math.sqrt(rule.limit)), FULL): 1}
    assert compute_epsilon(at_limit, delta=DELTA, relation=REPLACE).epsilon <= epsilon
    assert rule.total(at_limit, REPLACE) == pytest.approx(rule.limit)
    assert rule.epsilon_at(DELTA) == epsilon
    for delta in (1e-7, 1e-3):
        assert rule.epsilon_at(delta) == pytest.approx(
            compute_epsilon(at_limit, delta=delta, relation=REPLACE).epsilon, rel=1e-6
        )


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 1, 3, 10, 30])
@pytest.mark.parametrize("delta", [1e-6, 1e-5, 1e-3])
def test_a_renyi_limit_is_what_conversion_leaves(epsilon, delta):
    """At the limit, dp-accounting's own conversion at that order gives back the budget."""
    from dp_accounting.rdp import compute_epsilon as convert

    rule = renyi(epsilon, delta)
    back, _ = convert([rule.order], [rule.limit], delta)
    assert back == pytest.approx(epsilon, rel=1e-9)
    # For Gaussian noise this order wastes 4 to 20 % of the noise.
    exact = make_filter("gaussian", epsilon=epsilon, delta=delta).limit
    assert 0.69 * exact <= rule.limit * 2 / rule.order <= exact


def test_a_budget_too_small_for_any_order_is_refused():
    with pytest.raises(ConfigurationError, match="Raise it, or use the gaussian rule"):
        renyi(1e-4, 1e-9)
    with pytest.raises(ConfigurationError, match="one of gaussian, renyi"):
        make_filter("pld", epsilon=1.0, delta=DELTA)


@pytest.mark.parametrize("relation", [REPLACE, ADD], ids=["replace", "add"])
@pytest.mark.parametrize(
    ("noise", "rate", "count"), [(0.7, 0.01, 300), (2.0, 0.3, 50), (1.0, 0.0625, 1), (5.0, 0.5, 400)]
)
def test_what_an_accountant_finds_beyond_the_budget_the_renyi_rule_refuses(noise, rate, count, relation):
    counts = {(gaussian(noise), poisson(rate)): count, (gaussian(9.0), FULL): 2}
    epsilon = compute_epsilon(counts, delta=DELTA, relation=relation).epsilon
    for order in RDP_ORDERS:
        with contextlib.suppress(ConfigurationError):
            just_below = make_filter("renyi", epsilon=0.999 * epsilon, delta=DELTA, order=order)
            assert just_below.total(counts, relation) > just_below.limit
    above = renyi((1.25 if count > 1 else 3.0) * epsilon + 0.05, DELTA, counts, relation)  # and it is not vacuous
    assert above.total(counts, relation) <= above.limit


class TestSampledReplaceOne:
    @pytest.mark.parametrize(("noise", "order"), [(1.0, 2.0), (3.0, 16.0), (0.5, 63.0), (5.0, 1.5)])
    def test_without_sampling_it_is_the_gaussian(self, noise, order):
        assert replace_one_renyi(noise, 1.0, order) == pytest.approx(order / (2 * noise**2), rel=1e-8)

    # std / C, rate, releases, and the published PLD number under replace-one (C is half of the sensitivity)
    @pytest.mark.parametrize(
        ("sigma", "rate", "count", "pld"),
        [
            (1.1, 0.01, 10000, 9.422323),
            (4, 0.25, 500, 15.115056),
            (2, 0.05, 1000, 7.500295),
            (1, 256 / 60000, 14062, 4.845575),
        ],
    )
    def test_it_is_above_the_pld_and_near_it(self, sigma, rate, count, pld):
        from dp_accounting.rdp import compute_epsilon as convert

        orders = [order for order in RDP_ORDERS if order <= 63]
        curve = [count * replace_one_renyi(sigma / 2, rate, order) for order in orders]
        epsilon, _ = convert(orders, curve, DELTA)
        assert pld < epsilon < 1.12 * pld

    def test_against_direct_integration(self):
        """Order 2 of the pair by another quadrature."""
        from scipy.integrate import quad

        noise, rate = 0.8, 0.2
        mu = 1 / (2 * noise)

        def density(x, mean):
            return math.exp(-((x - mean) ** 2) / 2) / math.sqrt(2 * math.pi)

        def integrand(x):
            up = (1 - rate) * density(x, 0) + rate * density(x, mu)
            down = (1 - rate) * density(x, 0) + rate * density(x, -mu)
            return up * up / down

        assert replace_one_renyi(noise, rate, 2.0) == pytest.approx(math.log(quad(integrand, -15, 15)[0]), rel=1e-7)

    def test_it_grows_with_the_rate_and_never_beats_no_sampling_the_wrong_way(self):
        values = [replace_one_renyi(0.7, rate, 8.0) for rate in (1e-4, 1e-2, 0.1, 0.5, 0.9, 1.0)]
        assert values == sorted(values)
        assert values[0] > 0

    def test_too_little_noise_is_charged_without_sampling(self):
        assert replace_one_renyi(1e-3, 0.5, 2.0) == math.inf
        rule = renyi(10.0)
        few = rule.total({(gaussian(1e-3), poisson(0.5)): 1}, REPLACE)
        assert few == rule.total({(gaussian(1e-3), FULL): 1}, REPLACE)


TERNARY = TernaryRelease(
    noise_std=50.0, l2_sensitivity=2 * math.sqrt(3), threshold=7.0, max_abs_vote=10, changes=((3, 0), (0, 6))
)
DIRECTIONS = VonMisesFisherRelease(distance=1.0, dim=10)


@pytest.mark.parametrize("event", [gaussian(3.0), TERNARY, ZCDPRelease(rho=0.01), DIRECTIONS], ids=lambda e: e.kind)
@pytest.mark.parametrize("sampling", [FULL, poisson(0.1)], ids=["full", "poisson"])
@pytest.mark.parametrize("relation", [REPLACE, ADD, NeighboringRelation.REPLACE_SPECIAL])
def test_the_renyi_rule_prices_every_event(event, sampling, relation):
    rule = renyi(3.0)
    once = rule.total({(event, sampling): 1}, relation)
    assert 0 < once <= rule.total({(event, FULL): 1}, relation)
    assert rule.total({(event, sampling): 7}, relation) == pytest.approx(7 * once)


def test_the_gaussian_rule_refuses_what_is_not_gaussian():
    rule = make_filter("gaussian", epsilon=3.0, delta=DELTA)
    for key in ((ZCDPRelease(rho=0.01), FULL), (gaussian(1.0), poisson(0.1))):
        with pytest.raises(ConfigurationError, match="renyi rule"):
            rule.total({key: 1}, REPLACE)
    assert rule.total({(TERNARY, FULL): 2}, REPLACE) == pytest.approx(2 * TERNARY.mu**2)


def test_a_release_without_privacy_has_no_price():
    for rule in (make_filter("gaussian", epsilon=1.0, delta=DELTA), renyi(1.0)):
        assert rule.total({(NonPrivateRelease(), FULL): 1}, ADD) == math.inf


def test_which_rule_suits_which_plan():
    assert rule_for({(gaussian(1.0), FULL): 3, (TERNARY, FULL): 1}) == "gaussian"
    assert rule_for({(gaussian(1.0), poisson(0.1)): 3}) == "renyi"
    assert rule_for({(ZCDPRelease(rho=1.0), FULL): 3}) == "renyi"
    assert rule_for({(NonPrivateRelease(), FULL): 3}) == "renyi"


def test_more_noise_costs_less():
    rule = renyi(3.0)
    for event in (gaussian(3.0), ZCDPRelease(rho=0.01), DIRECTIONS):
        counts = {(event, FULL): 2}
        louder = scaled(counts, 2.0)
        assert louder is not None
        assert rule.total(louder, ADD) == pytest.approx(rule.total(counts, ADD) / 4, rel=0.1)
    assert scaled({(NonPrivateRelease(), FULL): 1}, 2.0) is None


def test_joined_adds():
    key = (gaussian(1.0), FULL)
    assert joined({key: 1}, {key: 2}, {}) == {key: 3}


def test_composing_what_was_chosen_in_view_of_losses_is_no_bound():
    """Why there is a filter at all: a rule for free would let the chooser wait for a good moment.

    Gaussian releases of mu = 0.5; the next one is made as long as the loss so far is small. Stopped by the loss, the
    releases made miss delta at the epsilon that their composition states; the plan's epsilon holds.
    """
    stream = np.random.default_rng(0)
    mu, most, trials = 0.5, 40, 200_000
    loss, made, alive = np.zeros(trials), np.zeros(trials, int), np.ones(trials, bool)
    for _ in range(most):
        step = mu * mu / 2 + mu * stream.standard_normal(trials)
        loss = np.where(alive, loss + step, loss)
        made += alive
        stated = np.array([0.0, *(_epsilon(mu, n) for n in range(1, most + 1))])[made]
        alive &= loss < stated + 0.5
    gain = np.where(loss > stated, 1 - np.exp(stated - np.maximum(loss, stated)), 0.0)
    assert gain.mean() - 5 * gain.std() / math.sqrt(trials) > 0.01
    whole = _epsilon(mu, most)
    kept = np.where(loss > whole, 1 - np.exp(whole - np.maximum(loss, whole)), 0.0)
    assert kept.mean() < 0.01


def _epsilon(mu, count):
    counts = {(gaussian(1 / mu), FULL): count}
    return compute_epsilon(counts, delta=0.01, relation=REPLACE).epsilon

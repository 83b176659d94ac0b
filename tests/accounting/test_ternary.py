"""The Renyi curve of thresholded votes, against brute force, limits of the literature and dp-accounting's PLD."""

import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import compute_epsilon as convert_rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from lightning_dp.accounting.events import TernaryRelease
from lightning_dp.accounting.renyi import RDP_ORDERS
from lightning_dp.accounting.ternary import log_outcomes, renyi_divergence, ternary_rdp, worst_divergence

ORDERS = (1.1, 1.5, 2.0, 3.0, 8.0, 32.0)


def topagg(k, noise_std, beta, num_teachers=4000):
    return TernaryRelease(
        noise_std=noise_std,
        l2_sensitivity=2 * math.sqrt(k),
        threshold=beta * num_teachers,
        max_abs_vote=num_teachers,
        changes=((k, 0), (0, 2 * k)),
    )


def outcomes(vote, noise_std, threshold):
    below = stats.norm.cdf((-threshold - vote) / noise_std)
    above = stats.norm.sf((threshold - vote) / noise_std)
    # On the mirrored side both terms are small: no cancellation.
    between = stats.norm.cdf((threshold - abs(vote)) / noise_std) - stats.norm.cdf((-threshold - abs(vote)) / noise_std)
    return np.array([below, between, above])


def brute_divergence(p, q, order):
    p, q = p[p > 0], q[p > 0]  # logarithms: the powers overflow where an outcome is all but impossible
    return special.logsumexp(order * np.log(p) + (1 - order) * np.log(q)) / (order - 1)


@settings(max_examples=40, deadline=None)
@given(
    noise_std=st.floats(0.8, 30),
    threshold=st.floats(0.5, 12),
    max_abs_vote=st.integers(1, 12),
    step=st.sampled_from([1, 2]),
)
def test_worst_divergence_is_the_brute_force_maximum_in_both_directions(noise_std, threshold, max_abs_vote, step):
    got = worst_divergence(noise_std, threshold, max_abs_vote, step, ORDERS[:4])
    laws = {vote: outcomes(vote, noise_std, threshold) for vote in range(-max_abs_vote, max_abs_vote + 1)}
    for order, value in zip(ORDERS[:4], got, strict=True):
        pairs = [(v, v + step) for v in laws if v + step in laws]
        brute = max(
            brute_divergence(laws[a], laws[b], order)
            for pair in pairs
            for a, b in (pair, pair[::-1])
            if min(laws[b]) > 0
        )
        assert value == pytest.approx(brute, rel=1e-4, abs=1e-9)


def test_one_vote_only_would_undercount():
    """The broken twin: the curve at vote 0 instead of the worst vote, which sits near a threshold."""
    noise_std, threshold, order = 100.0, 200.0, 2.0
    at_zero = brute_divergence(outcomes(0, noise_std, threshold), outcomes(2, noise_std, threshold), order)
    assert worst_divergence(noise_std, threshold, 400, 2, (order,))[0] > 1.5 * at_zero


@settings(max_examples=40, deadline=None)
@given(noise_std=st.floats(0.3, 1e4), beta=st.floats(0, 0.99), max_abs_vote=st.integers(1, 60))
def test_thresholding_never_costs_more_than_the_gaussian(noise_std, beta, max_abs_vote):
    for step in (1, 2):
        gaussian = np.array(ORDERS) * step**2 / (2 * noise_std**2)
        curve = worst_divergence(noise_std, beta * max_abs_vote, max_abs_vote, step, ORDERS)
        assert np.all(curve <= gaussian * (1 + 1e-6) + 1e-15)
        assert np.all(curve > 0)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(0, 0.637), (0.2, 0.727), (0.56, 0.809), (0.612, 0.810), (1, 0.738), (1.4, 0.652), (2, 0.637), (3, 0.637)],
)
def test_ratio_to_the_gaussian_is_the_channels_fisher_information(ratio, expected):
    noise_std, orders = 1000.0, (2.0, 8.0)
    curve = worst_divergence(noise_std, ratio * noise_std, 4000, 2, orders)
    gaussian = np.array(orders) * 4 / (2 * noise_std**2)
    assert curve / gaussian == pytest.approx(np.array([expected, expected]), abs=1.5e-3)


@pytest.mark.parametrize(
    ("k", "noise_std", "beta", "target", "allowed"),
    [
        (200, 5000, 0.7, 1, 2361),
        (200, 5000, 0.9, 1, 2375),
        (300, 800, 0.2, 10, 2573),
        (350, 1000, 0.27, 10, 3585),
    ],
)
def test_published_settings_allow_the_known_number_of_aggregations(k, noise_std, beta, target, allowed):
    # Orders in steps of one half, as in the reference; dp-accounting's finer default orders allow up to 4 more.
    orders = tuple(float(order) for order in np.arange(1.5, 64, 0.5))
    curve = ternary_rdp(topagg(k, noise_std, beta), orders)
    assert convert_rdp(orders, allowed * curve, 1e-5)[0] <= target < convert_rdp(orders, (allowed + 1) * curve, 1e-5)[0]


def test_a_batch_in_one_release_costs_as_much_as_its_images():
    one, batch = topagg(200, 5000, 0.7), topagg(15 * 200, 5000, 0.7)
    assert ternary_rdp(batch, ORDERS) == pytest.approx(15 * ternary_rdp(one, ORDERS), rel=1e-12)


def test_the_dearer_alternative_counts():
    k, common = 50, {"noise_std": 3.0, "l2_sensitivity": 2 * math.sqrt(50), "threshold": 5.0, "max_abs_vote": 10}
    both = TernaryRelease(changes=((k, 0), (0, 2 * k)), **common)
    by_two, by_one = (worst_divergence(3.0, 5.0, 10, step, ORDERS) for step in (2, 1))
    expected = np.minimum(np.maximum(k * by_two, 2 * k * by_one), np.array(ORDERS) * both.mu**2 / 2)
    assert ternary_rdp(both, ORDERS) == pytest.approx(expected)


def test_renyi_bound_is_above_the_privacy_loss_distribution_of_the_same_channel():
    k, noise_std, threshold, num_teachers = 40, 40.0, 30.0, 100
    event = topagg(k, noise_std, threshold / num_teachers, num_teachers)
    epsilon = convert_rdp(RDP_ORDERS, ternary_rdp(event, RDP_ORDERS), 1e-5)[0]
    exact = []
    for vote in range(-num_teachers, num_teachers - 1, 10):
        upper, lower = (dict(enumerate(np.log(outcomes(v, noise_std, threshold)))) for v in (vote, vote + 2))
        one = pld.from_two_probability_mass_functions(
            lower,
            upper,
            pessimistic_estimate=False,
            value_discretization_interval=1e-5,
        )
        exact.append(one.self_compose(k).get_epsilon_for_delta(1e-5))
    assert max(exact) <= epsilon <= 1.2 * max(exact)


def test_outcomes_are_probabilities_and_zero_threshold_has_no_middle():
    votes = np.arange(-50.0, 51.0)
    for threshold in (0.0, 1e-9, 7.0, 500.0):
        logs = log_outcomes(votes, 5.0, threshold)
        assert np.exp(logs).sum(axis=-1) == pytest.approx(np.ones(len(votes)), rel=1e-9)
        assert np.isneginf(logs[:, 1]).all() == (threshold == 0.0)


def test_far_laws_keep_a_finite_positive_divergence():
    logs = log_outcomes(np.array([-100.0, -98.0]), 0.5, 60.0)
    divergence = renyi_divergence(logs[:1], logs[1:], 2.0)
    assert np.isfinite(divergence).all()
    assert (worst_divergence(0.5, 60.0, 100, 2, ORDERS) <= np.array(ORDERS) * 8 * (1 + 1e-9)).all()

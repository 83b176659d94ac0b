import math

import numpy as np
import pytest

from lightning_dp.accounting import (
    Sampling,
    VonMisesFisherRelease,
    ZCDPRelease,
    calibrate_noise_multiplier,
    compute_epsilon,
    event_from_dict,
    max_releases,
)
from lightning_dp.accounting.renyi import RDP_ORDERS
from lightning_dp.accounting.von_mises_fisher import log_normaliser, von_mises_fisher_rdp
from lightning_dp.errors import ConfigurationError

FULL = Sampling(scheme="full")


def exact_divergence(eta: np.ndarray, other: np.ndarray, order: float) -> float:
    norms = [np.linalg.norm(v) for v in (order * eta + (1 - order) * other, eta, other)]
    mixed, own, others = log_normaliser(len(eta), np.array(norms))
    return float((mixed - order * own + (order - 1) * others) / (order - 1))


def opposite(dim: int, concentration: float, **options) -> VonMisesFisherRelease:
    return VonMisesFisherRelease(distance=2 * concentration, dim=dim, is_centred=True, **options)


@pytest.mark.parametrize(
    ("dim", "concentration", "order", "expected"),
    [(3, 1.0, 2, 1.0443193), (10, 5.0, 2, 6.161648), (1000, 100.0, 2, 38.211333), (10**6, 1e3, 10, 19.996382)],
)
def test_known_divergences_of_opposite_directions(dim, concentration, order, expected):
    """mechanisms (d), tests."""
    (found,) = von_mises_fisher_rdp(opposite(dim, concentration), (float(order),))
    assert found == pytest.approx(expected, rel=1e-7)


def test_log_normaliser_in_three_dimensions_is_elementary():
    """A(x) = log(sinh x / x), also where both terms of a difference of Bessel functions would round to nothing."""
    x = np.array([1e-6, 1e-3, 0.1, 2.0, 30.0])
    expected = np.where(x < 1e-2, x**2 / 6 - x**4 / 180, np.log(np.sinh(x) / x))
    np.testing.assert_allclose(log_normaliser(3, x), expected, rtol=1e-12)


@pytest.mark.parametrize("dim", [2, 3, 10, 300])
def test_no_pair_costs_more_than_claimed(dim):
    """Random and aligned pairs at distance D: exact <= curve <= min(a rho, 2 D)."""
    stream = np.random.default_rng(dim)
    orders = (1.5, 2.0, 5.0, 30.0)
    tightest = 0.0
    for _ in range(60):
        distance = 10 ** stream.uniform(-2, 2.5)
        event = VonMisesFisherRelease(distance=distance, dim=dim)
        curve = von_mises_fisher_rdp(event, orders)
        assert (curve <= np.minimum(np.array(orders) * event.rho, event.pure_epsilon)).all()
        step = stream.standard_normal(dim)
        step *= distance / np.linalg.norm(step)
        base = stream.standard_normal(dim) * 10 ** stream.uniform(-2, 2)
        for other in (base, 0 * base, -step / 2, -step, -0.7 * step, -step * stream.uniform(0, 10)):
            for order, bound in zip(orders, curve, strict=True):
                exact = exact_divergence(other + step, other, order)
                tightest = max(tightest, exact / bound)
                assert exact <= bound * (1 + 1e-9)
    # The bound is nearly reached, so a claim a little below it would be caught.
    assert tightest > 0.99


@pytest.mark.parametrize("dim", [2, 3, 50])
def test_no_pair_in_the_ball_costs_more_than_opposite_points(dim):
    stream = np.random.default_rng(dim)
    for radius in (0.1, 1.0, 10.0):
        curve = von_mises_fisher_rdp(opposite(dim, radius), (1.2, 2.0, 20.0))
        reached = 0.0
        for _ in range(200):
            pair = stream.standard_normal((2, dim))
            pair *= radius * stream.uniform(0, 1, (2, 1)) ** 0.1 / np.linalg.norm(pair, axis=1, keepdims=True)
            for eta, other in (pair, pair[:1].repeat(2, 0) * [[1], [-1]], radius * np.eye(dim)[[0, 0]] * [[1], [-1]]):
                for order, bound in zip((1.2, 2.0, 20.0), curve, strict=True):
                    exact = exact_divergence(eta, other, order)
                    reached = max(reached, exact / bound)
                    assert exact <= bound * (1 + 1e-9)
        assert reached == pytest.approx(1.0)


def test_pure_bound_holds_and_is_reached_in_the_ball():
    """As the order grows the divergence approaches the largest log ratio, 2 kappa."""
    event = opposite(3, 1.5)
    assert event.pure_epsilon == pytest.approx(3.0)
    (high,) = von_mises_fisher_rdp(event, (1e5,))
    assert 2.99 < high <= 3.0


def test_monte_carlo_divergence():
    """accounting 3.2: d = 3, k = 2, r = 2, a = 2 gives 2.91987; d = 10, k = 4, r = 0.7, a = 3 gives 0.92973."""
    assert von_mises_fisher_rdp(opposite(3, 2.0), (2.0,))[0] == pytest.approx(2.91987, abs=1e-5)
    angle = 2 * math.asin(0.35)
    eta, other = np.zeros(10), np.zeros(10)
    eta[0], other[0], other[1] = 4, 4 * math.cos(angle), 4 * math.sin(angle)
    assert exact_divergence(eta, other, 3.0) == pytest.approx(0.92973, abs=1e-5)


def test_draws_add_up():
    one, five = opposite(20, 0.5), opposite(20, 0.5, num_draws=5)
    np.testing.assert_allclose(
        von_mises_fisher_rdp(five, RDP_ORDERS), 5 * von_mises_fisher_rdp(one, RDP_ORDERS), rtol=1e-12
    )
    assert five.rho == pytest.approx(5 * one.rho)


def test_epsilon_is_below_zcdp_and_meets_the_published_table():
    """mechanisms (d): eps by zCDP / exact RDP at delta 1e-5."""
    for dim, concentration, by_zcdp, exact in ((1000, 100, 48.446, 47.574), (10**4, 100, 10.725, 10.715)):
        event = opposite(dim, float(concentration))
        for chosen, expected in ((ZCDPRelease(rho=event.rho), by_zcdp), (event, exact)):
            result = compute_epsilon({(chosen, FULL): 1}, delta=1e-5, relation="replace_one")
            # The table's zCDP column takes the slightly smaller rho of kappa A(kappa).
            assert result.epsilon == pytest.approx(expected, rel=0.012 if chosen is not event else 2e-3)
            assert result.accountant == "rdp"


def test_huge_parameters_fall_back_to_the_plain_bounds_at_once():
    event = VonMisesFisherRelease(distance=1e12, dim=10**6)
    curve = von_mises_fisher_rdp(event, RDP_ORDERS)
    np.testing.assert_array_equal(curve, np.minimum(np.array(RDP_ORDERS) * event.rho, 2e12))
    assert math.isfinite(compute_epsilon({(event, FULL): 3}, delta=1e-5, relation="replace_one").epsilon)


def test_sampling_earns_nothing_and_is_said_to():
    event = VonMisesFisherRelease(distance=1.0, dim=100)
    sampled = Sampling(scheme="poisson", rate=0.01)
    plain = compute_epsilon({(event, FULL): 10}, delta=1e-5, relation="add_or_remove_one")
    result = compute_epsilon({(event, sampled): 10}, delta=1e-5, relation="add_or_remove_one")
    assert result.epsilon == pytest.approx(plain.epsilon)
    assert any("no gain from sampling" in note for note in result.notes)


def test_calibration_and_length_agree():
    def event(noise_multiplier):
        return VonMisesFisherRelease(distance=math.sqrt(50) / noise_multiplier, dim=50)

    options = {"target_epsilon": 2.0, "target_delta": 1e-5, "sampling": FULL, "relation": "replace_one"}
    noise = calibrate_noise_multiplier(num_releases=40, make_event=event, **options)
    assert max_releases(event=event(noise), **options) == 40


def test_round_trip_and_refusals():
    event = VonMisesFisherRelease(distance=0.3, dim=12, num_draws=4, is_centred=True)
    assert event_from_dict(event.to_dict()) == event
    for broken in ({"distance": 0.0}, {"distance": math.nan}, {"dim": 1}, {"num_draws": 0}, {"is_centred": 1}):
        with pytest.raises(ConfigurationError, match=next(iter(broken))):
            VonMisesFisherRelease(**{"distance": 1.0, "dim": 3, **broken})

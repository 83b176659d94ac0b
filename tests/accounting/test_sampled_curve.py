"""Discrete Gaussian noise: no pair of neighbours costs more than charged, by brute force over its exact masses."""

import itertools
import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy import special

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.calibration import calibrate_noise_multiplier, max_releases
from lightning_dp.accounting.events import (
    DiscreteGaussianRelease,
    GaussianRelease,
    RoundedGaussianRelease,
    Sampling,
    ZCDPRelease,
    event_from_dict,
)
from lightning_dp.accounting.renyi import RDP_ORDERS
from lightning_dp.accounting.sampled_curve import discrete_gaussian_rdp
from lightning_dp.errors import ConfigurationError

FULL = Sampling(scheme="full")
ORDERS = (1.1, 1.5, 2.0, 2.5, 3.0, 5.5, 8.0, 32.0)


def poisson(rate):
    return Sampling(scheme="poisson", rate=rate)


def discrete(noise_std, l2_sensitivity=1.0):
    return DiscreteGaussianRelease(noise_std=noise_std, l2_sensitivity=l2_sensitivity)


def rounded(noise_std, l2_sensitivity=1.0):
    return RoundedGaussianRelease(noise_std=noise_std, l2_sensitivity=l2_sensitivity)


def law(scale, moved, reach=None):
    """Exact masses of independent coordinates around 0 and around `moved`, on a box, flattened."""
    reach = reach or int(14 * scale) + 45 * max(map(abs, moved)) + 3
    k = np.arange(-reach, reach + 1)
    base, shifted = np.ones(1), np.ones(1)
    total = np.exp(-(np.arange(-200, 201) ** 2) / (2 * scale**2)).sum()
    for move in moved:
        base = np.outer(base, np.exp(-(k**2) / (2 * scale**2)) / total).ravel()
        shifted = np.outer(shifted, np.exp(-((k - move) ** 2) / (2 * scale**2)) / total).ravel()
    keep = (base > 0) & (shifted > 0)
    return np.log(base[keep]), np.log(shifted[keep])


def divergence(log_p, log_q, order):
    exponent = order * log_p + (1 - order) * log_q
    peak = exponent.max()
    return (peak + math.log(np.exp(exponent - peak).sum())) / (order - 1)


@pytest.mark.parametrize("rate", [1.0, 0.5, 0.05])
@pytest.mark.parametrize(
    ("scale", "moved"), [(0.6, (1,)), (1.0, (1,)), (1.0, (3,)), (2.5, (2,)), (1.0, (1, 1)), (1.3, (2, -1))]
)
def test_no_pair_costs_more_than_charged_in_either_direction(scale, moved, rate):
    curve = discrete_gaussian_rdp(discrete(scale, math.hypot(*moved)), poisson(rate), ORDERS)
    base, shifted = law(scale, moved)
    mixed = np.logaddexp(math.log1p(-rate) + base, math.log(rate) + shifted) if rate < 1 else shifted
    for order, bound in zip(ORDERS, curve, strict=True):
        forward, backward = divergence(mixed, base, order), divergence(base, mixed, order)
        assert backward <= forward * (1 + 1e-9) + 1e-14  # the reflection argument
        assert forward <= bound * (1 + 1e-9)
        if order in (2.0, 3.0, 8.0) and scale >= 1:  # whole orders are nearly reached: a claim below would be caught
            assert forward > 0.999 * bound


def test_moving_several_coordinates_is_not_the_one_dimensional_loss():
    """dp-accounting's discrete Gaussian PLD is of one coordinate: at equal L2 distance it may promise too much."""
    scale, delta = 0.5, 0.25
    one = pld.from_discrete_gaussian_mechanism(scale, sensitivity=2, value_discretization_interval=1e-4)
    base, shifted = law(scale, (1, 1, 1, 1), reach=5)  # the same L2 distance
    epsilons = np.linspace(0, 20, 101)

    def delta_at(epsilon):
        return max(np.maximum(np.exp(p) - np.exp(epsilon + q), 0).sum() for p, q in ((base, shifted), (shifted, base)))

    joint = next(epsilon for epsilon in epsilons if delta_at(epsilon) <= delta)
    promised = one.get_epsilon_for_delta(delta)
    charged = compute_epsilon({(discrete(scale, 2.0), FULL): 1}, delta=delta, relation="replace_one")
    assert charged.accountant == "rdp"
    assert joint <= charged.epsilon
    assert promised < joint - 0.3  # a claim by it would be wrong


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one", "replace_special"])
def test_unsampled_discrete_noise_is_its_zcdp(relation):
    result = compute_epsilon({(discrete(3.0, 1.5), FULL): 7}, delta=1e-5, relation=relation)
    same = compute_epsilon({(ZCDPRelease(rho=1 / 8), FULL): 7}, delta=1e-5, relation=relation)
    assert result.epsilon == pytest.approx(same.epsilon, rel=1e-12)
    gaussian = compute_epsilon(
        {(GaussianRelease(noise_std=2.0, l2_sensitivity=1.0), FULL): 7}, delta=1e-5, relation=relation
    )
    assert gaussian.epsilon < result.epsilon < 1.15 * gaussian.epsilon


def test_sampling_helps_only_where_it_was_proved():
    counts = {(discrete(1.1), poisson(0.01)): 1000}
    for relation in ("add_or_remove_one", "replace_special"):
        result = compute_epsilon(counts, delta=1e-5, relation=relation)
        plain = compute_epsilon(
            {(GaussianRelease(noise_std=1.1, l2_sensitivity=1.0), poisson(0.01)): 1000},
            delta=1e-5,
            relation=relation,
            accountant="rdp",
        )
        assert result.accountant == "rdp"
        assert not any("no gain" in note for note in result.notes)
        assert plain.epsilon <= result.epsilon <= plain.epsilon * 1.01  # chords between whole orders
    replaced = compute_epsilon(counts, delta=1e-5, relation="replace_one")
    assert (
        replaced.epsilon == compute_epsilon({(discrete(1.1), FULL): 1000}, delta=1e-5, relation="replace_one").epsilon
    )
    assert any("no gain from sampling is used for the discrete Gaussian" in note for note in replaced.notes)


@pytest.mark.parametrize("way", [FULL, poisson(0.01)])
@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
def test_rounded_noise_costs_what_gaussian_noise_costs(way, relation):
    number = 20 if way == FULL else 300
    plain = compute_epsilon(
        {(GaussianRelease(noise_std=2.0, l2_sensitivity=1.0), way): number}, delta=1e-5, relation=relation
    )
    assert compute_epsilon({(rounded(2.0), way): number}, delta=1e-5, relation=relation) == plain


@pytest.mark.parametrize("rate", [1.0, 0.2])
@pytest.mark.parametrize(("scale", "moved"), [(0.6, (1,)), (1.0, (2,)), (1.5, (1, 2))])
def test_rounded_noise_stays_below_the_curve_of_gaussian_noise(scale, moved, rate):
    """Exact hockey-stick divergences of the rounded masses against the closed form and the PLD that are claimed."""
    reach = int(9 * scale) + 2 * max(moved) + 3
    k = np.arange(-reach, reach + 1)

    def masses(moves):
        total = np.ones(1)
        for move in moves:
            total = np.outer(
                total, special.ndtr((k - move + 0.5) / scale) - special.ndtr((k - move - 0.5) / scale)
            ).ravel()
        return total

    base, shifted = masses([0] * len(moved)), masses(moved)
    mixed = (1 - rate) * base + rate * shifted
    for delta in (1e-1, 1e-3, 1e-6):
        counts = {(rounded(scale, math.hypot(*moved)), poisson(rate)): 1}
        epsilon = compute_epsilon(counts, delta=delta, relation="add_or_remove_one").epsilon
        worst = max(np.maximum(p - math.exp(epsilon) * q, 0).sum() for p, q in ((mixed, base), (base, mixed)))
        assert worst <= delta * (1 + 1e-6) + 1e-15
        # Nearly reached where rounding hides little: a claim of seven tenths would be wrong.
        if scale >= 1:
            less = math.exp(0.7 * epsilon)
            assert max(np.maximum(p - less * q, 0).sum() for p, q in ((mixed, base), (base, mixed))) > delta


@pytest.mark.parametrize(("make", "way"), [(discrete, FULL), (discrete, poisson(0.02)), (rounded, FULL)])
def test_calibration_keeps_the_budget(make, way):
    options = {"sampling": way, "target_delta": 1e-5, "relation": "add_or_remove_one"}
    noise = calibrate_noise_multiplier(target_epsilon=2.0, num_releases=100, make_event=make, **options)
    spent = compute_epsilon({(make(noise), way): 100}, delta=1e-5, relation="add_or_remove_one").epsilon
    assert 2.0 * (1 - 1e-4) <= spent <= 2.0
    assert max_releases(event=make(noise), target_epsilon=2.0, **options) == 100


def test_the_discrete_law_takes_more_noise_for_the_same_epsilon():
    """Because only its Renyi curve is known; the rounded law has the Gaussian's exact one."""
    options = {
        "target_epsilon": 1.0,
        "target_delta": 1e-5,
        "num_releases": 86,
        "sampling": FULL,
        "relation": "replace_one",
    }
    ratio = calibrate_noise_multiplier(make_event=discrete, **options) / calibrate_noise_multiplier(
        make_event=rounded, **options
    )
    assert 1.05 < ratio < 1.11


@pytest.mark.parametrize("event", [discrete(2.5, 1.5), rounded(2.5, 1.5)])
def test_events_survive_json_and_refuse_nonsense(event):
    assert event_from_dict(event.to_dict()) == event
    assert event.is_exact
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigurationError, match="noise_std > 0"):
            type(event)(noise_std=bad, l2_sensitivity=1.0)
    assert np.isfinite(discrete_gaussian_rdp(discrete(2.5), poisson(0.3), RDP_ORDERS)).all()


def test_absurd_numbers_give_bounds_not_errors():
    for scale, rate in itertools.product((1e-300, 1e-9, 1e150, 1e300), (1.0, 0.5)):
        result = compute_epsilon({(discrete(scale), poisson(rate)): 3}, delta=1e-5, relation="add_or_remove_one")
        assert result.epsilon > 1e9 if scale < 1 else 0.0 <= result.epsilon < 1e-3

"""Many draws of what a mechanism adds: near to the proved epsilon where it is right, beyond it where it is not."""

import numpy as np
import pytest

from lightning_dp.accounting.events import Sampling
from lightning_dp.auditing.bounds import tail_errors
from lightning_dp.auditing.draws import audit_draws, can_draw
from lightning_dp.auditing.result import Verdict
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.gnmax import GNMax
from lightning_dp.mechanisms.noise import NoiseSource
from lightning_dp.mechanisms.topagg import TopAgg
from lightning_dp.mechanisms.von_mises_fisher import VonMisesFisher
from tests.privacy.doors import ADD_REMOVE, JOINT, RECORDS, REPLACE, TEACHERS, door, repeatable

SAMPLED = Sampling(scheme="poisson", rate=0.1)
FULL = Sampling(scheme="full")
RIGHT = {
    "Gaussian": door(),
    "rounded": door(Gaussian(noise="rounded_gaussian")),
    "TopAgg": door(TopAgg(top_k=4), TEACHERS, REPLACE),
    "GNMax": door(GNMax(num_projections=2), TEACHERS, REPLACE),
    "joint": door(Gaussian(), JOINT, ADD_REMOVE),
}


class NineTenths(NoiseSource):
    """Noise that is a tenth short: too little for the few thousand releases of other audits to see."""

    def gaussian(self, shape, *, std, **named):
        return super().gaussian(shape, std=0.9 * std, **named)


@pytest.mark.parametrize("sampling", [FULL, SAMPLED], ids=["full", "sampled"])
@pytest.mark.parametrize("name", RIGHT)
def test_bounds_come_near_what_is_proved(name, sampling):
    found = audit_draws(repeatable(RIGHT[name]), draws=40_000, numbers=1_000_000, sampling=sampling)
    assert found.verdict is not Verdict.VIOLATED, found.summary
    # Five standard errors of the median of 10,000 and more trials below mu 1, in the terms of each epsilon.
    assert 0.9 * found.claimed_epsilon < found.measured["epsilon_stated_law"] < 1.03 * found.claimed_epsilon
    assert 0 < found.measured["epsilon_attainable"] < found.claimed_epsilon
    assert found.measured["epsilon_any_mechanism"] < found.claimed_epsilon


def test_three_quarters_of_epsilon_of_any_law():
    """The noise multiplier 1 at delta 1e-5, epsilon 4.377, by rates alone; ten times as many draws add a tenth."""
    found = audit_draws(repeatable(door()), draws=1_000_000)
    assert found.measured["epsilon_attainable"] == pytest.approx(3.2, abs=0.1)
    # The bound varies by .15; far less is a threshold that some lucky trials chose.
    assert 2.5 < found.measured["epsilon_any_mechanism"] < found.claimed_epsilon


@pytest.mark.parametrize("sampling", [FULL, SAMPLED], ids=["full", "sampled"])
def test_a_tenth_less_noise_is_found(sampling):
    short = door(make_noise=lambda seed: NineTenths(insecure_seed=0))
    found = audit_draws(short, draws=200_000, sampling=sampling)
    assert found.verdict is Verdict.VIOLATED, found.summary
    assert found.lower_bound > found.claimed_epsilon


def test_directions_are_drawn_whole():
    found = audit_draws(repeatable(door(VonMisesFisher(), RECORDS, ADD_REMOVE)), numbers=1_000_000)
    assert found.measured["trials"] == 500
    assert found.measured["coordinates"] == 64
    assert 0 < found.measured["epsilon_stated_law"] < found.claimed_epsilon
    assert found.verdict is Verdict.CONSISTENT


def test_what_is_charged_less_than_its_noise_is_not_drawn():
    assert not can_draw(door(TopAgg(top_k=4, threshold=0.5, charge="ternary"), TEACHERS, REPLACE))
    assert not can_draw(door(VonMisesFisher(form="per_unit"), TEACHERS, REPLACE))
    assert can_draw(door(TopAgg(top_k=4, noise="discrete_gaussian"), TEACHERS, REPLACE))


def test_thresholds_of_many_scores_are_as_good_as_all(monkeypatch):
    stream = np.random.default_rng(0)
    without, with_it = stream.standard_normal(20_000), stream.standard_normal(20_000) + 1
    few = tail_errors(without, with_it, delta=1e-5).epsilon(delta=1e-5, confidence=0.95)
    monkeypatch.setattr("lightning_dp.auditing.bounds._FEW_SCORES", 10**9)
    every = tail_errors(without, with_it, delta=1e-5).epsilon(delta=1e-5, confidence=0.95)
    assert few == pytest.approx(every, abs=0.4)

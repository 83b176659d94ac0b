"""The trial audits of the specification, made through the real door (accounting, section 5.3)."""

import pytest

from lightning_dp.auditing.directions import audit_directions
from lightning_dp.auditing.door import Door
from lightning_dp.auditing.noise_scale import audit_noise
from lightning_dp.auditing.one_run import audit_one_run
from lightning_dp.auditing.result import Verdict
from lightning_dp.auditing.sensitivity import audit_sensitivity
from lightning_dp.auditing.trajectory import audit_trajectory
from lightning_dp.auditing.two_worlds import audit_two_worlds
from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.poisson import PoissonSampler
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.noise import NoiseSource
from lightning_dp.mechanisms.von_mises_fisher import VonMisesFisher
from tests.privacy.doors import ADD_REMOVE, RECORDS, REPLACE, door

CLAIMED = 4.3772  # mu 1 at delta 1e-5


class HalfTheNoise(NoiseSource):
    """A variance where a standard deviation is wanted, and the like: half of what is stated."""

    def gaussian(self, shape, *, std, release_number, leaf="noise"):
        return super().gaussian(shape, std=std / 2, release_number=release_number, leaf=leaf)

    def add_gaussian(self, total, *, std, release_number, leaf="noise"):
        return super().add_gaussian(total, std=std / 2, release_number=release_number, leaf=leaf)


def half(**parts) -> Door:
    return door(make_noise=lambda seed: HalfTheNoise(insecure_seed=seed), **parts)


def test_the_right_mechanism():
    """Row "right" of the table: std .999, shift 1, C .82 / 3.49 / 1.08."""
    right = door()
    shift, noise, worlds = audit_sensitivity(right), audit_noise(right), audit_two_worlds(right)
    assert shift.claimed_epsilon == pytest.approx(CLAIMED, abs=1e-4)
    assert shift.measured["largest_shift"] == pytest.approx(1.0, abs=1e-5)
    assert 0.98 < noise.measured["std"] < 1.02
    # Six standard errors of the mean and beyond: seen once in a hundred million runs.
    assert 0.55 < worlds.measured["mu"] < 1.05
    assert Verdict.VIOLATED not in (shift.verdict, noise.verdict, worlds.verdict)
    assert worlds.lower_bound < CLAIMED * 1.1


def test_half_the_noise():
    """Row "noise / W, W = 4": std .515, C 1.74 / 8.45 / 3.09, D 3.86 / 8.68."""
    noise, worlds, one = audit_noise(half()), audit_two_worlds(half()), audit_one_run(half(), canaries=4000)
    assert 0.49 < noise.measured["std"] < 0.51
    assert 1.4 < worlds.measured["mu"] < 2.1
    assert worlds.lower_bound > CLAIMED
    assert one.measured["epsilon_gaussian"] > CLAIMED
    assert {noise.verdict, worlds.verdict, one.verdict} == {Verdict.VIOLATED}
    assert audit_sensitivity(half()).verdict is Verdict.CONSISTENT  # which sees no noise


class TwiceTheRate(PoissonSampler):
    def __init__(self, num_records, rate):
        super().__init__(num_records, 2 * rate)


@pytest.mark.slow
def test_trajectories():
    """q .1, sigma 1, 100 steps, declared 7.047: right 5.33, sigma / 2 14.2, q doubled 11.1 (as if Gaussian)."""

    def run(made: Door, **options):
        return audit_trajectory(made, steps=100, canaries=4000, rate=0.1, **options)

    right, quiet, often = run(door()), run(half()), run(door(), make_sampler=TwiceTheRate)
    assert right.claimed_epsilon == pytest.approx(7.047, abs=0.01)
    assert right.verdict is not Verdict.VIOLATED
    assert 3.8 < right.measured["epsilon_gaussian"] < 7.0
    assert quiet.verdict is often.verdict is Verdict.VIOLATED
    assert quiet.measured["epsilon_gaussian"] > 10
    assert often.measured["epsilon_gaussian"] > 8


def test_short_trajectories_of_the_right_one():
    found = audit_trajectory(door(), steps=5, canaries=300)
    assert found.verdict is not Verdict.VIOLATED
    assert found.lower_bound < found.claimed_epsilon


def test_trajectories_are_for_records_that_join():
    with pytest.raises(ConfigurationError, match="records that join"):
        audit_trajectory(door(relation=REPLACE))
    with pytest.raises(ConfigurationError, match="Gaussian noise on records"):
        audit_trajectory(door(VonMisesFisher()))


class TooSure(VonMisesFisher):
    """Directions closer to what they hide than the event says."""

    def perturb(self, measured, plan, noise, *, release_number):
        return super().perturb(2 * measured, plan, noise, release_number=release_number)


def test_directions_that_are_too_sure_are_found():
    assert audit_directions(door(TooSure()), calls=1000).verdict is Verdict.VIOLATED
    assert audit_directions(door(VonMisesFisher()), calls=1000).verdict is not Verdict.VIOLATED
    with pytest.raises(ConfigurationError, match="VonMisesFisher"):
        audit_directions(door())


@pytest.mark.parametrize("relation", [ADD_REMOVE, REPLACE])
def test_results_are_json_with_what_they_find_and_miss(relation):
    found = audit_sensitivity(door(Gaussian(), RECORDS, relation)).to_dict()
    assert found["verdict"] == "consistent"
    assert found["finds"]
    assert found["misses"]
    assert isinstance(found["lower_bound"], float)

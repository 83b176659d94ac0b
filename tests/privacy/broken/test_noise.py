"""Wrong noise, each found by an audit: its size, its law, its precision, and draws that come again."""

import numpy as np
import pytest
import torch

from lightning_dp.auditing.hygiene import audit_hygiene
from lightning_dp.auditing.noise_scale import audit_noise
from lightning_dp.auditing.one_run import audit_one_run
from lightning_dp.auditing.result import Verdict
from lightning_dp.auditing.two_worlds import audit_two_worlds
from lightning_dp.mechanisms.noise import NoiseSource
from lightning_dp.mechanisms.topagg import TopAgg
from tests.privacy.doors import REPLACE, TEACHERS, door

_WORLD_SIZE = 4


class Broken(NoiseSource):
    """A noise source whose draws are changed."""

    def change(self, draw, *, std, **named):
        return draw

    def add_gaussian(self, total, **named):
        return total + self.gaussian(tuple(total.shape), **named)

    def gaussian(self, shape, *, std, release_number, leaf="noise"):
        draw = super().gaussian(shape, std=std, release_number=release_number, leaf=leaf)
        return self.change(draw, std=std, release_number=release_number)


class DividedByWorldSize(Broken):
    """Each of four ranks adds a quarter of the noise: the sum has half of its standard deviation."""

    def change(self, draw, **_):
        return draw / _WORLD_SIZE**0.5


class DividedTwice(Broken):
    """The noise of one rank is averaged with the sums of four."""

    def change(self, draw, **_):
        return draw / _WORLD_SIZE


class OnEveryRank(Broken):
    """All ranks add the same noise before the sum: too much of it, so the event is not what was done."""

    def change(self, draw, **_):
        return draw * 2


class VarianceForStd(Broken):
    """A variance is handed where a standard deviation is wanted."""

    def gaussian(self, shape, *, std, release_number, leaf="noise"):
        return super().gaussian(shape, std=std**0.5, release_number=release_number, leaf=leaf)


class FivePercentLow(Broken):
    def change(self, draw, **_):
        return 0.95 * draw


class DrawnOnce(Broken):
    """The release number does not reach the key: every release has the same noise."""

    def gaussian(self, shape, *, std, release_number, leaf="noise"):
        return super().gaussian(shape, std=std, release_number=1, leaf=leaf)


class HalfPrecision(Broken):
    def change(self, draw, **_):
        return draw.to(torch.bfloat16).double()


class SinglePrecision(Broken):
    """Box-Muller in float32: no draw beyond 5.77 standard deviations."""

    def gaussian(self, shape, *, std, release_number, leaf="noise"):
        return torch.randn(shape, dtype=torch.float32).double() * std


class Uniform(Broken):
    """The right standard deviation, another law."""

    def gaussian(self, shape, *, std, release_number, leaf="noise"):
        return (torch.rand(shape, dtype=torch.float64) - 0.5) * 12**0.5 * std


class SameForEveryLayer(Broken):
    """The generator is made anew for every layer: four layers of sixteen share one draw."""

    def change(self, draw, **_):
        return draw[..., : draw.shape[-1] // 4].repeat(*[1] * (draw.ndim - 1), 4)


class SeededGlobally(Broken):
    """The noise follows seed_everything, so that every start of the process draws it again."""

    def __init__(self, *, insecure_seed=None):
        super().__init__(insecure_seed=insecure_seed)
        self._stream = torch.Generator().manual_seed(1)

    def gaussian(self, shape, *, std, release_number, leaf="noise"):
        return torch.randn(shape, generator=self._stream, dtype=torch.float64) * std


def replayed(seed):
    """The secret is restored from a checkpoint: a resumed run draws the noise of the first."""
    return NoiseSource(insecure_seed=7)


def of(kind):
    return lambda seed: kind(insecure_seed=seed)


def verdict(audit, make_noise, **options):
    return audit(door(make_noise=make_noise, noise_multiplier=2.0), **options).verdict


@pytest.mark.parametrize(
    "kind",
    [DividedByWorldSize, DividedTwice, OnEveryRank, VarianceForStd, FivePercentLow, DrawnOnce],
    ids=lambda kind: kind.__name__,
)
def test_wrong_size_is_found(kind):
    assert verdict(audit_noise, of(kind)) is Verdict.VIOLATED


@pytest.mark.parametrize(
    "make_noise",
    [
        *(of(kind) for kind in (DrawnOnce, HalfPrecision, SinglePrecision, Uniform, SameForEveryLayer, SeededGlobally)),
        replayed,
    ],
    ids=["DrawnOnce", "HalfPrecision", "SinglePrecision", "Uniform", "SameForEveryLayer", "SeededGlobally", "replayed"],
)
def test_wrong_draws_are_found(make_noise):
    assert verdict(audit_hygiene, make_noise) is Verdict.VIOLATED


def test_an_attacker_sees_noise_that_is_far_too_small():
    """Black box: only what leaves is looked at, in many releases or in one with many canaries."""
    broken = door(make_noise=of(DividedTwice))
    found = audit_two_worlds(broken, calls=1000)
    assert found.verdict is Verdict.VIOLATED
    assert found.lower_bound > 2 * found.claimed_epsilon
    assert audit_one_run(broken).verdict is Verdict.VIOLATED


class OnlyOnTheSupport(TopAgg):
    """Votes get noise where somebody voted; the support, which is private, is there to be read."""

    def perturb(self, measured, plan, noise, *, release_number):
        noisy = super().perturb(measured.clone(), plan, noise, release_number=release_number)
        return torch.where(measured != 0, noisy, measured)


def test_noise_on_the_support_only_is_found():
    broken = audit_noise(door(OnlyOnTheSupport(top_k=4), TEACHERS, REPLACE))
    assert broken.verdict is Verdict.VIOLATED
    assert broken.measured["bare_coordinates"] > 0
    assert audit_noise(door(TopAgg(top_k=4), TEACHERS, REPLACE)).verdict is not Verdict.VIOLATED


def test_the_tails_of_single_precision_end():
    """Why it matters: a value past the last tail proves that a record was there (accounting, section 6)."""
    last = (-2 * np.log(2.0**-24)) ** 0.5
    assert last == pytest.approx(5.768, abs=1e-3)
    drawn = NoiseSource().gaussian((10_000,), std=1.0, release_number=1)
    assert not torch.equal(drawn, drawn.float().double())

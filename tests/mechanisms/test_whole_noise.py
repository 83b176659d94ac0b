"""The exact samplers: laws, the float filter against the exact decision behind it, streams."""

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from dp_accounting import NeighboringRelation
from scipy import special, stats

from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms import whole_noise as sampler
from lightning_dp.mechanisms.base import ContributionSpec, ReleasePlan
from lightning_dp.mechanisms.certain import normal_tail
from lightning_dp.mechanisms.noise import NoiseSource
from lightning_dp.mechanisms.topagg import TopAgg
from lightning_dp.mechanisms.whole_noise import whole_noise
from tests.contracts.mechanism import check_whole_law

LAWS = ("rounded_gaussian", "discrete_gaussian")


def stream(seed):
    return lambda count, name: hashlib.shake_256(f"{seed}/{name}".encode()).digest(count)


def draws(law, scale, size=100_000, seed=0):
    return whole_noise(law, size, scale=Fraction(scale), bits=stream(seed))


def masses(law, scale, reach):
    """Exact probabilities of -reach, ..., reach."""
    k = np.arange(-reach, reach + 1)
    if law == "rounded_gaussian":
        return special.ndtr((k + 0.5) / scale) - special.ndtr((k - 0.5) / scale)
    far = np.arange(-60 - int(60 * scale), 61 + int(60 * scale))
    return np.exp(-(k**2) / (2 * scale**2)) / np.exp(-(far**2) / (2 * scale**2)).sum()


def chi_square(drawn, law, scale):
    reach = int(np.abs(drawn).max()) + 3
    expected = masses(law, scale, reach) * len(drawn)
    seen = np.bincount(drawn + reach, minlength=2 * reach + 1).astype(float)
    rare = expected < 10
    expected, seen = (np.append(x[~rare], x[rare].sum()) for x in (expected, seen))
    expected[-1] += len(drawn) - expected.sum()  # what lies beyond the reach
    if expected[-1] < 1e-9:
        expected, seen = expected[:-1], seen[:-1]
    return stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.7, 11.0])
def test_masses(law, scale):
    drawn = draws(law, scale)
    assert drawn.dtype == np.int64
    assert chi_square(drawn, law, scale) > 1e-6
    assert chi_square(drawn, law, scale * 1.1) < 1e-6
    other = LAWS[1 - LAWS.index(law)]
    if scale <= 1:  # the two laws are told apart where they differ
        assert chi_square(drawn, other, scale) < 1e-6


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("scale", [100.5, 5000.0, 2.0**20])
def test_large_scales(law, scale):
    check_whole_law(draws(law, scale), scale, law)


@pytest.mark.parametrize("law", LAWS)
def test_tails_are_not_cut(law):
    """10^6 draws pass 4.5 std 6.8 times on average, on each side about alike."""
    drawn = draws(law, 300.0, size=10**6)
    beyond = [(drawn > 4.5 * 300).sum(), (drawn < -4.5 * 300).sum()]
    assert stats.poisson.cdf(sum(beyond), 6.8) > 1e-4
    assert stats.poisson.sf(sum(beyond), 6.8) > 1e-4
    for size in (2, 3, 4):
        seen, expected = (np.abs(drawn) > size * 300).sum(), 2e6 * stats.norm.sf(size + 0.5 / 300)
        assert abs(seen - expected) < 5 * math.sqrt(expected)


def test_discrete_gaussian_has_the_variance_of_canonne_kamath_and_steinke():
    """At s = 1 it is below 1 (their Proposition 21) by 4 pi^2 / (e^(2 pi^2) ...), and 1/12 below the rounded one."""
    k = np.arange(-40, 41)
    exact = (k**2 * masses("discrete_gaussian", 1.0, 40)).sum()
    assert 0.9999 < exact < 1.0
    for law, variance in (("discrete_gaussian", exact), ("rounded_gaussian", 1 + 1 / 12)):
        drawn = draws(law, 1.0, size=400_000)
        assert drawn.var() == pytest.approx(variance, abs=5 * math.sqrt(2 / 400_000))
        assert abs(drawn.mean()) < 5 / math.sqrt(400_000)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("scale", [0.4, 2.5, 700.0, 2.0**21])
def test_floating_point_only_filters(monkeypatch, law, scale):
    """With the filters wide open every coordinate is decided exactly, from the same bits: nothing changes."""
    expected = draws(law, scale, size=400)
    decided = []
    original = sampler._decided_size
    monkeypatch.setattr(sampler, "_decided_size", lambda *rest: decided.append(1) or original(*rest))
    monkeypatch.setattr(sampler, "_SLACK", 0.6 / scale + 0.01)
    assert np.array_equal(draws(law, scale, size=400), expected)
    assert len(decided) > 300


def test_quantiles_are_a_thousand_times_nearer_than_the_slack():
    """The one thing that is asked of floating point, checked where it is asked, against exact tails."""
    worst = 0.0
    for exponent in np.concatenate([np.linspace(1, 64, 120), 1 + np.geomspace(1e-15, 1, 60)]):
        head = min(int(2.0 ** (64 - exponent)), 2**63 - 1)
        quantile = float(-special.ndtri(float(head) * 2.0**-64))
        # Where the tail is steep enough, a step of x moves it by its density.
        low, high = normal_tail(Fraction(max(quantile, 0.0)))(200)
        density = math.exp(-(quantile**2) / 2) / math.sqrt(2 * math.pi)
        off = abs((low + high) / 2 / 2.0**200 - float(head) / 2.0**64) / density
        worst = max(worst, off / (1 + quantile))
    assert worst < sampler._SLACK / 1000


def test_bits_beyond_the_head_decide_the_farthest_tail():
    """A head of zeros is beyond nine standard deviations; how far, the bits behind it say."""

    def bits(count, name):
        if name.endswith("/value"):
            return bytes(count)
        return hashlib.shake_256(name.encode()).digest(count)

    drawn = whole_noise("rounded_gaussian", 50, scale=Fraction(10), bits=bits)
    assert (drawn >= 90).all()
    assert 92 < drawn.mean() < 95  # of the tail beyond 2^-64: 9.08 std and a little
    assert len(set(drawn.tolist())) > 3


@pytest.mark.parametrize("law", LAWS)
def test_long_releases_are_drawn_block_by_block(monkeypatch, law):
    monkeypatch.setattr(sampler, "_BLOCK", 64)
    drawn = draws(law, 50.0, size=6400)
    assert stats.kstest(drawn / 50.0, "norm").pvalue > 1e-4
    blocks = drawn.reshape(100, 64)
    correlation = np.corrcoef(blocks) - np.eye(100)
    assert np.abs(correlation).max() < 6 / 8
    assert np.array_equal(draws(law, 50.0, size=130), drawn[:130])


@pytest.mark.parametrize("scale", [0, -1, 2**36 + 1])
def test_scales_out_of_range_are_refused(scale):
    with pytest.raises(ConfigurationError, match="steps of the grid"):
        draws("rounded_gaussian", scale)


@pytest.mark.parametrize("law", LAWS)
class TestSource:
    def whole(self, source, law, number=1, size=2000, leaf="noise"):
        return source.whole(law, (size,), scale=Fraction(40), release_number=number, leaf=leaf)

    def test_is_secret_and_never_repeated(self, law):
        torch.manual_seed(0)
        first = self.whole(NoiseSource(), law)
        torch.manual_seed(0)
        assert not torch.equal(first, self.whole(NoiseSource(), law))
        # The broken twin: a known seed replays, which is why it marks the claim.
        known = NoiseSource(insecure_seed=3)
        assert not known.is_secret
        assert torch.equal(self.whole(known, law), self.whole(NoiseSource(insecure_seed=3), law))

    def test_ranks_with_one_secret_draw_the_same(self, law):
        first, second = NoiseSource(), NoiseSource()
        second.adopt_secret(first.export_secret())
        assert torch.equal(self.whole(first, law, 2), self.whole(second, law, 2))

    def test_releases_and_leaves_are_independent(self, law):
        source = NoiseSource(insecure_seed=0)
        drawn = [self.whole(source, law, n, 20_000, leaf).double() for n in (1, 2, 257) for leaf in ("noise", "other")]
        correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn), dtype=torch.float64)
        assert correlation.abs().max() < 6 / 20_000**0.5


@pytest.mark.parametrize(("law", "leaks"), [("gaussian", True), *[(law, False) for law in LAWS]])
def test_low_bits_tell_votes_apart_under_floating_point_noise_only(law, leaks):
    """Mironov (2012): 1 + noise near zero keeps the coarse spacing of numbers near 1, noise alone has a finer one.

    The densities of the two worlds are about equal there, so the claim grants an observer next to nothing; the low bits
    decide between the worlds at sight. In whole numbers there are none.
    """
    mechanism = TopAgg(top_k=1, output="votes", noise=law)
    spec = ContributionSpec.teachers(num_teachers=1, vectors_per_row=1, vector_dim=1)
    plan = ReleasePlan(spec=spec, relation=NeighboringRelation.REPLACE_ONE, noise_multiplier=10.0)
    shares = []
    for vote in (0.0, 1.0):
        votes = torch.full((400_000, 1), vote, dtype=torch.float64)
        noisy = mechanism.perturb(votes, plan, NoiseSource(insecure_seed=1), release_number=int(vote))
        near = noisy[noisy.abs() < 0.25]
        assert len(near) > 2000
        spaced = near * 2.0**53
        shares.append((spaced == spaced.round()).double().mean().item())
    assert (shares == [1.0, 1.0]) != leaks
    if leaks:
        assert shares[1] == 1.0
        assert shares[0] < 0.3

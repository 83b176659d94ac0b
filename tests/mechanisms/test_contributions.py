"""What a spec leaves out, and what it charges for coins: each with the number that a looser one would get wrong."""

import math
from dataclasses import replace

import pytest
from dp_accounting import NeighboringRelation
from scipy.stats import norm

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.events import GaussianRelease, Sampling
from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.contributions import ContributionSpec, RowChange
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.gnmax import GNMax
from lightning_dp.mechanisms.topagg import TopAgg

REPLACE = NeighboringRelation.REPLACE_ONE
RATE, STD, DELTA = 0.01, 1.0, 1e-5


def claimed(l2_sensitivity):
    """Epsilon of one sampled release under replace-one, as a run would state it."""
    release = (GaussianRelease(noise_std=STD, l2_sensitivity=l2_sensitivity), Sampling(scheme="poisson", rate=RATE))
    return compute_epsilon({release: 1}, delta=DELTA, relation=REPLACE).epsilon


def least(absence):
    """Epsilon at which one release satisfies DELTA when a record's batch lies `absence` away from the batch without.

    Two data sets that a replacement can make: the record moves the sum by `absence`, the other one in its place moves
    nothing. Then delta(epsilon) = q delta_0(epsilon_0), exactly, with delta_0 that of the unsampled Gaussian.
    """
    mu = absence / STD

    def delta(epsilon):
        inner = math.log1p(math.expm1(epsilon) / RATE)
        return RATE * (norm.cdf(mu / 2 - inner / mu) - math.exp(inner) * norm.cdf(-mu / 2 - inner / mu))

    low, high = 0.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta(middle) > DELTA else (low, middle)
    return high


def sampled(**changes):
    facts = {"num_teachers": 100, "expected_judges": 5.0, "vectors_per_row": 3, "vector_dim": 8}
    return ContributionSpec.sampled_teachers(**(facts | changes))


class TestJointGradients:
    """A gradient that couples all records moves by the whole ball when a record is absent."""

    joint = ContributionSpec.joint(num_vectors=1, vector_dim=4)

    def test_replace_one_is_refused(self):
        for mechanism in (Gaussian(), Gaussian(max_grad_norm=0.1)):
            with pytest.raises(ConfigurationError, match="replace_one has no proof"):
                mechanism.l2_sensitivity(self.joint, REPLACE)

    def test_charged_2c_it_would_claim_too_little_and_4c_would_do(self):
        """The broken twin: replace-one as one row that moves within the ball of C = 1, whose diameter is 2."""
        broken = replace(self.joint, changes={**self.joint.changes, REPLACE: (RowChange(num_replaced=1),)})
        diameter = Gaussian().l2_sensitivity(broken, REPLACE)
        assert diameter == 2
        assert claimed(diameter) < 0.8 * least(absence=2)
        assert claimed(2 * diameter) >= least(absence=2)


class TestSampledTeachers:
    def test_images_of_a_release_are_one_vector(self):
        assert Gaussian(max_grad_norm=0.5).l2_sensitivity(sampled(), REPLACE) == pytest.approx(2 * 0.5 * math.sqrt(3))
        assert TopAgg(top_k=4).l2_sensitivity(sampled(), REPLACE) == pytest.approx(2 * math.sqrt(4 * 3))

    def test_half_of_what_is_charged_covers_an_absent_teacher(self):
        """GNMax: a changed vote moves the counts by sqrt 2, but an absent one by 1, which is more than half of that."""
        mechanism, spec = GNMax(num_projections=1, threshold_noise_ratio=None), sampled(vectors_per_row=1)
        absence, changed = mechanism.row_bound(spec), mechanism.row_diameter(spec)
        assert (absence, changed) == (pytest.approx(1), pytest.approx(math.sqrt(2)))
        charged = mechanism.l2_sensitivity(spec, REPLACE)
        assert charged == pytest.approx(2 * absence)
        assert claimed(charged) >= least(absence)
        broken = replace(spec, changes={REPLACE: (RowChange(num_replaced=1),)})
        assert claimed(mechanism.l2_sensitivity(broken, REPLACE)) < 0.8 * least(absence)

    @pytest.mark.parametrize("relation", ["ADD_OR_REMOVE_ONE", "REPLACE_SPECIAL"])
    def test_other_relations_are_refused(self, relation):
        with pytest.raises(ConfigurationError, match="choose one of: replace_one"):
            sampled().alternatives(NeighboringRelation[relation])

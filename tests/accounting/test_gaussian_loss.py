"""The distribution built from arrays is the library's, up to the last bits of a logarithm."""

import numpy as np
import pytest
from dp_accounting import NeighboringRelation
from dp_accounting.pld import privacy_loss_distribution as pld

from lightning_dp.accounting.gaussian_loss import one_gaussian_release


def both(noise_multiplier, rate, relation, interval=1e-3):
    theirs = pld.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=rate, value_discretization_interval=interval, neighboring_relation=relation
    )
    return one_gaussian_release(noise_multiplier, rate, relation, interval), theirs


@pytest.mark.parametrize(
    "relation",
    [NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_ONE],  # zero-out is the first
)
@pytest.mark.parametrize("rate", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("noise_multiplier", [0.6, 5.0])
def test_masses_and_epsilons(noise_multiplier, rate, relation):
    ours, theirs = both(noise_multiplier, rate, relation)
    for own, other in ((ours._pmf_remove, theirs._pmf_remove), (ours._pmf_add, theirs._pmf_add)):
        assert own.size == other.size
        assert own._infinity_mass == pytest.approx(other._infinity_mass, rel=1e-9, abs=1e-18)
        if hasattr(own, "_probs"):
            assert own._lower_loss == other._lower_loss
            np.testing.assert_allclose(own._probs, other._probs, rtol=0, atol=1e-11)
    for count in (1, 100):
        composed = [one.self_compose(count) for one in (ours, theirs)]
        for delta in (1e-2, 1e-5, 1e-8):
            own, other = (one.get_epsilon_for_delta(delta) for one in composed)
            assert own == pytest.approx(other, rel=1e-7, abs=1e-9)  # far beyond 100 the tail is rounding

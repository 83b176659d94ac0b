import math

import pytest
import torch
from dp_accounting import NeighboringRelation
from hypothesis import given
from hypothesis import strategies as st

from lightning_dp.accounting.events import NonPrivateRelease
from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms import base
from lightning_dp.mechanisms.base import ContributionSpec, ReleasePlan
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.no_privacy import NoPrivacy
from lightning_dp.mechanisms.noise import NoiseSource
from tests.contracts.mechanism import MechanismContract, context

ADD_REMOVE = NeighboringRelation.ADD_OR_REMOVE_ONE
REPLACE = NeighboringRelation.REPLACE_ONE


class TestGaussianFlat(MechanismContract):
    def make(self):
        return Gaussian(max_grad_norm=0.7)


class TestGaussianAutomatic(MechanismContract):
    def make(self):
        return Gaussian(max_grad_norm=3.0, clipping="automatic", stability=0.01)


class TestGaussianPerLayer(MechanismContract):
    def make(self):
        return Gaussian(max_grad_norm=0.7, clipping="per_layer")

    def spec(self):
        return ContributionSpec.records(expected_batch_size=40, vector_dim=16, segments=(1, 5, 10))


class TestGaussianRounded(MechanismContract):
    def make(self):
        return Gaussian(max_grad_norm=0.7, noise="rounded_gaussian")


class TestGaussianDiscrete(MechanismContract):
    def make(self):
        return Gaussian(max_grad_norm=3.0, clipping="automatic", noise="discrete_gaussian")


class TestGaussianRoundedPerLayer(TestGaussianPerLayer):
    def make(self):
        return Gaussian(max_grad_norm=0.7, clipping="per_layer", noise="rounded_gaussian")


def encode(mechanism, rows):
    spec = ContributionSpec.records(expected_batch_size=4, vector_dim=rows.shape[-1])
    return mechanism.encode(rows, spec, context(len(rows)))


@given(scale=st.floats(1e-20, 1e20), bound=st.floats(1e-6, 1e6), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_clipped_norms_stay_inside_the_bound_at_any_scale(scale, bound, dtype):
    rows = (torch.randn(5, 1, 7, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)
    norms = torch.linalg.vector_norm(encode(Gaussian(max_grad_norm=bound), rows), dim=-1)
    assert (norms <= bound).all()


def test_small_rows_pass_unchanged():
    rows = torch.randn(5, 1, 7).double()
    rows = rows / rows.norm(dim=-1, keepdim=True) * 0.5
    torch.testing.assert_close(encode(Gaussian(max_grad_norm=1.0), rows), rows)


def test_automatic_clipping_keeps_the_direction_and_brings_every_row_near_the_bound():
    rows = torch.randn(5, 1, 7).double() * 1e-5
    encoded = encode(Gaussian(max_grad_norm=2.0, clipping="automatic"), rows)
    torch.testing.assert_close(encoded.norm(dim=-1), torch.full((5, 1), 2.0).double(), rtol=1e-5, atol=0)
    cosine = torch.nn.functional.cosine_similarity(encoded, rows, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_sensitivity_follows_the_relation():
    """C for a record that appears, 2C for one that changes, 2C for a joint gradient (mechanisms, section 0)."""
    mechanism = Gaussian(max_grad_norm=1.5)
    records = ContributionSpec.records(expected_batch_size=4, vector_dim=7)
    joint = ContributionSpec.joint(num_vectors=1, vector_dim=7)
    assert mechanism.l2_sensitivity(records, ADD_REMOVE) == 1.5
    assert mechanism.l2_sensitivity(records, REPLACE) == 3.0
    assert mechanism.l2_sensitivity(joint, ADD_REMOVE) == 3.0
    with pytest.raises(ConfigurationError, match="no proof"):
        mechanism.l2_sensitivity(joint, REPLACE)


def test_a_huge_bound_and_tiny_noise_give_the_plain_mean():
    spec = ContributionSpec.records(expected_batch_size=6, vector_dim=7)
    rows = torch.randn(6, 1, 7).double()
    released = []
    for mechanism in (Gaussian(max_grad_norm=1e6), NoPrivacy()):
        plan = ReleasePlan(spec=spec, relation=ADD_REMOVE, noise_multiplier=1e-14)
        total = mechanism.encode(rows, spec, context(6)).sum(0)
        released.append(mechanism.release(total, plan, NoiseSource(), release_number=1, public_seed=0))
    torch.testing.assert_close(released[0], rows.mean(0).float())
    torch.testing.assert_close(released[1], rows.mean(0).float())


def test_a_thousandfold_noise_destroys_the_signal():
    spec = ContributionSpec.records(expected_batch_size=6, vector_dim=400)
    mechanism = Gaussian(max_grad_norm=1.0)
    plan = ReleasePlan(spec=spec, relation=ADD_REMOVE, noise_multiplier=1000.0)
    total = mechanism.encode(torch.ones(6, 1, 400), spec, context(6)).sum(0)
    released = mechanism.release(total, plan, NoiseSource(), release_number=1, public_seed=0)
    assert abs(torch.nn.functional.cosine_similarity(released, total.float()).item()) < 0.3


def test_no_privacy_declares_itself():
    plan = ReleasePlan(
        spec=ContributionSpec.records(expected_batch_size=6, vector_dim=4), relation=REPLACE, noise_multiplier=1.0
    )
    assert NoPrivacy().step_event(plan) == NonPrivateRelease()
    assert NoPrivacy().noise_std(plan) == 0.0
    rows = torch.randn(6, 1, 4)
    rows[2, 0, 1] = math.nan
    assert torch.isfinite(encode(NoPrivacy(), rows)).all()


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_bad_bounds_are_refused(value):
    with pytest.raises(ConfigurationError, match="max_grad_norm > 0"):
        Gaussian(max_grad_norm=value)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_bad_noise_is_refused(value):
    spec = ContributionSpec.records(expected_batch_size=6, vector_dim=4)
    with pytest.raises(ConfigurationError, match="noise_multiplier > 0"):
        ReleasePlan(spec=spec, relation=REPLACE, noise_multiplier=value)


def test_layers_are_clipped_apart_to_a_joint_bound():
    """C_l = C / sqrt(L), joint bound sqrt(sum C_l^2) = C (mechanisms, section (a))."""
    spec = ContributionSpec.records(expected_batch_size=4, vector_dim=12, segments=(2, 4, 6))
    mechanism = Gaussian(max_grad_norm=3.0, clipping="per_layer")
    rows = torch.randn(6, 1, 12, generator=torch.Generator().manual_seed(0)).double() * 100
    rows[0, 0, 2:6] = 0.01
    encoded = mechanism.encode(rows, spec, context(6))
    share = 3.0 / 3**0.5
    for part in encoded[1:].split(spec.segments, dim=-1):
        torch.testing.assert_close(part.norm(dim=-1), torch.full((5, 1), share).double(), rtol=2e-6, atol=0)
    torch.testing.assert_close(encoded[0, 0, 2:6], rows[0, 0, 2:6])  # a small layer passes beside a large one
    assert 0.999999 * 3 < encoded.norm(dim=-1).max() <= 3.0
    assert mechanism.l2_sensitivity(spec, ADD_REMOVE) == 3.0


def test_clipping_every_layer_to_the_whole_bound_would_be_caught():
    """The broken twin: L layers of norm C have joint norm C sqrt(L)."""
    spec = ContributionSpec.records(expected_batch_size=4, vector_dim=12, segments=(2, 4, 6))
    rows = torch.ones(1, 1, 12).double() * 100
    flat = Gaussian(max_grad_norm=3.0)
    broken = torch.cat([flat.encode(part, spec, context(1)) for part in rows.split(spec.segments, -1)], dim=-1)
    assert broken.norm() > 1.7 * flat.row_bound(spec)


def test_layers_are_needed_to_clip_by_layer():
    with pytest.raises(ConfigurationError, match="have none"):
        Gaussian(clipping="per_layer").check(ContributionSpec.joint(num_vectors=1, vector_dim=7))


def test_rows_that_never_oppose_each_other_move_a_sum_by_sqrt_two_bounds():
    spec = ContributionSpec.statistics(num_cells=3, vector_dim=4, rows_never_oppose=True)
    free = ContributionSpec.statistics(num_cells=3, vector_dim=4)
    replace = NeighboringRelation.REPLACE_ONE
    assert Gaussian(max_grad_norm=0.5).l2_sensitivity(spec, replace) == pytest.approx(0.5 * math.sqrt(2))
    assert Gaussian(max_grad_norm=0.5).l2_sensitivity(free, replace) == 1.0
    for relation in (NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_SPECIAL):
        assert Gaussian(max_grad_norm=0.5).l2_sensitivity(spec, relation) == 0.5
    # Scaled layer by layer, two vectors at a right angle need not stay so.
    assert Gaussian(clipping="per_layer").row_diameter(spec) == 2.0


def test_a_long_release_needs_no_second_vector_and_is_the_same(monkeypatch):
    spec = ContributionSpec.records(expected_batch_size=4, vector_dim=50)
    plan = ReleasePlan(spec=spec, relation=NeighboringRelation.ADD_OR_REMOVE_ONE, noise_multiplier=1.5)
    total, noise = torch.linspace(-1, 1, 50, dtype=torch.float64).unsqueeze(0), NoiseSource()
    kept = total.clone()
    options = {"release_number": 1, "public_seed": 0}
    short = Gaussian().release(total, plan, noise, **options)
    monkeypatch.setattr(base, "_LONG", 1)
    assert torch.equal(Gaussian().release(total, plan, noise, **options), short)
    assert torch.equal(total, kept)
    assert torch.equal(Gaussian().release(total, plan, noise, **options, may_overwrite=True), short)
    assert not torch.equal(total, kept)


def test_rows_that_never_oppose_each_other_may_do_so_by_what_is_cut_off():
    """Inner products of rows that are cut to a grid can be negative, so sqrt 2 bounds alone would promise too much."""
    spec = ContributionSpec.statistics(num_cells=1, vector_dim=2, rows_never_oppose=True)
    mechanism = Gaussian(max_grad_norm=1.0, noise="rounded_gaussian")
    bound, step = mechanism.row_bound(spec), mechanism.grid_step(spec)
    assert math.sqrt(2) * bound < mechanism.row_diameter(spec) < (math.sqrt(2) + 1e-4) * bound
    pair = torch.tensor([[1.0, 0.9], [-1.0, 1.0 / 0.9]], dtype=torch.float64) * step
    assert abs(float(pair[0] @ pair[1])) < 1e-9 * step**2
    cut = mechanism.encode(pair[:, None], spec, context(2))[:, 0] / step
    assert cut.tolist() == [[1.0, 0.0], [-1.0, 1.0]]  # they oppose each other: the premise of sqrt 2 is gone
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(500, generator=generator, dtype=torch.float64) * math.pi / 2
    for turn in torch.rand(20, generator=generator, dtype=torch.float64) * 7:  # quarters of a circle on the bound
        rows = 2 * torch.stack([torch.cos(angles + turn), torch.sin(angles + turn)], dim=-1)
        rows = mechanism.encode(rows[:, None], spec, context(len(rows)))[:, 0]
        assert torch.cdist(rows, rows).max() <= mechanism.row_diameter(spec)

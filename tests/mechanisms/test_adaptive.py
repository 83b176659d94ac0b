import math

import pytest
import torch
from dp_accounting import NeighboringRelation

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.events import GaussianRelease, Sampling
from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.adaptive import AdaptiveGaussian
from lightning_dp.mechanisms.base import ContributionSpec, ReleasePlan
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.noise import NoiseSource
from tests.contracts.mechanism import MechanismContract, adversarial_rows, context

ADD_REMOVE = NeighboringRelation.ADD_OR_REMOVE_ONE
REPLACE = NeighboringRelation.REPLACE_ONE


class TestAdaptiveGaussian(MechanismContract):
    def make(self):
        return AdaptiveGaussian(initial_norm=0.7, quantile_share=0.1)

    def spec(self):
        return ContributionSpec.records(expected_batch_size=40, vector_dim=16)


class TestAdaptiveGaussianRounded(TestAdaptiveGaussian):
    def make(self):
        return AdaptiveGaussian(initial_norm=0.7, quantile_share=0.1, noise="rounded_gaussian")


def spec(expected_batch_size=40.0, vector_dim=16) -> ContributionSpec:
    return ContributionSpec.records(expected_batch_size=expected_batch_size, vector_dim=vector_dim)


def plan(noise_multiplier=1e-12, **options) -> ReleasePlan:
    return ReleasePlan(spec=spec(**options), relation=ADD_REMOVE, noise_multiplier=noise_multiplier)


def release(mechanism, rows, noise_multiplier=1e-12, number=1, **options):
    total = mechanism.encode(rows, spec(**options), context(len(rows))).sum(0, dtype=torch.float64)
    return mechanism.release(
        total, plan(noise_multiplier, **options), NoiseSource(), release_number=number, public_seed=0
    )


def test_the_gradient_part_is_that_of_flat_clipping():
    rows = torch.randn(40, 1, 16, generator=torch.Generator().manual_seed(0)).double()
    flat = Gaussian(max_grad_norm=0.7).encode(rows, spec(), context(40)).mean(0)
    torch.testing.assert_close(release(AdaptiveGaussian(initial_norm=0.7), rows), flat.float())


@pytest.mark.parametrize(("multiplier", "count_noise", "expected"), [(1.0, 12.8, 1.0007638), (1.1, 12.8, 1.1010169)])
def test_noise_multipliers_are_those_of_the_paper(multiplier, count_noise, expected):
    """z_g = (z^-2 - (2 sigma_b)^-2)^-1/2, known answers of mechanisms, section (c)."""
    share = (multiplier / (2 * count_noise)) ** 2
    mechanism = AdaptiveGaussian(initial_norm=3.0, quantile_share=share)
    clipped = mechanism.encode(torch.full((1, 1, 16), 1e9), spec(), context(1))[..., :-1].norm().item()
    indicator = mechanism.encode(torch.zeros(1, 1, 16), spec(), context(1))[..., -1].item()
    noise_std = mechanism.noise_std(plan(multiplier))
    assert noise_std / clipped == pytest.approx(expected, rel=2e-6)
    assert noise_std / (2 * indicator) == pytest.approx(count_noise, rel=2e-6)


def test_one_event_at_the_total_noise_multiplier_is_charged():
    event = AdaptiveGaussian(quantile_share=0.2).step_event(plan(1.1))
    assert event == GaussianRelease(noise_std=1.1, l2_sensitivity=1.0)
    counts = {(event, Sampling(scheme="poisson", rate=0.01)): 1000}
    assert compute_epsilon(counts, delta=1e-5, relation=ADD_REMOVE).epsilon == pytest.approx(1.515, abs=2e-3)


def test_sensitivity_does_not_depend_on_the_norm_that_was_reached():
    mechanism = AdaptiveGaussian(initial_norm=5.0)
    before = mechanism.step_event(plan(1.0))
    for number in range(1, 20):
        release(mechanism, torch.full((40, 1, 16), 1e-3), number=number)
    assert mechanism.max_grad_norm < 1.0
    assert mechanism.step_event(plan(1.0)) == before
    rows = adversarial_rows(spec())
    encoded = mechanism.encode(rows, spec(), context(len(rows))).flatten(1)
    assert encoded.norm(dim=1).max() <= 1.0
    assert torch.cdist(encoded, encoded).max() <= mechanism.l2_sensitivity(spec(), REPLACE) == 2.0


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
def test_the_norm_finds_the_median(scale):
    """Noise-free fixed point on norms uniform on (0, 1): C = 1/2 (mechanisms, section (c))."""
    stream = torch.Generator().manual_seed(0)
    mechanism = AdaptiveGaussian(initial_norm=scale)
    for number in range(1, 120):
        norms = torch.rand(40, 1, 1, generator=stream, dtype=torch.float64)
        direction = torch.nn.functional.normalize(torch.randn(40, 1, 16, generator=stream).double(), dim=-1)
        release(mechanism, norms * direction, number=number)
    assert mechanism.max_grad_norm == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("quantile", [0.2, 0.9])
def test_the_norm_finds_other_quantiles(quantile):
    mechanism = AdaptiveGaussian(initial_norm=1.0, target_quantile=quantile)
    norms = (torch.arange(40).double()[:, None, None] + 0.5) / 40
    rows = norms * torch.nn.functional.one_hot(torch.tensor(0), 16)
    for number in range(1, 200):
        release(mechanism, rows, number=number)
    assert mechanism.max_grad_norm == pytest.approx(quantile, abs=0.05)


@pytest.mark.parametrize("keeps", [True, False])
def test_a_step_does_not_grow_with_the_norm_unless_that_is_asked(keeps):
    """C goes from .1 to 20 here; a learning rate that was right at .1 would then be two hundred times too large."""
    mechanism = AdaptiveGaussian(initial_norm=0.1, keep_step_size=keeps)
    rows = 40 * torch.nn.functional.one_hot(torch.arange(40) % 16, 16)[:, None].double()
    rows *= torch.linspace(0.01, 1, 40)[:, None, None]
    steps = [release(mechanism, rows, number=number).norm().item() for number in range(1, 80)]
    assert mechanism.max_grad_norm == pytest.approx(20, rel=0.1)
    assert steps[0] == pytest.approx(0.1 / 4, rel=0.05)
    assert (steps[-1] <= steps[0]) == keeps
    unit = 0.1 if keeps else mechanism.max_grad_norm
    noise = release(mechanism, rows, noise_multiplier=1e3, number=80).std().item() / (1e3 / 40 * unit)
    assert 0.2 < noise < 2.5  # sixteen coordinates


def test_no_rows_leave_the_norm_to_the_noise_alone():
    """An empty batch says 'half are within', plus noise; it must not crash, nor divide by the realised size."""
    mechanism = AdaptiveGaussian(initial_norm=1.0)
    release(mechanism, torch.zeros(0, 1, 16))
    assert mechanism.max_grad_norm == pytest.approx(1.0)


def test_one_noisy_release_cannot_throw_the_norm_far():
    mechanism = AdaptiveGaussian(initial_norm=1.0)
    release(mechanism, torch.zeros(1, 1, 16), noise_multiplier=1e9)
    assert math.exp(-0.1) - 1e-9 <= mechanism.max_grad_norm <= math.exp(0.1) + 1e-9


def test_a_row_that_is_not_finite_sends_nothing_at_all():
    rows = torch.ones(3, 1, 16)
    rows[0, 0, 3], rows[1, 0, 4] = math.nan, -math.inf
    encoded = AdaptiveGaussian().encode(rows, spec(), context(3))
    assert torch.equal(encoded[:2], torch.zeros(2, 1, 17).double())
    assert encoded[2].abs().sum() > 0


def test_an_uncentred_indicator_would_break_the_bound():
    """The broken twin of the published implementations: the count is sent as 0 or 1 but charged as +-1/2."""

    class Uncentred:
        def encode(self, rows):
            encoded = AdaptiveGaussian(quantile_share=0.5).encode(rows, spec(), context(len(rows)))
            encoded[..., -1] += math.sqrt(0.5)
            return encoded

    norms = Uncentred().encode(adversarial_rows(spec())).flatten(1).norm(dim=1)
    assert norms.max() > 1.0 + 1e-6


def test_the_norm_survives_a_checkpoint():
    mechanism, other = AdaptiveGaussian(), AdaptiveGaussian()
    release(mechanism, torch.ones(40, 1, 16))
    other.load_state_dict(mechanism.state_dict())
    assert other.max_grad_norm == mechanism.max_grad_norm != other.initial_norm
    assert other.describe()["max_grad_norm"] == mechanism.max_grad_norm


@pytest.mark.parametrize("keeps", [True, False])
def test_public_rows_are_compared_at_the_norm_of_the_release(keeps):
    """The same rows released and public: at C of the next release they would differ by the step of C, a tenth here."""
    mechanism = AdaptiveGaussian(initial_norm=1.0, keep_step_size=keeps)
    rows = torch.linspace(0.1, 0.6, 40).double()[:, None, None].expand(40, 1, 16)
    for number in (1, 2):
        released = release(mechanism, rows, number=number)
        coming = mechanism.max_grad_norm
        with mechanism.as_released():
            assert mechanism.max_grad_norm != coming
            total = mechanism.encode(rows, spec(), context(len(rows))).sum(0, dtype=torch.float64)
            public = mechanism.reference(total, plan(), release_number=number, public_seed=0)
        torch.testing.assert_close(public, released)
        assert mechanism.max_grad_norm == coming


def test_a_checkpoint_of_another_mechanism_is_refused():
    with pytest.raises(ConfigurationError, match="does not adapt"):
        Gaussian().load_state_dict(AdaptiveGaussian().state_dict())
    with pytest.raises(ConfigurationError, match="Resume with the mechanism"):
        AdaptiveGaussian().load_state_dict({})
    Gaussian().load_state_dict(Gaussian().state_dict())


@pytest.mark.parametrize("norm", [0.0, -0.5, math.nan, math.inf, 1e-200, True, "0.1", None])
def test_a_norm_that_no_run_reaches_is_refused(norm):
    """A checkpoint that was written by hand, or by a broken program."""
    mechanism = AdaptiveGaussian()
    with pytest.raises(ConfigurationError, match="was changed after it was saved"):
        mechanism.load_state_dict({"max_grad_norm": norm})
    assert mechanism.max_grad_norm == mechanism.initial_norm


@pytest.mark.parametrize("norm", [0.0, -0.5, math.nan])
def test_at_such_a_norm_one_record_would_take_the_whole_release_along(norm):
    """Why: the broken twin takes it over, and a record without a gradient makes the sum NaN, or reaches too far."""
    mechanism = AdaptiveGaussian()
    mechanism._norm = norm
    encoded = mechanism.encode(torch.zeros(1, 1, 16), spec(), context(1))
    assert not bool(encoded.norm() <= 1)


def test_several_vectors_a_row_and_teachers_are_refused():
    teachers = ContributionSpec.teachers(num_teachers=4, vectors_per_row=1, vector_dim=4)
    with pytest.raises(ConfigurationError, match="no proof for teacher"):
        AdaptiveGaussian().check(teachers)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"initial_norm": 0.0}, "initial_norm > 0"),
        ({"adaptation_rate": math.inf}, "adaptation_rate > 0"),
        ({"target_quantile": 1.0}, "target_quantile < 1"),
        ({"quantile_share": 0.0}, "0 < mechanism.quantile_share"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigurationError, match=words):
        AdaptiveGaussian(**options)

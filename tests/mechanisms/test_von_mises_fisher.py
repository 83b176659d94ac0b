import math

import numpy as np
import pytest
import torch
from dp_accounting import NeighboringRelation
from scipy import stats

from callbacks.gradient_privatizer import run_summary
from lightning_dp.accounting import Sampling, calibrate_noise_multiplier, compute_epsilon
from lightning_dp.accounting.bessel import mean_resultant_length
from lightning_dp.accounting.events import GaussianRelease, VonMisesFisherRelease, ZCDPRelease
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import ConfigurationError, PrivacyProtocolError
from lightning_dp.gradients.teachers import RowChunk
from lightning_dp.mechanisms.base import ContributionSpec, ReleasePlan
from lightning_dp.mechanisms.noise import NoiseSource
from lightning_dp.mechanisms.von_mises_fisher import VonMisesFisher
from lightning_dp.modules.release import PublicRows, ReleaseSession
from tests.conftest import tiny_discriminator_gan, tiny_gan
from tests.contracts.mechanism import MechanismContract, context
from tests.mechanisms.test_sphere import angle_cdf

ADD_REMOVE = NeighboringRelation.ADD_OR_REMOVE_ONE
REPLACE = NeighboringRelation.REPLACE_ONE
ZERO_OUT = NeighboringRelation.REPLACE_SPECIAL


def teachers(num_teachers: int = 4, q: int = 1, d: int = 8) -> ContributionSpec:
    return ContributionSpec.teachers(num_teachers=num_teachers, vectors_per_row=q, vector_dim=d)


def plan_for(spec, noise_multiplier=2.0, relation=REPLACE) -> ReleasePlan:
    return ReleasePlan(spec=spec, relation=relation, noise_multiplier=noise_multiplier)


class TestCentral(MechanismContract):
    def make(self):
        return VonMisesFisher(max_grad_norm=0.7)

    def check_other_event(self, mechanism, plan, event):
        """The cosine to a known sum has the law of lambda |s|, with the lambda that the event is charged for."""
        assert isinstance(event, ZCDPRelease)
        spec = plan.spec
        dim, sensitivity = spec.num_vectors * spec.vector_dim, mechanism.l2_sensitivity(spec, plan.relation)
        charged = math.sqrt(2 * dim * event.rho) / sensitivity  # rho = lambda^2 sensitivity^2 / (2 D)
        total = torch.randn(spec.num_vectors, spec.vector_dim, dtype=torch.float64)
        total *= 6 * math.sqrt(dim) / (charged * total.norm())
        noise, mean = NoiseSource(insecure_seed=1), total / total.norm()
        angles = []
        for number in range(1, 1001):
            drawn = mechanism.perturb(total, plan, noise, release_number=number)
            assert drawn.norm().item() == pytest.approx(1.0)
            angles.append(math.acos((drawn * mean).sum().item()))
        assert stats.kstest(angles, angle_cdf(dim, 6 * math.sqrt(dim))).pvalue > 1e-5
        for wrong in (0.9, 1.1):  # a sensitivity, dimension or clipping norm that the event forgot
            assert stats.kstest(angles, angle_cdf(dim, wrong * 6 * math.sqrt(dim))).pvalue < 1e-5

    def noise_of(self, mechanism, plan):
        """A direction drawn for a sum of zero, in a release of the planned size."""
        spec = ContributionSpec.teachers(num_teachers=40, vectors_per_row=3000, vector_dim=16)
        total = torch.zeros(3000, 16, dtype=torch.float64)
        return mechanism.perturb(total, plan_for(spec), NoiseSource(), release_number=1)


class TestCentralUnitRenyi(TestCentral):
    def make(self):
        return VonMisesFisher(clipping="unit", charge="renyi")

    def check_other_event(self, mechanism, plan, event):
        assert isinstance(event, VonMisesFisherRelease)
        assert (event.dim, event.num_draws, event.is_centred) == (48, 1, False)
        plain = VonMisesFisher(clipping="unit").step_event(plan)
        assert event.rho == pytest.approx(plain.rho)
        super().check_other_event(mechanism, plan, plain)


class TestPerUnit(MechanismContract):
    def make(self):
        return VonMisesFisher(max_grad_norm=1.3, form="per_unit", charge="renyi")

    def spec_for(self, relation):
        spec = super().spec_for(relation)
        if any(change.num_toggled for change in spec.alternatives(relation)):
            with pytest.raises(ConfigurationError, match="its direction would be seen"):
                self.make().step_event(plan_for(spec, relation=relation))
            pytest.skip("refused: a row that appears would be seen")
        return spec

    def check_other_event(self, mechanism, plan, event):
        """Each vector of each row has the law of lambda |clipped vector|, independent of all others."""
        assert isinstance(event, VonMisesFisherRelease)
        assert (event.dim, event.num_draws, event.is_centred) == (16, 3, True)
        assert event.rho == pytest.approx(VonMisesFisher(form="per_unit").step_event(plan).rho)
        plan = plan_for(plan.spec, 0.2, plan.relation)  # sure directions show their concentration in few draws
        event = mechanism.step_event(plan)
        row = torch.randn(1, 3, 16, dtype=torch.float64)
        row *= 1.3 / row.norm(dim=-1, keepdim=True)
        drawn = mechanism.perturb_rows(row.expand(1000, 3, 16), plan, context(1000))
        angles = torch.arccos((drawn * row / 1.3).sum(-1)).flatten()
        charged = event.distance / 2
        assert stats.kstest(angles, angle_cdf(16, charged)).pvalue > 1e-5
        for wrong in (0.9, 1.1):
            assert stats.kstest(angles, angle_cdf(16, wrong * charged)).pvalue < 1e-5
        correlation = np.corrcoef(drawn[:, 0, 0], drawn[:, 1, 0])[0, 1]
        assert abs(correlation) < 5 / 1000**0.5

    def noise_of(self, mechanism, plan):
        return mechanism.perturb_rows(torch.zeros(1000, 3, 16, dtype=torch.float64), plan, context(1000, seed=None))


@pytest.mark.parametrize("form", ["central", "per_unit"])
@pytest.mark.parametrize("noise_multiplier", [0.3, 1.0, 17.0])
def test_priced_like_the_gaussian_of_the_same_noise_multiplier(form, noise_multiplier):
    """rho = 1 / (2 z^2), whatever bound, dimension and relation."""
    for spec in (teachers(q=5, d=30), ContributionSpec.records(expected_batch_size=8, vector_dim=30)):
        mechanism = VonMisesFisher(max_grad_norm=0.2, form=form)
        plan = plan_for(spec, noise_multiplier)
        event = mechanism.step_event(plan)
        assert event == ZCDPRelease(rho=1 / (2 * noise_multiplier**2))
        gaussian = GaussianRelease(noise_std=noise_multiplier, l2_sensitivity=1.0)
        assert event.rho == pytest.approx(gaussian.mu**2 / 2)
        curve = VonMisesFisher(max_grad_norm=0.2, form=form, charge="renyi").step_event(plan)
        assert curve.rho == pytest.approx(event.rho)
        epsilons = [
            compute_epsilon({(e, Sampling(scheme="full")): 3}, delta=1e-5, relation="replace_one").epsilon
            for e in (gaussian, curve, event)
        ]
        assert epsilons[1] <= epsilons[2]  # the Renyi curve is never above zCDP


def test_directions_of_the_same_price_are_as_good_as_gaussian_noise():
    """Mean and error of the decoded sum agree with Gaussian noise of the same multiplier in a large release."""
    spec = teachers(num_teachers=10, q=20, d=50)
    mechanism, plan = VonMisesFisher(), plan_for(spec)
    total = torch.randn(20, 50, dtype=torch.float64)
    total *= 40 / total.norm()
    noise_std = mechanism.noise_std(plan)
    released = torch.stack(
        [
            mechanism.release(total, plan, NoiseSource(insecure_seed=2), release_number=n, public_seed=0).double()
            for n in range(1, 301)
        ]
    )
    shrunk = float(mean_resultant_length(1000, mechanism.concentration(plan) * 40)) * noise_std * 1000**0.5 / 40
    assert 0.95 < shrunk < 1
    slope = (released * total / 10).sum((1, 2)) / (total / 10).square().sum()
    assert slope.mean().item() == pytest.approx(shrunk, abs=5 * noise_std / 40 / 300**0.5)
    errors = (released - shrunk * total / 10).square().mean().sqrt().item() * 10
    assert errors == pytest.approx(noise_std, rel=0.02)


def test_reference_of_public_rows_is_the_mean_of_a_release():
    spec = teachers(num_teachers=2, q=2, d=6)
    total = torch.randn(2, 6, dtype=torch.float64)
    mechanism, plan = VonMisesFisher(max_grad_norm=3.0), plan_for(spec, 0.2)
    expected = torch.stack(
        [
            mechanism.release(total, plan, NoiseSource(insecure_seed=2), release_number=n, public_seed=0)
            for n in range(1, 2001)
        ]
    )
    reference = mechanism.reference(total, plan, release_number=1, public_seed=0)
    error = (expected.mean(0) - reference).abs() / (expected.std(0) / 2000**0.5)
    assert error.max() < 5
    zero = mechanism.reference(torch.zeros_like(total), plan, release_number=1, public_seed=0)
    assert zero.abs().max() == 0


class TestLocalNoise:
    """Each row's own draws: never shared with public rows, nor between rows."""

    def session(self, form, noise):
        spec = teachers(num_teachers=4, q=2, d=6)
        session = ReleaseSession(
            mechanism=VonMisesFisher(form=form, clipping="unit"),
            plan=plan_for(spec, 1.0),
            ledger=PrivacyLedger({"relation": "replace_one", "unit": "record"}, None),
            sampling=Sampling(scheme="full"),
            noise=noise,
            public_seed=0,
            may_release=lambda event, sampling: None,
        )
        session.begin_step()
        return session

    def chunk(self, rows):
        return [RowChunk(teacher_ids=torch.arange(len(rows)), values=rows, queries=slice(0, 2))]

    @pytest.mark.parametrize("form", ["central", "per_unit"])
    def test_public_rows_never_meet_the_noise_of_private_ones(self, form):
        """With shared draws, the difference that repulsion takes would cancel the noise."""
        rows, device = torch.randn(4, 2, 6), torch.device("cpu")
        references = []
        for _ in range(2):
            session = self.session(form, NoiseSource())
            number = session.release(self.chunk(rows), (2, 6), device).number
            references.append(
                session.reference(PublicRows(self.chunk(rows)), (2, 6), device, number=number, num_rows=4)
            )
        assert torch.equal(*references)

    def test_draws_depend_on_the_row_and_not_on_the_chunk(self):
        mechanism, plan = VonMisesFisher(form="per_unit"), plan_for(teachers(q=2, d=6), 1.0)
        rows = torch.randn(6, 2, 6, dtype=torch.float64)
        noise = context(6).noise
        whole = mechanism.perturb_rows(rows, plan, context(6))
        ids = torch.tensor([4, 1])
        part_context = context(2, ids=ids)
        assert torch.equal(whole[ids], mechanism.perturb_rows(rows[ids], plan, part_context))
        assert len(whole[:, :, 0].flatten().unique()) == 12
        other = mechanism.perturb_rows(rows, plan, context(6, release_number=2))
        assert (whole != other).all()
        assert isinstance(noise, NoiseSource)

    def test_rows_of_one_id_are_refused(self):
        mechanism, plan = VonMisesFisher(form="per_unit"), plan_for(teachers(q=2, d=6))
        with pytest.raises(PrivacyProtocolError, match="2 different row ids, got 1"):
            mechanism.perturb_rows(torch.zeros(2, 2, 6), plan, context(2, ids=torch.zeros(2, dtype=torch.int64)))

    def test_a_silent_teacher_sends_a_uniform_direction(self):
        mechanism, plan = VonMisesFisher(form="per_unit"), plan_for(teachers(q=2000, d=3), 0.01)
        sent = mechanism.perturb_rows(torch.zeros(1, 2000, 3, dtype=torch.float64), plan, context(1))
        assert stats.kstest((sent[0, :, 2] + 1) / 2, "uniform").pvalue > 1e-5
        torch.testing.assert_close(sent.norm(dim=-1), torch.ones(1, 2000, dtype=torch.float64))

    def test_decoding_is_unbiased_for_rows_on_the_bound(self):
        mechanism, spec = VonMisesFisher(max_grad_norm=2.0, clipping="unit", form="per_unit"), teachers(3000, d=5)
        plan = plan_for(spec, 0.5)
        row = torch.tensor([1.0, -2.0, 0.0, 0.0, 0.5])
        encoded = mechanism.encode(row.expand(3000, 1, 5), spec, context(3000))
        total = mechanism.perturb_rows(encoded, plan, context(3000)).sum(0)
        released = mechanism.release(total, plan, NoiseSource(), release_number=1, public_seed=0)[0]
        torch.testing.assert_close(released, 2 * row / row.norm(), atol=0.2, rtol=0)


class TestWhatIsRefused:
    def test_local_form_where_rows_appear_or_disappear(self):
        mechanism = VonMisesFisher(form="per_unit")
        records = ContributionSpec.records(expected_batch_size=4, vector_dim=7)
        mechanism.check(records)
        mechanism.step_event(plan_for(records, relation=REPLACE))
        for relation in (ADD_REMOVE, ZERO_OUT):
            with pytest.raises(ConfigurationError, match="its direction would be seen"):
                mechanism.step_event(plan_for(records, relation=relation))

    def test_local_form_where_the_records_decide_who_speaks(self):
        spec = ContributionSpec.class_wise_teachers(
            num_teachers=3,
            num_classes=2,
            images_per_class=2,
            vector_dim=5,
            single_record=True,
        )
        VonMisesFisher().check(spec)
        with pytest.raises(ConfigurationError, match="every row would be seen"):
            VonMisesFisher(form="per_unit").check(spec)
        with pytest.raises(ConfigurationError, match="every row would be seen"):
            VonMisesFisher(form="per_unit").check(ContributionSpec.joint(num_vectors=2, vector_dim=4))

    def test_one_number_has_no_direction(self):
        with pytest.raises(ConfigurationError, match="at least two numbers"):
            VonMisesFisher().check(ContributionSpec.records(expected_batch_size=4, vector_dim=1))

    def test_a_release_of_another_size_than_planned(self):
        with pytest.raises(PrivacyProtocolError, match="planned for another dimension"):
            VonMisesFisher().release(
                torch.zeros(2, 8), plan_for(teachers()), NoiseSource(), release_number=1, public_seed=0
            )

    @pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
    def test_bad_bounds(self, bound):
        with pytest.raises(ConfigurationError, match="max_grad_norm > 0"):
            VonMisesFisher(max_grad_norm=bound)


def test_unit_clipping_scales_every_vector_to_the_bound():
    rows = torch.tensor([[[3.0, 4.0]], [[1e-20, 0.0]], [[0.0, 0.0]], [[math.nan, 1.0]]])
    encoded = VonMisesFisher(max_grad_norm=2.0, clipping="unit").encode(rows, teachers(d=2), context(4))
    expected = torch.tensor([[[1.2, 1.6]], [[2.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.0]]], dtype=torch.float64)
    torch.testing.assert_close(encoded, expected, rtol=2e-6, atol=0)


class TestStatements:
    def test_metric_constant_bounds_the_log_likelihood_ratio(self):
        """Brute force: density ratios of two sums, at the worst direction, against the stated factor times distance."""
        mechanism, plan = VonMisesFisher(), plan_for(teachers(q=1, d=3), 0.4)
        concentration = mechanism.concentration(plan)
        (metric,) = mechanism.other_statements(plan)
        assert f"at most {2 * concentration:.6g} times" in metric
        assert "not an (epsilon, delta)" in metric
        stream = np.random.default_rng(0)
        worst = 0.0
        for _ in range(500):
            first, second = stream.standard_normal((2, 3)) * 10 ** stream.uniform(-1, 1.5, (2, 1))
            distance = np.linalg.norm(first - second)
            norms = concentration * np.array([np.linalg.norm(first), np.linalg.norm(second)])
            normaliser = np.log(np.sinh(norms) / norms)  # d = 3
            ratio = concentration * distance + normaliser[1] - normaliser[0]
            worst = max(worst, ratio / distance)
        assert concentration < worst <= 2 * concentration

    def test_local_statement_of_the_published_form(self):
        """One unit gradient of d numbers: 2 kappa^2 / d zCDP, 2 kappa pure, kappa metric (mechanisms (d))."""
        kappa, dim = 100.0, 10_000
        mechanism = VonMisesFisher(clipping="unit", form="per_unit")
        spec = ContributionSpec.records(expected_batch_size=4, vector_dim=dim)
        plan = plan_for(spec, math.sqrt(dim) / (2 * kappa))
        assert mechanism.concentration(plan) == pytest.approx(kappa)
        assert mechanism.step_event(plan).rho == pytest.approx(2.0)
        metric, local = mechanism.other_statements(plan)
        assert "; 100 times for vectors other than zero" in metric
        assert "2-zCDP" in local
        assert "at most 200" in local


def test_runs_with_class_wise_and_with_discriminator_teachers(run_tiny):
    for module, mechanism in (
        (tiny_gan(), VonMisesFisher()),
        (tiny_discriminator_gan(), VonMisesFisher(clipping="unit", form="per_unit", charge="renyi")),
    ):
        _, privatizer, accountant, _ = run_tiny(module=module, mechanism=mechanism)
        assert len(accountant.ledger) == 5
        claim = accountant.claim()
        assert claim.accountant == "rdp"
        assert claim.epsilon == pytest.approx(5.0, rel=1e-3)
        assert privatizer.mechanism is mechanism


def test_the_run_card_carries_the_statements_only_while_the_noise_is_secret(run_tiny):
    _, privatizer, _, _ = run_tiny(mechanism=VonMisesFisher())
    assert run_summary(privatizer)["other_statements"][0].startswith("Metric privacy, not an (epsilon, delta)")
    _, privatizer, _, _ = run_tiny(mechanism=VonMisesFisher(), insecure_seed=1)
    assert "other_statements" not in run_summary(privatizer)


@pytest.mark.parametrize("relation", [ADD_REMOVE, REPLACE])
def test_poisson_sampling_is_accepted_and_earns_nothing(relation):
    mechanism, spec = VonMisesFisher(), ContributionSpec.records(expected_batch_size=8, vector_dim=500)
    noise = {
        sampling.scheme: calibrate_noise_multiplier(
            target_epsilon=3.0,
            target_delta=1e-5,
            num_releases=50,
            make_event=lambda z: mechanism.step_event(plan_for(spec, z, relation)),
            sampling=sampling,
            relation=relation,
        )
        for sampling in (Sampling(scheme="full"), Sampling(scheme="poisson", rate=0.01))
    }
    assert noise["poisson"] == pytest.approx(noise["full"], rel=1e-4)

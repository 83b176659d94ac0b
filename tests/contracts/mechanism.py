"""What every mechanism promises; its test class inherits `MechanismContract` and names its instances."""

import math
from abc import ABC, abstractmethod

import numpy as np
import pytest
import torch
from dp_accounting import NeighboringRelation
from scipy import special, stats

from lightning_dp.accounting.events import AdditiveRelease, ReleaseEvent
from lightning_dp.errors import ConfigurationError, PrivacyProtocolError
from lightning_dp.mechanisms.base import ContributionSpec, EncodeContext, Mechanism, ReleasePlan
from lightning_dp.mechanisms.noise import NoiseSource

RELATIONS = list(NeighboringRelation)


def context(
    num_rows: int, *, release_number: int = 1, seed: int | None = 0, ids: torch.Tensor | None = None
) -> EncodeContext:
    return EncodeContext(
        release_number=release_number,
        public_seed=3,
        noise=NoiseSource(insecure_seed=seed),
        row_ids=torch.arange(num_rows) if ids is None else ids,
    )


def adversarial_rows(spec: ContributionSpec) -> torch.Tensor:
    """Rows that try to leave the bound: huge, tiny, one-hot, equal, zero, NaN, infinite, random."""
    generator = torch.Generator().manual_seed(0)
    q, d = spec.vectors_per_row, spec.vector_dim
    one_hot = torch.zeros(q, d)
    one_hot[:, 0] = 1e30
    broken = torch.ones(q, d)
    broken[0, 0] = math.nan
    infinite = torch.ones(q, d)
    infinite[-1, -1] = -math.inf
    special = [torch.full((q, d), value) for value in (0.0, 1.0, -1e30, 1e-30)] + [one_hot, broken, infinite]
    scales = 10.0 ** torch.randint(-20, 20, (500, 1, 1), generator=generator)
    return torch.cat([torch.stack(special), torch.randn(500, q, d, generator=generator) * scales])


def check_whole_law(drawn: np.ndarray, scale: float, kind: str) -> None:
    """Check draws against the exact law of a scale, and see that other scales are rejected."""
    spread = np.random.default_rng(0).uniform(size=drawn.shape)

    def p_value(scale: float) -> float:
        if kind == "discrete_gaussian" and scale < 1e3:
            support = np.arange(-int(40 * scale) - 2, int(40 * scale) + 3)
            masses = np.exp(-(support**2) / (2 * scale**2))
            below = np.concatenate([[0.0], np.cumsum(masses / masses.sum())])
            low, high = (below[(drawn - support[0]).astype(int).clip(0, len(support) - 1) + more] for more in (0, 1))
        else:  # beyond, the two laws differ by less than 1e-6 of a mass
            low, high = special.ndtr((drawn - 0.5) / scale), special.ndtr((drawn + 0.5) / scale)
        # A uniform place within the cell of a whole number makes the whole uniform.
        return float(stats.kstest(low + spread * (high - low), "uniform").pvalue)

    assert p_value(scale) > 1e-6
    for wrong in (2 / 3, 0.95, 1.05, 3 / 2):
        assert p_value(scale * wrong) < 1e-6


class MechanismContract(ABC):
    """Bound, event, noise and refusals of one mechanism."""

    @abstractmethod
    def make(self) -> Mechanism: ...

    def spec(self) -> ContributionSpec:
        return ContributionSpec.teachers(num_teachers=40, vectors_per_row=3, vector_dim=16)

    def spec_for(self, relation: NeighboringRelation) -> ContributionSpec:
        """The spec of the tests; records, as long, where it has no proof under the relation."""
        spec, mechanism = self.spec(), self.make()
        if relation in spec.changes:
            return spec
        if "record" not in mechanism.kinds:
            with pytest.raises(ConfigurationError, match="no proof"):
                mechanism.l2_sensitivity(spec, relation)
            pytest.skip(f"refused: {type(mechanism).__name__} takes teachers only, which have no proof here")
        return ContributionSpec.records(expected_batch_size=40, vector_dim=spec.num_vectors * spec.vector_dim)

    def plan(self, relation: NeighboringRelation = NeighboringRelation.REPLACE_ONE) -> ReleasePlan:
        return ReleasePlan(spec=self.spec_for(relation), relation=relation, noise_multiplier=2.0)

    def test_encoded_rows_stay_within_the_bound(self):
        mechanism, spec = self.make(), self.spec()
        rows = adversarial_rows(spec)
        encoded = mechanism.encode(rows, spec, context(len(rows))).to(torch.float64)
        assert torch.isfinite(encoded).all()
        norms = torch.linalg.vector_norm(encoded.flatten(1), dim=1)
        assert norms.max() <= mechanism.row_bound(spec)

    @pytest.mark.parametrize("relation", RELATIONS)
    def test_neighbours_move_the_sum_at_most_by_the_sensitivity(self, relation):
        mechanism, spec = self.make(), self.spec_for(relation)
        rows = adversarial_rows(spec)
        encoded = mechanism.encode(rows, spec, context(len(rows), ids=torch.zeros(len(rows), dtype=torch.int64)))
        encoded = encoded.to(torch.float64).flatten(1)
        # The row that a step touches may be any of these in either world, or absent; the others are the same in both.
        changed, toggled = torch.cdist(encoded, encoded).max().item(), encoded.norm(dim=1).max().item()
        for step in spec.alternatives(relation):
            worst = math.hypot(*[changed] * step.num_replaced, *[toggled] * step.num_toggled)
            assert worst <= mechanism.l2_sensitivity(spec, relation) * (1 + 1e-9)

    def test_what_is_perturbed_moves_at_most_by_bound_and_diameter(self):
        """A function of the sum is perturbed, so the bounds must hold for it beside any other rows."""
        mechanism, spec = self.make(), self.spec()
        rows = adversarial_rows(spec)
        encoded = mechanism.encode(rows, spec, context(len(rows))).to(torch.float64)
        generator = torch.Generator().manual_seed(1)
        bound, diameter = mechanism.row_bound(spec), mechanism.row_diameter(spec)
        assert bound <= diameter <= 2 * bound
        for num_others in (0, 1, 7, 39):
            others = encoded[torch.randperm(len(encoded), generator=generator)[:num_others]].sum(0)
            without = mechanism.measure(others, spec).flatten()
            worlds = torch.stack([mechanism.measure(others + row, spec).flatten() for row in encoded])
            assert (worlds - without).norm(dim=1).max() <= bound * (1 + 1e-9)
            assert torch.cdist(worlds, worlds).max() <= diameter * (1 + 1e-9)

    def test_other_noise_has_another_event(self):
        """Only the noise of the base class backs an event of additive noise."""
        mechanism = self.make()
        inherits = all(
            getattr(type(mechanism), name) is getattr(Mechanism, name) for name in ("perturb", "perturb_rows")
        )
        assert inherits == isinstance(mechanism.step_event(self.plan()), AdditiveRelease)

    def test_chunking_changes_nothing(self):
        mechanism, spec = self.make(), self.spec()
        rows = adversarial_rows(spec)
        whole = mechanism.encode(rows, spec, context(len(rows))).sum(0, dtype=mechanism.total_dtype)
        parts = torch.zeros_like(whole)
        for ids in torch.arange(len(rows)).split(37):
            parts += mechanism.encode(rows[ids], spec, context(len(ids), ids=ids)).sum(0, dtype=mechanism.total_dtype)
        if mechanism.total_dtype == torch.float64 and mechanism.noise == "gaussian":
            torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(parts, whole)

    def test_a_row_scaling_says_what_encode_does(self):
        """Rows that are never formed must be treated as those that are; the broken twins forget a part."""
        mechanism = self.make()
        if "record" not in mechanism.kinds:
            pytest.skip("takes no per-record gradients")
        spec = ContributionSpec.records(expected_batch_size=40, vector_dim=16, segments=(10, 6))
        rows = adversarial_rows(spec)
        norms = torch.linalg.vector_norm(rows[:, 0].double(), dim=-1)
        scaling = mechanism.row_scaling(norms, spec)
        if scaling is None:
            return
        assert type(mechanism).perturb_rows is Mechanism.perturb_rows
        assert type(mechanism).public_basis is Mechanism.public_basis
        scaled = scaling.weights[:, None] * torch.where(torch.isfinite(norms)[:, None], rows[:, 0].double(), 0.0)
        parts = [scaled] if scaling.appended is None else [scaled, scaling.appended]
        encoded = mechanism.encode(rows, spec, context(len(rows))).double()[:, 0]
        torch.testing.assert_close(torch.cat(parts, dim=1), encoded, rtol=1e-12, atol=0)
        assert torch.equal(scaling.weights == 0, ~torch.isfinite(norms))
        # Norms that are a little too large keep every row within its bound.
        above = mechanism.row_scaling(norms * 1.001, spec)
        assert above is not None
        parts[0] = scaled * (above.weights / scaling.weights.clamp(min=1e-300))[:, None]
        assert torch.cat(parts, dim=1).norm(dim=1).max() <= mechanism.row_bound(spec)

    def test_no_rows_release_pure_noise(self):
        mechanism, spec = self.make(), self.spec()
        empty = torch.zeros(0, spec.vectors_per_row, spec.vector_dim)
        encoded = mechanism.encode(empty, spec, context(0))
        assert encoded.sum(0).abs().sum() == 0

    @pytest.mark.parametrize("relation", RELATIONS)
    def test_event_states_the_noise_that_is_drawn(self, relation):
        mechanism, plan = self.make(), self.plan(relation)
        event = mechanism.step_event(plan)
        if not isinstance(event, AdditiveRelease):
            self.check_other_event(mechanism, plan, event)
            return
        assert event.noise_std == pytest.approx(2.0 * mechanism.l2_sensitivity(plan.spec, relation))
        assert event.l2_sensitivity == pytest.approx(mechanism.l2_sensitivity(plan.spec, relation))
        drawn = self.noise_of(mechanism, plan)
        low, high = (stats.chi2.ppf([5e-6, 1 - 5e-6], drawn.numel()) / drawn.numel()) ** 0.5 * event.noise_std
        assert low < drawn.square().mean().sqrt() < high
        # The same test must reject noise that is off by the world size, or a variance taken for a std.
        for wrong in (drawn / 2**0.5, drawn * 2**0.5, drawn * 1.1):
            assert not low < wrong.square().mean().sqrt() < high
        if event.is_exact:
            step = mechanism.grid_step(plan.spec)
            whole = (drawn / step).round()
            torch.testing.assert_close(whole * step, drawn, rtol=1e-15, atol=0)
            check_whole_law(whole.flatten().numpy(), event.noise_std / step, event.kind)
        else:
            assert stats.kstest(drawn.flatten() / event.noise_std, "norm").pvalue > 1e-6

    def test_whole_noise_meets_whole_rows(self):
        """Noise in whole numbers hides whole numbers only; a row beside the grid must stop the release."""
        mechanism, spec = self.make(), self.spec()
        if mechanism.noise == "gaussian":
            assert not mechanism.step_event(self.plan()).is_exact
            return
        rows = adversarial_rows(spec)
        total = mechanism.encode(rows, spec, context(len(rows))).sum(0, dtype=mechanism.total_dtype)
        measured = mechanism.measure(total.double(), spec)
        steps = measured / mechanism.grid_step(spec)
        assert (steps - steps.round()).abs().max() < 1e-6
        assert mechanism.step_event(self.plan()).is_exact
        with pytest.raises(PrivacyProtocolError, match="beside the grid"):
            mechanism.perturb(measured + mechanism.grid_step(spec) / 3, self.plan(), NoiseSource(), release_number=1)

    def check_other_event(self, mechanism: Mechanism, plan: ReleasePlan, event: ReleaseEvent) -> None:
        """Check an event that is not Gaussian against what is drawn; such a mechanism's tests must say how."""
        pytest.fail(f"No check of {event} against the draws of {mechanism}.")

    def noise_of(self, mechanism: Mechanism, plan: ReleasePlan) -> torch.Tensor:
        """The noise itself: what `decode` is handed when the clean sum is zero."""
        drawn: list[torch.Tensor] = []

        class Spy:
            decode = staticmethod(lambda noisy, *_: drawn.append(noisy) or noisy)

        total = torch.zeros(100_000 // mechanism.encoded_dim(plan.spec), mechanism.encoded_dim(plan.spec))
        original = type(mechanism).decode
        try:
            type(mechanism).decode = lambda self, noisy, *rest: Spy.decode(noisy)
            mechanism.release(total.to(mechanism.total_dtype), plan, NoiseSource(), release_number=1, public_seed=0)
        finally:
            type(mechanism).decode = original
        (noisy,) = drawn
        return noisy

    def test_release_adds_noise_exactly_once_and_never_the_same(self):
        mechanism, plan = self.make(), self.plan()
        first, second = self.noise_of(mechanism, plan), self.noise_of(mechanism, plan)
        assert not torch.equal(first, second)
        correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
        assert abs(correlation) < 5 / first.numel() ** 0.5

    def test_release_has_the_public_shape_and_type(self):
        mechanism, plan = self.make(), self.plan()
        total = torch.zeros(3, mechanism.encoded_dim(self.spec()), dtype=mechanism.total_dtype)
        released = mechanism.release(total, plan, NoiseSource(), release_number=1, public_seed=0)
        assert released.shape == (3, 16)
        assert released.dtype == torch.float32
        assert torch.isfinite(released).all()

    def test_unsupported_contributions_are_refused_in_words(self):
        mechanism = self.make()
        for spec in (
            ContributionSpec.joint(num_vectors=2, vector_dim=4),
            ContributionSpec.records(expected_batch_size=8, vector_dim=16),
        ):
            if spec.kind not in mechanism.kinds:
                with pytest.raises(ConfigurationError, match="no proof"):
                    mechanism.check(spec)

    def test_a_relation_without_proof_is_refused(self):
        """A record that leaves shifts positions and batch sizes, so no partition of teachers bounds it."""
        class_wise = ContributionSpec.class_wise_teachers(
            num_teachers=4, num_classes=2, images_per_class=1, vector_dim=4, single_record=True
        )
        for spec in (ContributionSpec.teachers(num_teachers=4, vectors_per_row=1, vector_dim=4), class_wise):
            with pytest.raises(ConfigurationError, match=r"no proof.*stable record ids and a batch size"):
                self.make().l2_sensitivity(spec, NeighboringRelation.ADD_OR_REMOVE_ONE)

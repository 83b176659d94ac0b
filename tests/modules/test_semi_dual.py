import copy

import pytest
import torch
from dp_accounting import NeighboringRelation

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.events import GaussianRelease, Sampling
from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.poisson import PoissonSampler
from lightning_dp.gradients.record_gradients import rows_of
from lightning_dp.losses.semi_dual import balanced_potentials
from lightning_dp.mechanisms.adaptive import AdaptiveGaussian
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.no_privacy import NoPrivacy
from lightning_dp.mechanisms.topagg import TopAgg
from lightning_dp.mechanisms.von_mises_fisher import VonMisesFisher
from lightning_dp.modules.semi_dual import SemiDualSinkhorn
from lightning_dp.networks.basis import LowFrequencyDCT
from tests.conftest import TinyData, callbacks_for, tiny_generator, trainer_for
from tests.modules.test_sinkhorn import PRIVACY, bound

RELATIONS = {"add_or_remove_one": 1, "replace_special": 1, "replace_one": 2}  # distances in bounds
BATCH = torch.tensor([0, 3, 5, 18])


def tiny_semi_dual(cls=SemiDualSinkhorn, **options) -> SemiDualSinkhorn:
    torch.manual_seed(0)
    defaults = {"expected_batch_size": 10, "images_per_class": 3, "entropic_reg": 5.0, "learning_rate": 0.05}
    return cls(tiny_generator(), LowFrequencyDCT((1, 8, 8), 10), **{**defaults, **options})


def tiny_data(**changes) -> TinyData:
    """Data with some images replaced; the labels of `relabelled` move to the other class."""
    data = TinyData()
    data.setup()
    for record, value in changes.get("images", {}).items():
        data.train_images[record] = value
    for record in changes.get("relabelled", ()):
        data.train_labels[record] = 1 - data.train_labels[record]
    return data


def clean_sum(module, data, ids, bound_on_rows=0.5) -> torch.Tensor:
    """The sum of the clipped rows of one step with a fixed batch, before noise."""
    bound(module, data)
    with torch.no_grad():
        points, others = module.generated_points(0), module.generated_points(1)
    potentials = balanced_potentials(points, others, entropic_reg=module.entropic_reg)
    spec = module.contribution_spec()
    total = torch.zeros(spec.vector_dim, dtype=torch.float64)
    for chunk in module.record_rows(ids, points, potentials):
        for rows in rows_of(chunk):
            values = rows.values.flatten(1).double()
            total += (values * (bound_on_rows / values.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0)
    return total


def train(tmp_path, module=None, mechanism=None, data=None, max_steps=4, **privacy):
    own = callbacks_for(mechanism or Gaussian(max_grad_norm=0.5), **{**PRIVACY, **privacy})
    module = module or tiny_semi_dual()
    trainer_for(tmp_path, own, max_steps).fit(module, datamodule=data or TinyData())
    return module, own[1]


class BalancedByRecords(SemiDualSinkhorn):
    """The broken twin: potentials of the batch itself, so that a record moves the rows of all others."""

    def record_rows(self, records, points, potentials):
        targets, labels = self.record_points(records), self.labels_of(records)
        of_records = [
            balanced_potentials(points[c][None], targets[labels == c][None], entropic_reg=self.entropic_reg)
            if (labels == c).any()
            else potentials[c][None]
            for c in range(len(points))
        ]
        return super().record_rows(records, points, torch.cat(of_records))


class TestSensitivity:
    @staticmethod
    def shifts(cls=SemiDualSinkhorn, batch=BATCH, **options) -> dict[str, float]:
        """How far neighbours move the sum, in bounds, by relation."""

        def found(ids=batch, **changes):
            return clean_sum(tiny_semi_dual(cls, **options), tiny_data(**changes), ids) / 0.5

        base = found()
        gone = max(float((base - found(batch[record != batch])).norm()) for record in batch)
        joined = max(float((base - found(torch.cat([batch, torch.tensor([other])]))).norm()) for other in range(20, 40))
        far = found(torch.cat([batch, torch.tensor([39])]), images={39: 255})
        changed = [found(images={3: value}) for value in (0, 255)]
        changed += [found(images={3: 255}, relabelled=[3]), found(relabelled=[3])]
        toggled = max(gone, joined, float((base - far).norm()))
        return {
            "add_or_remove_one": toggled,
            "replace_special": toggled,
            "replace_one": max(float((base - other).norm()) for other in changed),
        }

    @pytest.mark.parametrize("reg", [0.5, 5.0, 500.0])
    def test_neighbours_stay_within_what_is_charged(self, reg):
        found = self.shifts(entropic_reg=reg)
        module, mechanism = bound(tiny_semi_dual(), TinyData()), Gaussian(max_grad_norm=0.5)
        for name, distance in RELATIONS.items():
            charged = mechanism.l2_sensitivity(module.contribution_spec(), NeighboringRelation[name.upper()])
            assert charged == pytest.approx(0.5 * distance)
            assert 0 < found[name] <= distance * (1 + 1e-9)
        assert found["add_or_remove_one"] > 0.9  # the bound is reached: a smaller one would be wrong

    def test_potentials_that_know_the_batch_are_caught(self):
        batch = torch.arange(16)
        assert self.shifts(BalancedByRecords, batch, entropic_reg=0.5)["add_or_remove_one"] > 1.2
        assert self.shifts(batch=batch, entropic_reg=0.5)["add_or_remove_one"] <= 1 + 1e-9

    def test_a_record_moves_the_images_of_its_own_class_only(self):
        module = tiny_semi_dual()
        alone = clean_sum(module, TinyData(), torch.tensor([1])).split(list(module.segments))
        assert not alone[0].any()
        assert alone[1].any()

    def test_a_row_is_equal_to_the_bit_in_every_batch(self):
        module = tiny_semi_dual()
        few = clean_sum(module, TinyData(), torch.tensor([3]))
        both = clean_sum(module, TinyData(), torch.tensor([3, 4]))  # of two classes: blocks that do not meet
        assert torch.equal(few.split(list(module.segments))[1], both.split(list(module.segments))[1])

    def test_a_broken_image_sends_nothing(self, tmp_path):
        module = tiny_semi_dual()
        module.points_of = lambda images: module.basis(images) * (float("nan") if images.shape[0] == 40 else 1.0)
        module, _ = train(tmp_path, module, max_steps=1)
        assert torch.isfinite(module.generator.means).all()


def test_points_kept_from_another_start_are_not_taken_for_these_records():
    """A run that failed before its first release may be followed by one on other records, under another ledger."""
    module, other = tiny_semi_dual(), tiny_data(images={3: 255})
    bound(module, tiny_data())
    module.record_points(BATCH)
    bound(module, other)
    module.setup("fit")
    fresh = tiny_semi_dual()
    bound(fresh, other)
    assert torch.equal(module.record_points(BATCH), fresh.record_points(BATCH))


class TestTraining:
    def test_the_ledger_holds_poisson_sampling_and_one_bound(self, tmp_path):
        module, accountant = train(tmp_path)
        (entry,) = set(accountant.ledger.counts())
        assert entry == (
            GaussianRelease(noise_std=8.0 * 0.5, l2_sensitivity=0.5),
            Sampling(scheme="poisson", rate=10 / 40),
        )
        assert module._sampler.rate == 10 / 40
        claim = accountant.claim()
        assert claim.level == "PROVED"
        assert claim.epsilon == pytest.approx(
            compute_epsilon({entry: 4}, delta=1e-5, relation="add_or_remove_one").epsilon
        )

    def test_empty_batches_are_released_and_charged(self, tmp_path, monkeypatch):
        monkeypatch.setattr(PoissonSampler, "draw", lambda self: torch.zeros(0, dtype=torch.int64))
        _, accountant = train(tmp_path)
        assert len(accountant.ledger) == 4

    def test_nothing_public_depends_on_the_records(self, tmp_path):
        seen = []

        class Spy(SemiDualSinkhorn):
            def record_rows(self, records, points, potentials):
                seen.append((points.clone(), potentials.clone()))
                yield from super().record_rows(records, points, potentials)

        for data_seed in (0, 1):
            train(tmp_path, tiny_semi_dual(Spy), data=TinyData(data_seed=data_seed), max_steps=1)
        assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))

    def test_without_noise_and_bound_it_is_adam_on_the_difference_of_two_means(self, tmp_path):
        module = tiny_semi_dual()
        plain, data = copy.deepcopy(module), TinyData()
        train(tmp_path, module, NoPrivacy(), data, max_steps=3, insecure_seed=5)
        bound(plain, data)
        sampler = PoissonSampler(40, 0.25, insecure_seed=5)
        optimizer = torch.optim.Adam(plain.generator.parameter_groups(0.05))
        for _ in range(3):
            points, others = plain.generated_points(0), plain.generated_points(1).detach()
            f = balanced_potentials(points.detach(), others, entropic_reg=5.0)
            ids = sampler.draw()
            loss = 0.0
            for label in range(2):
                real = plain.points_of(data.train_images[ids][data.train_labels[ids] == label] / 255)
                for targets, weight in ((real, 1 / 10), (others[label], -1 / 6)):
                    scores = (f[label][:, None] - torch.cdist(points[label], targets).square().double()) / 5.0
                    loss = loss - weight * 5.0 * torch.logsumexp(scores, 0).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            plain._round += 1
        for mine, theirs in zip(module.generator.parameters(), plain.generator.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)

    def test_it_learns_what_can_be_learnt(self, tmp_path):
        """Class 0 is dark, class 1 is light."""

        class TwoTones(TinyData):
            def read(self):
                splits = super().read()
                splits.train_images.floor_divide_(8)
                splits.train_images[splits.train_labels == 1] += 200
                return splits

        module = tiny_semi_dual(expected_batch_size=20, learning_rate=0.2, final_learning_rate_share=0.02)
        quiet = {"max_steps": 120, "noise_multiplier": 1e-3, "insecure_seed": 1}  # the same batches every time
        train(tmp_path, module, Gaussian(max_grad_norm=5.0), TwoTones(), **quiet)
        images, labels = module.released_generator().sample(40, seed=0)
        assert images[labels == 0].mean() < 0.15
        assert images[labels == 1].mean() > 0.7

    @pytest.mark.parametrize(
        "mechanism",
        [
            Gaussian(),
            Gaussian(clipping="automatic"),
            Gaussian(clipping="per_layer"),
            AdaptiveGaussian(),
            TopAgg(top_k=4),
            VonMisesFisher(),
            NoPrivacy(),
        ],
        ids=lambda mechanism: f"{type(mechanism).__name__}-{getattr(mechanism, 'clipping', '')}",
    )
    def test_every_mechanism_with_a_proof_trains(self, tmp_path, mechanism):
        module = tiny_semi_dual()
        before = module.generator.means.detach().clone()
        module, accountant = train(tmp_path, module, mechanism, max_steps=2)
        assert len(accountant.ledger) == 2
        assert torch.isfinite(module.generator.means).all()
        assert not torch.equal(before, module.generator.means)

    def test_pixels_are_compared_without_a_basis(self, tmp_path):
        torch.manual_seed(0)
        module = SemiDualSinkhorn(tiny_generator(), expected_batch_size=10, images_per_class=2)
        assert module.point_dim == 64
        assert len(train(tmp_path, module, max_steps=1)[1].ledger) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"images_per_class": 0}, "images_per_class > 0"),
        ({"entropic_reg": 0.0}, "entropic_reg > 0"),
        ({"weight_decay": -1.0}, "weight_decay >= 0"),
        ({"expected_batch_size": float("inf")}, "expected_batch_size > 0"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigurationError, match=words):
        tiny_semi_dual(**options)

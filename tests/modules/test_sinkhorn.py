import copy
import math
from types import SimpleNamespace

import pytest
import torch
from dp_accounting import NeighboringRelation

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.events import GaussianRelease, Sampling
from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.poisson import PoissonSampler
from lightning_dp.losses.sinkhorn import SinkhornSolver, cross_term, self_term
from lightning_dp.losses.transport_cost import PointCloud, TransportCost
from lightning_dp.mechanisms.base import ContributionSpec, EncodeContext
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.no_privacy import NoPrivacy
from lightning_dp.mechanisms.noise import NoiseSource
from lightning_dp.mechanisms.topagg import TopAgg
from lightning_dp.mechanisms.von_mises_fisher import VonMisesFisher
from lightning_dp.modules.sinkhorn import DPSinkhorn
from lightning_dp.networks.basis import LowFrequencyDCT
from lightning_dp.networks.sinkhorn import SinkhornConvGenerator
from tests.conftest import TinyData, callbacks_for, tiny_generator, trainer_for

# Given noise: calibrating it takes seconds.
PRIVACY = {"neighboring_relation": "add_or_remove_one", "target_epsilon": None, "noise_multiplier": 8.0}
RELATIONS = {name: NeighboringRelation[name.upper()] for name in ("add_or_remove_one", "replace_special")}


def tiny_sinkhorn(**options) -> DPSinkhorn:
    torch.manual_seed(0)
    defaults = {"expected_batch_size": 10, "images_per_step": 6, "debias_ratio": 0.5, "learning_rate": 0.05}
    return DPSinkhorn(tiny_generator(), **{**defaults, **options})


def bound(module, data) -> DPSinkhorn:
    """Give a module its data without a trainer."""
    data.setup()
    module.trainer = SimpleNamespace(datamodule=data)
    module.describe_data(data)
    return module


def clean_sum(module, data, ids, mechanism) -> torch.Tensor:
    """The encoded sum of one step with a fixed batch, before noise."""
    bound(module, data)
    with torch.no_grad():
        points, labels = module.generated_points()
    num = module.images_per_step
    _, own = self_term(PointCloud(points, labels), num, cost=module.cost, solver=module.solver)
    spec = module.contribution_spec()
    total = torch.zeros(spec.num_vectors, spec.vector_dim, dtype=torch.float64)
    for chunk in module.joint_rows(ids, PointCloud(points[:num], labels[:num]), own):
        context = EncodeContext(
            release_number=1, public_seed=0, noise=NoiseSource(insecure_seed=0), row_ids=chunk.teacher_ids
        )
        total[chunk.queries] += mechanism.encode(chunk.values, spec, context).sum(0)
    return total


def train(tmp_path, module=None, mechanism=None, data=None, max_steps=4, **privacy):
    own = callbacks_for(mechanism or Gaussian(max_grad_norm=0.5), **{**PRIVACY, **privacy})
    module = module or tiny_sinkhorn()
    trainer_for(tmp_path, own, max_steps).fit(module, datamodule=data or TinyData())
    return module, own[1]


class TestSensitivity:
    @staticmethod
    def worlds(data) -> list[torch.Tensor]:
        """Batches of one step and their neighbours: a record less, none at all, one far away more."""
        ids = torch.tensor([0, 3, 5, 18])
        return [ids, *(ids[ids != i] for i in ids), ids[:1], ids[:0], torch.cat([ids, torch.tensor([39])])]

    @pytest.mark.parametrize("relation", RELATIONS)
    @pytest.mark.parametrize("clipping", ["flat", "automatic"])
    @pytest.mark.parametrize("scope", ["batch", "per_image"])
    @pytest.mark.parametrize("term", ["loss", "cross"])
    def test_every_batch_stays_in_the_ball_and_neighbours_within_its_diameter(self, term, scope, clipping, relation):
        module = tiny_sinkhorn(clip_scope=scope, released_term=term)
        mechanism = Gaussian(max_grad_norm=0.5, clipping=clipping)
        data = TinyData()
        data.setup()
        data.train_images[39] = 255
        sums = [clean_sum(module, data, ids, mechanism).flatten() for ids in self.worlds(data)]
        changed = TinyData()
        changed.setup()
        changed.train_images[3] = 0  # the record made null, or any other
        changed.train_labels[3] = 1 - changed.train_labels[3]
        sums.append(clean_sum(module, changed, torch.tensor([0, 3, 5, 18]), mechanism).flatten())
        spec = module.contribution_spec()
        ball = mechanism.row_bound(spec)
        assert ball == pytest.approx(0.5 if scope == "batch" else 0.5 * math.sqrt(6))
        assert max(part.norm().item() for part in sums) <= ball
        moved = torch.cdist(torch.stack(sums), torch.stack(sums)).max().item()
        sensitivity = mechanism.l2_sensitivity(spec, RELATIONS[relation])
        assert sensitivity == pytest.approx(2 * ball)
        assert 0 < moved <= sensitivity

    def test_the_sensitivity_of_a_sum_over_records_would_be_too_small(self):
        """The broken twin: C for a record that joins. One far away turns the whole gradient around."""
        module, mechanism = tiny_sinkhorn(debias_ratio=0.0, released_term="cross"), Gaussian(max_grad_norm=0.5)
        data = TinyData()
        data.setup()
        data.train_images[0], data.train_images[1] = 0, 255
        data.train_labels[:2] = 0
        sums = [clean_sum(module, data, torch.tensor(ids), mechanism) for ids in ([0], [1], [0, 1])]
        wrong = ContributionSpec.records(expected_batch_size=10, vector_dim=6 * 64)
        relation = NeighboringRelation.ADD_OR_REMOVE_ONE
        moves = [(one - other).norm().item() for one in sums for other in sums]
        assert max(moves) > 1.2 * mechanism.l2_sensitivity(wrong, relation)
        assert max(moves) <= mechanism.l2_sensitivity(module.contribution_spec(), relation)

    def test_bounding_each_image_under_the_price_of_one_ball_would_be_caught(self):
        """The broken twin: rows clipped image by image, announced as one vector."""

        class Underpriced(DPSinkhorn):
            def contribution_spec(self):
                return ContributionSpec.joint(num_vectors=1, vector_dim=self.point_dim)

        module, mechanism = tiny_sinkhorn(clip_scope="per_image"), Gaussian(max_grad_norm=1e-3)
        honest = clean_sum(module, TinyData(), torch.arange(4), mechanism)
        module.__class__ = Underpriced
        assert honest.norm() > 1.2 * mechanism.row_bound(module.contribution_spec())

    def test_a_broken_image_sends_nothing(self):
        """A NaN in the loss must neither leave nor stop the step."""
        module, mechanism = tiny_sinkhorn(), Gaussian(max_grad_norm=0.5)
        module.images_of = lambda ids: torch.full((len(ids), 1, 8, 8), math.nan)
        assert not clean_sum(module, TinyData(), torch.arange(4), mechanism).any()

    def test_replace_one_has_no_proof(self, tmp_path):
        with pytest.raises(ConfigurationError, match=r"replace_one has no proof.*add_or_remove_one, replace_special"):
            train(tmp_path, neighboring_relation="replace_one")


class TestBatches:
    def test_shapes_are_public(self):
        """Neither the number of points nor that of generated images follows the batch."""
        module = bound(tiny_sinkhorn(), TinyData())
        assert module.padded_batch_size == math.ceil(10 + 4 * math.sqrt(10))
        for num in (1, 10, 23, 40):
            cloud = module._padded(torch.arange(num))
            assert cloud.points.shape == (23, 64)
            assert cloud.log_weights.exp().sum().item() == pytest.approx(1)
            assert int((cloud.log_weights > -math.inf).sum()) == min(num, 23)

    def test_padding_changes_no_gradient(self):
        module = bound(tiny_sinkhorn(), TinyData())
        points, labels = (part[:6].detach() for part in module.generated_points())
        ids = torch.tensor([2, 7, 8])
        padded = cross_term(PointCloud(points, labels), module._padded(ids), cost=module.cost, solver=module.solver)
        plain = PointCloud(module.points_of(module.images_of(ids)), module.labels_of(ids))
        exact = cross_term(PointCloud(points, labels), plain, cost=module.cost, solver=module.solver)
        torch.testing.assert_close(padded[1], exact[1], rtol=1e-4, atol=1e-6)

    def test_empty_batches_release_pure_noise_and_are_charged(self, tmp_path, monkeypatch):
        monkeypatch.setattr(PoissonSampler, "draw", lambda self: torch.zeros(0, dtype=torch.int64))
        drawn, seen = [], []
        original = NoiseSource.gaussian
        monkeypatch.setattr(
            NoiseSource, "gaussian", lambda self, *a, **k: drawn.append(original(self, *a, **k)) or drawn[-1]
        )

        module = tiny_sinkhorn()
        release = module.release

        def spy(chunks, shape):
            released = release(chunks, shape)
            seen.append(released.value)
            return released

        module.release = spy
        module, accountant = train(tmp_path, module)
        assert len(accountant.ledger) == 4
        for noise, value in zip(drawn, seen, strict=True):
            assert torch.equal(noise.float(), value)

    def test_the_ledger_holds_poisson_sampling_at_the_rate_that_was_drawn(self, tmp_path):
        module, accountant = train(tmp_path)
        (entry,) = set(accountant.ledger.counts())
        event, sampling = entry
        assert event == GaussianRelease(noise_std=8.0 * 2 * 0.5, l2_sensitivity=2 * 0.5)
        assert sampling == Sampling(scheme="poisson", rate=10 / 40)
        assert module._sampler.rate == 10 / 40
        claim = accountant.claim()
        assert claim.level == "PROVED"
        assert claim.epsilon == pytest.approx(
            compute_epsilon({entry: 4}, delta=1e-5, relation="add_or_remove_one").epsilon
        )


class TestPublicHalf:
    def test_nothing_public_depends_on_the_records(self, tmp_path):
        """Generated points, labels and the gradient of the self term are equal to the bit for other records."""
        seen = []

        class Spy(DPSinkhorn):
            def joint_rows(self, records, generated, own_gradient):
                seen.append((generated.points.clone(), generated.labels.clone(), own_gradient.clone()))
                yield from super().joint_rows(records, generated, own_gradient)

        for data_seed in (0, 1):
            module = tiny_sinkhorn()
            module.__class__ = Spy
            train(tmp_path, module, data=TinyData(data_seed=data_seed), max_steps=1)
        assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))

    @pytest.mark.parametrize("ratio", [0.0, 0.34, 1.0])
    def test_fresh_images_have_the_labels_of_the_first_ones(self, ratio):
        module = bound(tiny_sinkhorn(debias_ratio=ratio), TinyData())
        points, labels = module.generated_points()
        extra = int(ratio * 6)
        assert len(points) == len(labels) == 6 + extra
        assert torch.equal(labels[6:], labels[:extra])
        assert all(not torch.equal(points[6 + i], points[i]) for i in range(extra))
        # Both arguments of the self term hold the same labels, so no mass has to change its class.
        assert torch.equal(labels[:6].sort().values, labels[extra:].sort().values)

    def test_points_have_the_scale_of_pixels_from_minus_one_to_one(self):
        module = tiny_sinkhorn()
        black, white = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
        assert (module.points_of(white) - module.points_of(black)).norm().item() == pytest.approx(2 * 8)
        module = tiny_sinkhorn(basis=LowFrequencyDCT((1, 8, 8), 64))
        assert (module.points_of(white) - module.points_of(black)).norm().item() == pytest.approx(2 * 8, rel=1e-5)


class TestTraining:
    @pytest.mark.parametrize("term", ["loss", "cross"])
    @pytest.mark.parametrize("scope", ["batch", "per_image"])
    @pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
    def test_without_noise_and_bound_it_descends_the_semi_debiased_loss(self, tmp_path, scope, term, ratio):
        """Equal to Adam on the gradient of 2 W(X, Y) - W(X, Z) with respect to the parameters."""
        module = tiny_sinkhorn(clip_scope=scope, released_term=term, debias_ratio=ratio)
        plain, data = copy.deepcopy(module), TinyData()
        train(tmp_path, module, NoPrivacy(), data, max_steps=3, insecure_seed=5)
        bound(plain, data)
        sampler = PoissonSampler(40, 0.25, insecure_seed=5)
        optimizer = torch.optim.Adam(plain.generator.parameter_groups(0.05), weight_decay=1e-5)
        for _ in range(3):
            points, labels = plain.generated_points()
            generated = PointCloud(points.detach(), labels)
            _, gradient = self_term(generated, 6, cost=plain.cost, solver=plain.solver)
            real = plain._padded(sampler.draw())
            _, cross = cross_term(generated[:6], real, cost=plain.cost, solver=plain.solver)
            gradient[:6] += cross
            optimizer.zero_grad()
            (points * gradient).sum().backward()
            optimizer.step()
            plain._round += 1
        for mine, theirs in zip(module.generator.parameters(), plain.generator.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)

    def test_it_learns_what_can_be_learnt(self, tmp_path):
        """Class 0 is dark, class 1 is light."""

        class TwoTones(TinyData):
            def read(self):
                splits = super().read()
                splits.train_images.floor_divide_(8)
                splits.train_images[splits.train_labels == 1] += 200
                return splits

        module = tiny_sinkhorn(images_per_step=20, expected_batch_size=20, learning_rate=0.1)
        train(tmp_path, module, Gaussian(max_grad_norm=0.5), TwoTones(), max_steps=60, noise_multiplier=1e-3)
        images, labels = module.released_generator().sample(40, seed=0)
        assert images[labels == 0].mean() < 0.15
        assert images[labels == 1].mean() > 0.7

    def test_noise_destroys_learning(self, tmp_path):
        one, other = tiny_sinkhorn(), tiny_sinkhorn()
        for module in (one, other):
            train(tmp_path, module, noise_multiplier=1e3)
        assert not torch.allclose(one.generator.means, other.generator.means)

    @pytest.mark.parametrize(
        "mechanism",
        [Gaussian(), Gaussian(clipping="automatic"), VonMisesFisher(), NoPrivacy()],
        ids=["flat", "automatic", "direction", "none"],
    )
    @pytest.mark.parametrize("scope", ["batch", "per_image"])
    def test_every_mechanism_with_a_proof_trains(self, tmp_path, mechanism, scope):
        module = tiny_sinkhorn(clip_scope=scope)
        before = module.generator.means.detach().clone()
        module, accountant = train(tmp_path, module, mechanism, max_steps=2)
        assert len(accountant.ledger) == 2
        assert torch.isfinite(module.generator.means).all()
        assert not torch.equal(before, module.generator.means)

    def test_votes_have_no_proof(self, tmp_path):
        with pytest.raises(ConfigurationError, match="no proof for joint contributions"):
            train(tmp_path, mechanism=TopAgg(top_k=4))

    def test_the_generators_of_the_paper_train(self, tmp_path):
        """Batch statistics couple generated images only, so they are no obstacle here."""
        torch.manual_seed(0)
        generator = SinkhornConvGenerator((1, 8, 8), 2, latent_dim=4, width=2)
        module = DPSinkhorn(generator, expected_batch_size=10, images_per_step=6)
        before = copy.deepcopy(generator.state_dict())
        train(tmp_path, module, max_steps=2)
        after = generator.state_dict()
        assert all(torch.isfinite(value).all() for value in after.values())
        assert all(not torch.equal(before[name], value) for name, value in after.items())

    def test_a_resumed_run_draws_new_batches_and_goes_on(self, tmp_path):
        first, own = tiny_sinkhorn(ema_decay=0.9), callbacks_for(Gaussian(), tmp_path / "ledger.jsonl", **PRIVACY)
        trainer = trainer_for(tmp_path, own, max_steps=6)
        trainer.fit_loop.epoch_loop.max_steps = 3  # interrupted half-way through its plan
        trainer.fit(first, datamodule=TinyData())
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        again, own = tiny_sinkhorn(ema_decay=0.9), callbacks_for(Gaussian(), tmp_path / "ledger.jsonl", **PRIVACY)
        trainer_for(tmp_path, own, max_steps=6).fit(
            again, datamodule=TinyData(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
        )
        assert len(own[1].ledger) == 6
        assert again._round == again.average.num_updates == 6
        assert again._sampler is not first._sampler
        assert again.released_generator() is again.average.network


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"images_per_step": 0}, "images_per_step > 0"),
        ({"expected_batch_size": 0}, "expected_batch_size > 0"),
        ({"debias_ratio": 1.5}, "debias_ratio <= 1"),
        ({"weight_decay": -1.0}, "weight_decay >= 0"),
        ({"learning_rate": float("nan")}, "learning_rate > 0"),
        ({"final_learning_rate_share": 0.0}, "final_learning_rate_share"),
        ({"ema_decay": 1.0}, "ema_decay < 1"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigurationError, match=words):
        tiny_sinkhorn(**options)


def test_data_that_do_not_fit_are_refused(tmp_path):
    torch.manual_seed(0)
    module = DPSinkhorn(SinkhornConvGenerator((1, 8, 8), 3, width=2), expected_batch_size=10)
    with pytest.raises(ConfigurationError, match="the data are"):
        train(tmp_path, module)
    with pytest.raises(ConfigurationError, match="<= 40, the number of records"):
        train(tmp_path, tiny_sinkhorn(expected_batch_size=41))


def test_published_defaults():
    module = DPSinkhorn(tiny_generator())
    assert module.cost == TransportCost(l1_weight=1, label_weight=15)
    assert module.solver == SinkhornSolver(method="anneal", entropic_reg=0.05, start_reg=73.2, cooling=0.5)
    assert (module.expected_batch_size, module.images_per_step, module.debias_ratio) == (50, 50, 0.2)


@pytest.mark.parametrize("betas", [(2.0, 3.0), (0.9, 1.0), (-0.1, 0.9), (0.9, float("nan"))])
def test_betas_that_adam_does_not_take_are_refused(betas):
    with pytest.raises(ConfigurationError, match=r"model.betas to be two numbers in \[0, 1\)"):
        tiny_sinkhorn(betas=betas)

import copy

import pytest
import torch
import torch.nn.functional as F
from dp_accounting import NeighboringRelation
from torch import nn

from callbacks import RunFolder, SampleGrid
from lightning_dp.errors import ConfigurationError, PrivacyProtocolError
from lightning_dp.gradients.poisson import PoissonSampler
from lightning_dp.mechanisms.adaptive import AdaptiveGaussian
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.no_privacy import NoPrivacy
from lightning_dp.mechanisms.topagg import TopAgg
from lightning_dp.modules.dpgan import DPGAN
from lightning_dp.modules.published import load_generator
from lightning_dp.modules.release import _DOOR, Released, ReleaseSession
from lightning_dp.networks.basis import LowFrequencyDCT
from lightning_dp.networks.small import MLPDiscriminator, MLPGenerator
from tests.conftest import TinyData, callbacks_for, trainer_for
from tests.contracts.records import moves

SHAPE = (1, 8, 8)
# Given noise: calibrating it takes seconds.
RELEASED = Released(torch.zeros(1), 1, _DOOR)
PRIVACY = {"neighboring_relation": "add_or_remove_one", "target_epsilon": None, "noise_multiplier": 8.0}


def tiny_dpgan(**options) -> DPGAN:
    torch.manual_seed(0)
    generator = MLPGenerator(SHAPE, num_classes=2, latent_dim=3, width=6)
    critic = MLPDiscriminator(SHAPE, num_classes=2, width=5)
    defaults = {"expected_batch_size": 10, "critic_ladder": (2,), "learning_rate": 0.01, "chunk_size": 4}
    return DPGAN(generator, critic, **{**defaults, **options})


def seeing_few_frequencies(**options) -> DPGAN:
    """A critic that judges in six public coordinates."""
    torch.manual_seed(0)
    generator, critic = MLPGenerator(SHAPE, num_classes=2, latent_dim=3, width=6), MLPDiscriminator((6,), 2, width=5)
    basis = LowFrequencyDCT(SHAPE, num_coefficients=6)
    return DPGAN(generator, critic, basis, **{"expected_batch_size": 10, "critic_ladder": (2,), **options})


def train(tmp_path, module=None, mechanism=None, data=None, max_steps=6, callbacks=(), **privacy):
    own = callbacks_for(mechanism or Gaussian(), **{**PRIVACY, **privacy})
    module = module or tiny_dpgan()
    trainer = trainer_for(tmp_path, [*callbacks, *own], max_steps)
    trainer.fit(module, datamodule=data or TinyData())
    return module, own


def flat(network) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
@pytest.mark.parametrize("mechanism", [Gaussian(max_grad_norm=0.5), TopAgg(top_k=7)], ids=["l2", "votes"])
@pytest.mark.parametrize("make", [tiny_dpgan, seeing_few_frequencies], ids=["pixels", "basis"])
def test_one_record_moves_the_sum_no_further_than_the_event_says(make, mechanism, relation):
    module = make()
    found = moves(module, TinyData, torch.tensor([0, 3, 5, 18, 19, 30]), mechanism, relation=relation)
    bound = mechanism.l2_sensitivity(module.contribution_spec(), NeighboringRelation[relation.upper()])
    assert 0 < max(found) <= bound * (1 + 1e-9)


@pytest.mark.parametrize(
    "mechanism",
    [
        Gaussian(),
        Gaussian(clipping="per_layer"),
        AdaptiveGaussian(),
        TopAgg(top_k=9, rotate=False, output="votes"),
        NoPrivacy(),
    ],
    ids=["flat", "per layer", "adaptive", "votes", "none"],
)
def test_every_mechanism_trains(tmp_path, mechanism):
    module = tiny_dpgan()
    before = copy.deepcopy(module)
    module, own = train(tmp_path, module, mechanism)
    # Six critic steps are six releases, however many generator steps go between them.
    assert len(own[1].ledger) == module._round == 6
    assert not torch.equal(flat(before.generator), flat(module.generator))
    assert not torch.equal(flat(before.critic), flat(module.critic))
    assert torch.isfinite(flat(module)).all()


def test_fakes_are_clipped_as_the_records_of_their_step(tmp_path, monkeypatch):
    """Not at the norm that the release of the step has just set for the next."""
    mechanism, private, public = AdaptiveGaussian(), [], []
    real = ReleaseSession._encoded_sum

    def watched(self, chunks, num_vectors, device, number, census):
        (public if census is None else private).append((number, self.mechanism.max_grad_norm))
        return real(self, chunks, num_vectors, device, number, census)

    monkeypatch.setattr(ReleaseSession, "_encoded_sum", watched)
    train(tmp_path, mechanism=mechanism)
    assert public == private
    assert len(private) == 6
    assert len({norm for _, norm in private}) > 1


def test_a_critic_with_a_basis_sees_its_coordinates_alone(tmp_path):
    """Records that differ outside of them give the same rows, fakes and records pass through it alike."""
    module = seeing_few_frequencies()
    seen = torch.rand(5, *SHAPE)
    kept = (module.basis(seen) @ module.basis.matrix).unflatten(1, SHAPE)  # without what the critic cannot see
    labels = torch.tensor([0, 1, 0, 1, 0])
    loss = module._loss_of_record
    norms = [
        next(iter(module.source.gradients(module.critic, loss, (module._seen(images), labels), ids=labels))).norms
        for images in (seen, kept)
    ]
    torch.testing.assert_close(*norms)
    assert not torch.allclose(seen, kept, atol=0.01)
    module, _ = train(tmp_path, seeing_few_frequencies())
    assert torch.isfinite(flat(module)).all()
    assert not torch.equal(flat(module.generator), flat(seeing_few_frequencies().generator))


def test_empty_batches_release_noise_and_are_charged(tmp_path, monkeypatch):
    monkeypatch.setattr(PoissonSampler, "draw", lambda self: torch.zeros(0, dtype=torch.int64))
    _, own = train(tmp_path)
    assert len(own[1].ledger) == 6
    assert own[1].claim().level == "PROVED"


def test_without_noise_and_bound_a_critic_step_is_a_plain_one(tmp_path):
    """Half the gradient of the records over the expected batch, half that of the fakes (Bie et al. 2023)."""
    module = tiny_dpgan(critic_ladder=(100,), fakes_per_step=7).double()
    plain = copy.deepcopy(module.critic)
    data = TinyData()
    module, _ = train(tmp_path, module, NoPrivacy(), data, max_steps=1, insecure_seed=4)
    ids = PoissonSampler(40, 0.25, insecure_seed=4).draw()
    images, labels = data.train_images[ids].double() / 255, data.train_labels[ids]
    module._round = 0
    fakes, fake_labels = module._fakes(0)
    hot = [F.one_hot(each, 2).double() for each in (labels, fake_labels)]
    of_records = F.softplus(-plain(images, hot[0])).sum() / 10
    of_fakes = F.softplus(plain(fakes.detach(), hot[1])).mean()
    ((of_records + of_fakes) / 2).backward()
    torch.optim.Adam(plain.parameters(), lr=0.01, betas=(0.5, 0.999)).step()
    torch.testing.assert_close(flat(module.critic), flat(plain), rtol=1e-5, atol=1e-7)


def test_the_generator_steps_once_after_each_rung_of_critic_steps(tmp_path, monkeypatch):
    seen = []
    original = DPGAN._train_generator
    monkeypatch.setattr(
        DPGAN, "_train_generator", lambda self, *given: seen.append(self._round) or original(self, *given)
    )
    train(tmp_path, tiny_dpgan(critic_ladder=(3,)), max_steps=7)
    assert seen == [2, 5]


def test_steps_of_the_trainer_are_releases_however_many_optimizers_there_are(tmp_path):
    """Lightning counts the steps of all optimizers, so plots of a GAN would be stretched and runs end half-way."""
    own, counted = callbacks_for(Gaussian(max_grad_norm=1.0), **PRIVACY), []
    module = tiny_dpgan(critic_ladder=(1,))
    module.on_train_batch_end = lambda *_: counted.append((module.global_step, len(own[1].ledger)))
    trainer_for(tmp_path, own, 4).fit(module, datamodule=TinyData())
    assert counted == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_a_fixed_schedule_moves_the_generator_against_the_critic(tmp_path):
    module = tiny_dpgan()
    fakes, labels = module._fakes(1)
    hot = F.one_hot(labels, 2).float()
    before = module.critic(fakes, hot).mean()
    module.log = lambda *_: None
    module._train_generator(torch.optim.SGD(module.generator.parameters(), lr=0.5), RELEASED)
    after = module.critic(module._fakes(1)[0], hot).mean()
    assert after > before


def test_the_schedule_does_not_see_the_records(tmp_path):
    """With the same critic, other records change nothing that the schedule is told (the twin reads real accuracy)."""
    told = []
    for data_seed in (0, 1):
        module = tiny_dpgan()
        module.trainer = type("Stub", (), {"datamodule": TinyData(data_seed=data_seed)})()
        module.log = lambda *_: None
        module._train_generator(torch.optim.SGD(module.generator.parameters(), lr=0.1), RELEASED)
        told.append((module.schedule.fake_accuracy, flat(module.generator)))
    assert told[0][0] == told[1][0]
    assert torch.equal(told[0][1], told[1][1])


def test_the_critic_refuses_a_gradient_that_was_not_released(tmp_path):
    class Direct(DPGAN):
        """The bug: the critic also learns from records directly."""

        def assign_released(self, parameters, released):
            super().assign_released(parameters, released)
            images, labels = self.images_of(torch.arange(5)), self.labels_of(torch.arange(5))
            self._loss_of_record(self.critic, images, labels).backward()

    module = tiny_dpgan()
    module.__class__ = Direct
    with pytest.raises(PrivacyProtocolError, match="did not come from a release"):
        train(tmp_path, module)


class LearnsFromRecords(DPGAN):
    """The bug: the generator is drawn to the mean of the records, beside the critic."""

    def _train_generator(self, optimizer, released):
        fakes, _ = self._fakes(1)
        (fakes.mean(0) - self.images_of(torch.arange(40)).mean(0)).square().sum().backward()
        optimizer.step()


class AddsRecords(DPGAN):
    """The bug: a gradient of records rides along with the critic's."""

    def backward_released(self, outputs, released):
        super().backward_released(outputs, released)
        for parameter in self.generator.parameters():
            parameter.grad.add_(self.images_of(torch.arange(40)).mean())


@pytest.mark.parametrize("kind", [LearnsFromRecords, AddsRecords])
def test_the_generator_refuses_a_gradient_that_did_not_come_through_the_critic(tmp_path, kind):
    module = tiny_dpgan()
    module.__class__ = kind
    with pytest.raises(PrivacyProtocolError, match="did not come from a release"):
        train(tmp_path, module)


def test_a_generator_without_a_guard_is_refused(tmp_path, monkeypatch):
    """The broken twin watches the critic alone, though the generator is what is published."""
    monkeypatch.setattr(DPGAN, "released_networks", lambda self: {"critic": self.critic})
    for module in (tiny_dpgan(), tiny_dpgan(ema_decay=0.9)):
        with pytest.raises(PrivacyProtocolError, match="publishes parameters that nobody watches"):
            train(tmp_path, module)


def test_only_the_generator_is_released(tmp_path):
    own = callbacks_for(Gaussian(), **PRIVACY)
    folder = RunFolder(path=tmp_path, privatizer=own[0], evaluation=None, config={}, title="tiny")
    module = tiny_dpgan(ema_decay=0.9)
    callbacks = [folder, *own, SampleGrid(path=tmp_path / "samples.png", per_class=2)]
    trainer_for(tmp_path, callbacks, 6).fit(module, datamodule=TinyData())
    generator, claim = load_generator(tmp_path)
    assert claim["level"] == "PROVED"
    assert {path.name for path in (tmp_path / "release").iterdir()} == {"generator.json", "generator.safetensors"}
    assert torch.equal(flat(generator), flat(module.average.network))
    assert module.average.num_updates == 3  # one for each generator step


def test_resume_keeps_the_schedule(tmp_path):
    def callbacks():
        return callbacks_for(Gaussian(), tmp_path / "ledger.jsonl", **PRIVACY)

    first, own = tiny_dpgan(critic_ladder=(3, 4), grace=1, threshold=1.0), callbacks()
    trainer = trainer_for(tmp_path, own, max_steps=9)
    trainer.fit_loop.epoch_loop.max_steps = 5  # interrupted
    trainer.fit(first, datamodule=TinyData())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    own[1].ledger.close()
    again = tiny_dpgan(critic_ladder=(3, 4), grace=1, threshold=1.0)
    own = callbacks()
    trainer = trainer_for(tmp_path, own, max_steps=9)
    trainer.fit(again, datamodule=TinyData(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    # Generator steps after 3 critic steps, then, on the next rung, after 4 more: at 3 and 7.
    assert len(own[1].ledger) == again._round == 9
    assert again.schedule.state_dict() == {
        "rung": 1,
        "critic_steps": 2,
        "generator_steps": 1,
        "accuracy": again.schedule.fake_accuracy,
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fakes_per_step": 0}, "fakes_per_step > 0"),
        ({"critic_ladder": (5, 2)}, "rising"),
        ({"learning_rate": 0.0}, "learning_rate > 0"),
        ({"generator_learning_rate": -1.0}, "generator_learning_rate > 0"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigurationError, match=words):
        tiny_dpgan(**options)


def test_batch_norm_is_refused_in_the_critic_and_allowed_in_the_generator(tmp_path):
    module = tiny_dpgan()
    module.generator.norm = nn.BatchNorm1d(3)
    train(tmp_path, module, max_steps=2)
    module = tiny_dpgan()
    module.critic.norm = nn.BatchNorm1d(3)
    with pytest.raises(ConfigurationError, match=r"critic\.norm"):
        train(tmp_path, module)


def test_data_that_do_not_fit_are_refused(tmp_path):
    module = DPGAN(MLPGenerator(SHAPE, 3), MLPDiscriminator(SHAPE, 3), expected_batch_size=5)
    with pytest.raises(ConfigurationError, match="the data are"):
        train(tmp_path, module)


@pytest.mark.parametrize("betas", [(2.0, 3.0), (0.9, 1.0), (-0.1, 0.9), (0.9, float("nan"))])
def test_betas_that_adam_does_not_take_are_refused(betas):
    with pytest.raises(ConfigurationError, match=r"model.betas to be two numbers in \[0, 1\)"):
        tiny_dpgan(betas=betas)

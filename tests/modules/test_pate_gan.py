"""PATE-GAN: the student sees noisy votes only, and one record moves their sum no further than the event says."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from dp_accounting import NeighboringRelation

from lightning_dp.errors import ConfigurationError, PrivacyProtocolError
from lightning_dp.gradients.discriminator_teachers import DiscriminatorTeachers
from lightning_dp.gradients.teachers import TeacherShards
from lightning_dp.mechanisms.base import EncodeContext
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.gnmax import GNMax
from lightning_dp.mechanisms.no_privacy import NoPrivacy
from lightning_dp.mechanisms.noise import NoiseSource
from lightning_dp.mechanisms.topagg import TopAgg
from lightning_dp.modules.pate_gan import PATEGAN
from lightning_dp.modules.release import _DOOR, Released
from lightning_dp.networks.small import MLPDiscriminator
from tests.conftest import TinyData, tiny_generator

PATE = GNMax(num_projections=1, num_bins=2, max_value=1.0, threshold=0.0, threshold_noise_ratio=None)


def tiny_teachers():
    return DiscriminatorTeachers("mlp", num_teachers=4, batch_size=5, train_steps=1, pretrain_steps=2)


def tiny_pate(cls=PATEGAN, **options):
    torch.manual_seed(0)
    student = MLPDiscriminator((1, 8, 8), num_classes=2, width=8)
    return cls(tiny_generator(), student, tiny_teachers(), **{"images_per_step": 6, "public_seed": 0, **options})


@pytest.mark.parametrize("mechanism", [PATE, Gaussian(), TopAgg(top_k=1), NoPrivacy()], ids=lambda m: type(m).__name__)
def test_generator_and_student_learn_under_every_mechanism(run_tiny, mechanism):
    module = tiny_pate(votes="above_mean", generator_steps=2)
    before = copy.deepcopy(module.state_dict())
    module, _, accountant, trainer = run_tiny(module=module, mechanism=mechanism)
    assert len(accountant.ledger) == trainer.global_step == 5  # one count of each release, whatever steps it fed
    moved = {
        name.split(".")[0]
        for name, value in module.state_dict().items()
        if torch.is_tensor(value) and not torch.equal(before[name], value)
    }
    assert moved >= {"generator", "student"}
    assert all(torch.isfinite(value).all() for value in module.generator.state_dict().values())


def test_the_generator_follows_its_student(run_tiny):
    """A student who likes bright images makes bright ones; the teachers were never asked again."""
    module, *_ = run_tiny(module=tiny_pate(), mechanism=NoPrivacy(), max_steps=1)
    likes_light = torch.nn.Module()
    likes_light.forward = lambda samples, one_hot: samples.flatten(1).mean(1)
    module.student, released, labels = likes_light, module._memory[0][2], torch.arange(6) % 2
    optimizer = torch.optim.Adam(module.generator.parameters(), lr=0.05)
    start = module.generator.sample(50, seed=0)[0].mean().item()
    for step in range(20):
        module._lead_generator(released, labels, part=step)
        optimizer.step()
    assert module.generator.sample(50, seed=0)[0].mean().item() > start + 0.1


def test_the_student_learns_the_noisy_labels():
    module, fakes = tiny_pate(), torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 2
    released = Released(torch.where(fakes.mean((1, 2, 3)) > 0.5, 0.3, -0.3)[:, None], 1, _DOOR)
    optimizer = torch.optim.Adam(module.student.parameters(), lr=0.01)
    for _ in range(150):
        module.train_student(optimizer, fakes, labels, released)
    says = module.student(fakes, F.one_hot(labels, 2).float()) > 0
    assert (says == (released.value.flatten() > 0)).float().mean() > 0.9


@pytest.mark.parametrize("is_relative", [False, True], ids=["real", "above_mean"])
class TestVotes:
    @pytest.fixture(autouse=True)
    def _votes(self, is_relative):
        self.is_relative = is_relative

    def chunks(self, images, labels, fakes, of):
        teachers = tiny_teachers()
        shards = TeacherShards(images, labels, torch.arange(40) % 4, 4)
        teachers.bind(shards, num_classes=2, image_shape=(1, 8, 8), device="cpu", seed=0)
        teachers.train(lambda wanted: torch.full((len(wanted), 1, 8, 8), 0.3), step=0)
        return list(teachers.vote_chunks(fakes, of, is_relative=self.is_relative))

    def sums(self, mechanism, record=None):
        data = TinyData()
        data.setup()
        images, labels = data.train_images.clone(), data.train_labels.clone()
        if record is not None:
            images[record], labels[record] = 255 - images[record], 1 - labels[record]
        fakes = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(3))
        module = tiny_pate()
        module.describe_data(data)
        spec = module.contribution_spec()
        total = torch.zeros(6, mechanism.encoded_dim(spec), dtype=torch.float64)
        for chunk in self.chunks(images, labels, fakes, torch.arange(6) % 2):
            assert set(chunk.values.unique().tolist()) <= {-1.0, 1.0}
            context = EncodeContext(
                release_number=1, public_seed=0, noise=NoiseSource(insecure_seed=0), row_ids=chunk.teacher_ids
            )
            total += mechanism.encode(chunk.values, spec, context).sum(0, dtype=torch.float64)
        return total, mechanism.l2_sensitivity(spec, NeighboringRelation.REPLACE_ONE)

    @pytest.mark.parametrize("mechanism", [PATE, Gaussian()], ids=lambda m: type(m).__name__)
    def test_one_record_moves_the_votes_no_further_than_the_event_says(self, mechanism):
        reference, bound = self.sums(mechanism)
        moved = [(self.sums(mechanism, record)[0] - reference).norm().item() for record in range(12)]
        assert 0 < max(moved) <= bound * (1 + 1e-9)

    def test_the_price_is_that_of_all_images_at_once(self):
        """One changed vote in each of B counts, in units of the noise: mu^2 = B / std^2 of the number of votes."""
        _, bound = self.sums(Gaussian())
        assert bound == pytest.approx(2 * math.sqrt(6))
        _, bound = self.sums(PATE)
        assert bound == pytest.approx(math.sqrt(2 * 6))  # noise on both counts: sqrt 2 std on their difference of 2

    def test_a_teacher_without_records_does_not_vote(self):
        teachers = tiny_teachers()
        data = TinyData()
        data.setup()
        shards = TeacherShards(data.train_images, data.train_labels, torch.arange(40) % 3, 4)
        teachers.bind(shards, num_classes=2, image_shape=(1, 8, 8), device="cpu", seed=0)
        teachers.train(lambda wanted: torch.rand(len(wanted), 1, 8, 8), step=0)
        judged = teachers.vote_chunks(torch.rand(3, 1, 8, 8), torch.zeros(3).long(), is_relative=self.is_relative)
        votes = torch.cat([chunk.values for chunk in judged])
        assert votes[3].abs().sum() == 0
        assert (votes[:3].abs() == 1).all()
        assert not self.is_relative or (votes[:3].mean(1).abs() < 1).all()  # no teacher says the same of all


def test_the_student_descends_the_cross_entropy_of_noisy_labels(run_tiny):
    module, *_ = run_tiny(module=tiny_pate(), mechanism=Gaussian(), max_steps=1)
    fakes, labels, released = module._memory[0]
    logits = module.student(fakes, F.one_hot(labels, 2).float())
    targets = (released.value.flatten() > 0).float()
    loss = F.binary_cross_entropy_with_logits(logits, targets)
    expected = torch.autograd.grad(loss, list(module.student.parameters()))
    module.train_student(torch.optim.SGD(module.student.parameters(), lr=0.0), fakes, labels, released)
    for parameter, gradient in zip(module.student.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_an_unanswered_vote_teaches_nothing():
    module, fakes, labels = tiny_pate(), torch.rand(6, 1, 8, 8), torch.arange(6) % 2
    module.train_student(
        torch.optim.SGD(module.student.parameters(), lr=0.0), fakes, labels, Released(torch.zeros(6, 1), 1, _DOOR)
    )
    assert all(not parameter.grad.any() for parameter in module.student.parameters())


class RawVotes(PATEGAN):
    """Broken twin: the student also learns the teachers' votes as they are."""

    def train_student(self, optimizer, fakes, labels, released):
        super().train_student(optimizer, fakes, labels, released)
        (votes,) = (chunk.values for chunk in self.teachers.vote_chunks(fakes, labels))
        logits = self.student(fakes, F.one_hot(labels, 2).float())
        F.binary_cross_entropy_with_logits(logits, (votes.mean(0).flatten() > 0).float()).backward()
        optimizer.step()


class RawVotesThroughTheDoor(PATEGAN):
    """Broken twin: hands raw votes to the door for released values."""

    def train_student(self, optimizer, fakes, labels, released):
        (votes,) = (chunk.values for chunk in self.teachers.vote_chunks(fakes, labels))
        self.backward_released(self.student(fakes, F.one_hot(labels, 2).float()), votes.mean(0))


class RawLead(PATEGAN):
    """Broken twin: the generator learns from a teacher instead of the student."""

    def _lead_generator(self, released, labels, *, part):
        super()._lead_generator(released, labels, part=part)
        images = self.generator(self.generator.sample_latent(len(labels)), labels)
        (chunk,) = self.teachers.row_chunks(images.detach(), labels)
        images.backward(gradient=-chunk.values[0].reshape(images.shape))


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (RawVotes, "did not come from a release"),
        (RawVotesThroughTheDoor, "takes the value that release"),
        (RawLead, "did not come from a release"),
    ],
)
def test_whatever_learns_from_raw_votes_is_refused(run_tiny, broken, words):
    with pytest.raises(PrivacyProtocolError, match=words):
        run_tiny(module=tiny_pate(broken), mechanism=Gaussian())


@pytest.mark.parametrize("name", ["student_steps", "memory", "generator_steps", "student_learning_rate"])
def test_bad_options_are_refused(name):
    with pytest.raises(ConfigurationError, match=name):
        tiny_pate(**{name: 0})

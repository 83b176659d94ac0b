import copy

import pytest
import torch

from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import ConfigurationError, PrivacyProtocolError
from lightning_dp.gradients.energy_teachers import EnergyTeachers
from lightning_dp.gradients.teachers import RowChunk, TeacherShards
from lightning_dp.losses.energy import unit_directions
from lightning_dp.mechanisms.base import EncodeContext
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.no_privacy import NoPrivacy
from lightning_dp.mechanisms.noise import NoiseSource
from lightning_dp.mechanisms.topagg import TopAgg
from lightning_dp.modules.published import load_generator, save_released
from lightning_dp.modules.release import _DOOR, PublicRows, Released
from lightning_dp.modules.teacher_gan import TeacherEnsembleGAN
from lightning_dp.networks.basis import LowFrequencyDCT
from lightning_dp.networks.dct import DCTGenerator
from tests.conftest import Blobs, TinyData, callbacks_for, tiny_discriminator_gan, tiny_gan, tiny_generator, trainer_for


def test_the_released_vector_is_the_output_gradient_of_the_surrogate_loss():
    """d/dtheta of sum (stopgrad(x + a) - G)^2 is J^T(-2a): teacher_gans, section 1.3."""
    module = tiny_gan().double()
    latent, labels = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 2
    outputs = module.basis(module.generator(latent, labels))
    direction = torch.randn_like(outputs)
    target = (outputs + direction).detach()
    expected = torch.autograd.grad((target - outputs).square().sum(), list(module.generator.parameters()))
    outputs = module.basis(module.generator(latent, labels))
    module.backward_released(outputs, Released(2 * direction, 1, _DOOR))
    for parameter, gradient in zip(module.generator.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("mechanism", [TopAgg(top_k=4), Gaussian(), NoPrivacy()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("make", [tiny_gan, tiny_discriminator_gan])
def test_every_mechanism_trains_with_every_kind_of_teacher(run_tiny, make, mechanism):
    module = make()
    before = copy.deepcopy(module.generator.state_dict())
    module, _, accountant, _ = run_tiny(module=module, mechanism=mechanism)
    assert len(accountant.ledger) == 5
    assert any(not torch.equal(before[name], value) for name, value in module.generator.state_dict().items())
    assert all(torch.isfinite(value).all() for value in module.generator.state_dict().values())


def test_without_noise_the_energy_distance_falls(run_tiny):
    """The teachers pull and the pool pushes until fakes lie like records."""
    module = tiny_gan(images_per_step=20, learning_rate=0.05, step_size=1.0)
    module, *_ = run_tiny(module=module, data=Blobs(), mechanism=NoPrivacy(), max_steps=150)
    images, labels = module.generator.sample(50, seed=0)
    dark, bright = images[labels == 0].mean().item(), images[labels == 1][..., 5:].mean().item()
    assert dark == pytest.approx(20 / 255, abs=0.06)
    assert bright == pytest.approx(220 / 255, abs=0.15)


def clean_sum(module, data, fakes, labels, mechanism, chunk_size=512):
    """The sum that would be released without noise; for tests of sensitivity only."""
    data.setup()
    teachers = EnergyTeachers(chunk_size=chunk_size)
    partition = data.teacher_partition(data.num_records)
    shards = TeacherShards(data.train_images, data.train_labels, partition.assignment, data.num_records)
    teachers.bind(shards, num_classes=2, image_shape=(1, 8, 8), device="cpu", seed=0, encode=module.basis)
    spec = module.contribution_spec()
    total = torch.zeros(len(fakes), fakes.shape[1], dtype=mechanism.total_dtype)
    for chunk in teachers.row_chunks(fakes, labels):
        context = EncodeContext(
            release_number=1, public_seed=0, noise=NoiseSource(insecure_seed=0), row_ids=chunk.teacher_ids
        )
        total[chunk.queries] += mechanism.encode(chunk.values, spec, context).sum(0, dtype=mechanism.total_dtype)
    return total


@pytest.mark.parametrize("changes_label", [False, True])
@pytest.mark.parametrize(
    "mechanism",
    [TopAgg(top_k=10, rotate=True, output="votes"), TopAgg(top_k=3), Gaussian()],
    ids=["rotated", "k", "l2"],
)
def test_one_record_moves_the_sum_no_further_than_the_event_says(mechanism, changes_label):
    module, data, other = tiny_gan(), TinyData(), TinyData()
    module.describe_data(data)
    labels = torch.tensor([0, 0, 1, 1])
    fakes = torch.randn(4, module.vector_dim, generator=torch.Generator().manual_seed(1))
    reference = clean_sum(module, data, fakes, labels, mechanism)
    from dp_accounting import NeighboringRelation

    bound = mechanism.l2_sensitivity(module.contribution_spec(), NeighboringRelation.REPLACE_ONE)
    worst = 0.0
    for record in range(10):
        other.setup()
        other.train_images.copy_(data.train_images)
        other.train_labels.copy_(data.train_labels)
        other.train_images[record] = 255 - other.train_images[record]
        if changes_label:
            other.train_labels[record] = 1 - other.train_labels[record]
        moved = clean_sum(module, other, fakes, labels, mechanism) - reference
        worst = max(worst, torch.linalg.vector_norm(moved.double()).item())
    assert 0 < worst <= bound * (1 + 1e-9)


def test_chunks_of_teachers_change_nothing():
    module, data = tiny_gan(), TinyData()
    module.describe_data(data)
    labels, fakes = torch.tensor([0, 0, 1, 1]), torch.randn(4, module.vector_dim)
    mechanism = TopAgg(top_k=3)
    sums = [clean_sum(module, data, fakes, labels, mechanism, size) for size in (1, 3, 7, 512)]
    assert all(torch.equal(sums[0], other) for other in sums[1:])


def test_rows_of_fakes_that_lie_like_the_records_cancel_exactly(run_tiny):
    """`reference` passes the same encoding as the private rows, so equal rows leave no direction."""
    module, *_ = run_tiny(mechanism=NoPrivacy(), max_steps=1)
    records, points = torch.randn(20, module.vector_dim), torch.randn(2, module.vector_dim)

    def chunk():
        return [RowChunk(torch.arange(20), unit_directions(records, points), slice(0, 2))]

    with pytest.raises(PrivacyProtocolError, match="PublicRows only"):
        module.reference(chunk(), (2, module.vector_dim), number=9, num_rows=20)

    session = module._session
    session.begin_step()
    session._may_release = lambda *_: None
    session.ledger, session._noise = PrivacyLedger(session.ledger.header, None), NoiseSource()
    shape = (4, module.vector_dim)
    released = session.release(chunk(), shape, torch.device("cpu"))
    # The spec speaks of 20 rows per vector (40 records, 2 classes), as many as there are.
    number = released.number
    pushed = session.reference(PublicRows(chunk()), shape, torch.device("cpu"), number=number, num_rows=20)
    torch.testing.assert_close(released.value, pushed)


def test_labels_and_latents_are_public_and_do_not_depend_on_the_data(run_tiny, monkeypatch):
    seen = []

    class Spy(TeacherEnsembleGAN):
        def backward_released(self, outputs, released):
            seen.append(outputs.detach().clone())
            super().backward_released(outputs, released)

    for data_seed in (0, 1):
        module = tiny_gan()
        module.__class__ = Spy
        run_tiny(module=module, data=TinyData(data_seed=data_seed), max_steps=1)
    assert torch.equal(seen[0], seen[1])


def test_the_global_seed_does_not_reach_the_noise(run_tiny):
    values = []
    for _ in range(2):
        torch.manual_seed(7)
        module, *_ = run_tiny(max_steps=1)
        values.append(module.generator.means.detach().clone())
    assert not torch.equal(values[0], values[1])


def test_average_is_what_leaves(run_tiny):
    module, *_ = run_tiny(module=tiny_gan(ema_decay=0.9))
    assert module.released_generator() is module.average.network
    assert not torch.equal(module.average.network.means, module.generator.means)


def test_learning_rate_falls_to_its_share_over_the_planned_run(run_tiny):
    *_, trainer = run_tiny(module=tiny_gan(final_learning_rate_share=0.1, learning_rate=0.5))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05)
    assert trainer.optimizers[0].param_groups[1]["lr"] == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"images_per_step": 5}, "multiple of the 2 classes"),
        ({"images_per_step": 0}, "images_per_step > 0"),
        ({"ema_decay": 1.0}, "ema_decay < 1"),
        ({"final_learning_rate_share": 0.0}, "final_learning_rate_share"),
        ({"repulsion": -1.0}, "repulsion >= 0"),
        ({"learning_rate": float("nan")}, "learning_rate > 0"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigurationError, match=words):
        tiny_gan(**options)


def test_data_that_do_not_fit_the_generator_are_refused(tmp_path):
    other = DCTGenerator((1, 6, 6), num_classes=2, latent_dim=3, num_coefficients=10, width=4)
    module = TeacherEnsembleGAN(other, EnergyTeachers(), LowFrequencyDCT((1, 6, 6), 10), images_per_step=4)
    with pytest.raises(ConfigurationError, match="the data are"):
        trainer_for(tmp_path, callbacks_for()).fit(module, datamodule=TinyData())


class TestPublished:
    def test_round_trip_gives_the_same_samples(self, tmp_path):
        generator = tiny_generator()
        save_released(tmp_path / "release", generator, {"level": "PROVED"})
        again, claim = load_generator(tmp_path)
        assert claim == {"level": "PROVED"}
        for mine, theirs in zip(generator.sample(6, seed=3), again.sample(6, seed=3), strict=True):
            assert torch.equal(mine, theirs)

    def test_a_generator_with_buffers_is_refused(self, tmp_path):
        generator = tiny_generator()
        generator.register_buffer("running_mean", torch.zeros(3))
        with pytest.raises(ConfigurationError, match="running_mean"):
            save_released(tmp_path, generator, {})

    @pytest.mark.parametrize("damage", ["missing", "json", "class", "weights"])
    def test_damaged_releases_are_refused_in_words(self, tmp_path, damage):
        save_released(tmp_path, tiny_generator(), {})
        facts, weights = tmp_path / "generator.json", tmp_path / "generator.safetensors"
        if damage == "missing":
            weights.unlink()
        elif damage == "json":
            facts.write_text("{")
        elif damage == "class":
            facts.write_text(facts.read_text().replace("DCTGenerator", "DCTGenerato"))
        else:
            weights.write_bytes(weights.read_bytes()[:-20])
        with pytest.raises(ConfigurationError, match=r"Expected|not a release|Did you mean|does not hold"):
            load_generator(tmp_path)

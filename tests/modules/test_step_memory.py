"""What a step needs at least is counted from sizes, and a run that cannot fit is refused before it releases."""

import pytest
import torch

from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.discriminator_teachers import DiscriminatorTeachers
from lightning_dp.gradients.energy_teachers import EnergyTeachers
from lightning_dp.modules import step_memory
from lightning_dp.modules.dpsgd import DPSGDClassifier
from lightning_dp.modules.step_memory import check_judging_memory, check_memory, generated_bytes
from lightning_dp.modules.teacher_gan import TeacherEnsembleGAN
from lightning_dp.networks.dcgan import DCGANGenerator
from lightning_dp.networks.scattering import ScatteringClassifier
from lightning_dp.networks.small import MLPDiscriminator, MLPGenerator
from tests.modules.test_release_seam import TinyData, callbacks_for, tiny_gan, trainer_for


def test_images_cost_what_their_layers_save():
    generator = MLPGenerator((1, 8, 8), num_classes=10, latent_dim=5, width=50)
    wide = MLPGenerator((1, 8, 8), num_classes=10, latent_dim=5, width=500)
    # Images as made, as judged and their gradient; layers' inputs lie between one and a few times their width.
    assert generated_bytes(generator, 1000) == 1000 * generated_bytes(generator, 1)
    assert generated_bytes(generator, 1) >= 4 * (3 * 64 + 2 * 50)
    assert 4 * 450 <= generated_bytes(wide, 1) - generated_bytes(generator, 1) <= 4 * 450 * 8


def test_counting_computes_nothing_and_changes_nothing():
    generator = DCGANGenerator((1, 28, 28), num_classes=10)
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    assert generated_bytes(generator, 10**12) > 10**15  # could not be generated
    assert all(torch.equal(before[name], tensor) for name, tensor in generator.state_dict().items())


def test_a_network_that_looks_at_values_costs_its_images():
    class Looks(MLPGenerator):
        def forward(self, latent, labels):
            return super().forward(latent * float(latent.abs().max()), labels)

    assert generated_bytes(Looks((1, 8, 8), num_classes=10, latent_dim=5, width=50), 2) == 2 * 3 * 4 * 64


def test_rows_of_energy_teachers_are_counted_a_chunk_at_a_time():
    teachers = EnergyTeachers(chunk_size=512)
    sizes = {"num_images": 20_000, "vector_dim": 64, "num_classes": 10}
    assert teachers.row_bytes(**sizes, num_records=60_000) == 512 * 3 * 4 * 2000 * 64
    assert teachers.row_bytes(**sizes, num_records=100) == 10 * 3 * 4 * 2000 * 64


def test_a_run_that_cannot_fit_is_refused_before_its_ledger_opens(tmp_path, monkeypatch):
    monkeypatch.setattr(step_memory, "free_memory", lambda device: 1000)
    privatizer, accountant = callbacks_for()
    trainer = trainer_for(tmp_path, [privatizer, accountant])
    with pytest.raises(ConfigurationError, match=r"fit the 0\.0 GB .* for model\.images_per_step=\d+\. Lower that"):
        trainer.fit(tiny_gan(), datamodule=TinyData())
    assert accountant.ledger_path is None or not accountant.ledger_path.exists()
    with pytest.raises(Exception, match="ledger"):
        _ = accountant.ledger


def test_what_is_not_known_refuses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(step_memory, "free_memory", lambda device: None)
    module, (privatizer, _) = tiny_gan(), callbacks_for()
    module.describe_data(TinyData())
    check_memory(module, privatizer.mechanism, torch.device("cpu"))


class TestWhatElseIsCounted:
    def test_teachers_keep_parameters_and_two_moments(self):
        teachers = DiscriminatorTeachers("mlp", num_teachers=7)
        (device, cuda), sizes = (torch.device("cpu"), torch.device("cuda")), {"num_classes": 10}
        parameters = sum(p.numel() for p in MLPDiscriminator((1, 8, 8), 10).parameters())
        assert teachers.state_bytes((1, 8, 8), **sizes, device=device) == 3 * 4 * 7 * parameters
        assert teachers.state_bytes((1, 8, 8), **sizes, device=cuda) == 0  # auto: in memory of the host if need be
        in_files = DiscriminatorTeachers("mlp", num_teachers=7, state_dir="somewhere")
        assert in_files.state_bytes((1, 8, 8), **sizes, device=device) == 0

    @pytest.mark.parametrize("processes", [1, 2])
    def test_processes_share_the_teachers(self, monkeypatch, processes):
        generator = MLPGenerator((1, 8, 8), num_classes=2)
        module = TeacherEnsembleGAN(generator, DiscriminatorTeachers("mlp", num_teachers=20), images_per_step=4)
        module.describe_data(TinyData())
        device = torch.device("cpu")
        kept = sum(module.kept_bytes(device).values())
        assert kept > 4 * sum(module.step_bytes().values())
        monkeypatch.setattr(step_memory, "free_memory", lambda device: 3 * kept // 4)
        mechanism = callbacks_for()[0].mechanism
        if processes == 1:
            with pytest.raises(ConfigurationError, match=r"for model\.teachers\.num_teachers=20\. Lower that"):
                check_memory(module, mechanism, device)
        else:
            check_memory(module, mechanism, device, processes=processes)

    def test_records_of_a_chunk_that_was_asked_for(self):
        network = ScatteringClassifier((1, 8, 8), num_classes=2)
        module = DPSGDClassifier(network, expected_batch_size=20, chunk_size=500)
        module.describe_data(TinyData())
        assert module.step_bytes() == {"model.chunk_size=20": 20 * 5 * 64}  # no more than a batch
        small = DPSGDClassifier(network, expected_batch_size=20, chunk_size=3)
        small.describe_data(TinyData())
        assert small.step_bytes() == {"model.chunk_size=3": 3 * 5 * 64}
        fitted = DPSGDClassifier(network, expected_batch_size=20)
        fitted.describe_data(TinyData())
        assert fitted.step_bytes() == {}

    def test_judging_is_refused_before_the_budget_is_spent(self, monkeypatch):
        monkeypatch.setattr(step_memory, "free_memory", lambda device: 8 * 64 * 1000)
        check_judging_memory((1, 8, 8), 1000)
        with pytest.raises(ConfigurationError, match=r"judging of samples to fit .* for evaluation\.num_samples=1001"):
            check_judging_memory((1, 8, 8), 1001)

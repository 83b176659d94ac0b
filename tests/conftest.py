"""Small stand-ins that every test folder may use; no test reaches a network or an account."""

import os

os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import settings

from callbacks import GradientPrivatizer, PrivacyAccountant
from datamodules.base import ImageDataModule, ImageSplits
from datamodules.catalogue import DatasetFacts
from lightning_dp.accounting.settings import PrivacySettings
from lightning_dp.gradients.discriminator_teachers import DiscriminatorTeachers
from lightning_dp.gradients.energy_teachers import EnergyTeachers
from lightning_dp.mechanisms.topagg import TopAgg
from lightning_dp.modules.teacher_gan import TeacherEnsembleGAN
from lightning_dp.networks.basis import LowFrequencyDCT
from lightning_dp.networks.dct import DCTGenerator

torch.set_num_threads(1)

# The same examples on every machine; `HYPOTHESIS_PROFILE=explore` draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


class TinyData(ImageDataModule):
    """Forty random 8 x 8 images of two classes."""

    facts = DatasetFacts(name="tiny", num_train=40, num_test=20, num_classes=2, image_shape=(1, 8, 8))

    def __init__(self, num_train: int | None = None, steps_per_epoch: int = 7, data_seed: int = 0) -> None:
        super().__init__(num_train=num_train, steps_per_epoch=steps_per_epoch)
        self.data_seed = data_seed

    def read(self) -> ImageSplits:
        stream = torch.Generator().manual_seed(self.data_seed)

        def images(num: int) -> torch.Tensor:
            return torch.randint(0, 256, (num, 1, 8, 8), generator=stream, dtype=torch.uint8)

        return ImageSplits(
            train_images=images(40),
            train_labels=torch.arange(40) % 2,
            test_images=images(20),
            test_labels=torch.arange(20) % 2,
        )


class Blobs(TinyData):
    """All dark images of one class; of the other, with a bright right half."""

    def read(self) -> ImageSplits:
        splits = super().read()
        splits.train_images[:] = 20
        splits.train_images[splits.train_labels == 1, :, :, 4:] = 220
        return splits


def tiny_generator() -> DCTGenerator:
    return DCTGenerator((1, 8, 8), num_classes=2, latent_dim=3, num_coefficients=10, width=4)


def tiny_gan(**options) -> TeacherEnsembleGAN:
    """Class-wise one-record energy teachers in a public basis."""
    torch.manual_seed(0)
    defaults = {"images_per_step": 4, "repulsion": 1.0, "pool_per_class": 5, "public_seed": 0}
    return TeacherEnsembleGAN(
        tiny_generator(), EnergyTeachers(), LowFrequencyDCT((1, 8, 8), 10), **{**defaults, **options}
    )


def tiny_discriminator_gan(**options) -> TeacherEnsembleGAN:
    """Four trained MLP teachers on pixels."""
    torch.manual_seed(0)
    teachers = DiscriminatorTeachers("mlp", num_teachers=4, batch_size=5, train_steps=1, pretrain_steps=2)
    return TeacherEnsembleGAN(tiny_generator(), teachers, **{"images_per_step": 6, "public_seed": 0, **options})


def settings(**options) -> PrivacySettings:
    return PrivacySettings(**{"neighboring_relation": "replace_one", "target_epsilon": 5.0, **options})


def callbacks_for(mechanism=None, ledger_path=None, **options) -> list[pl.Callback]:
    accountant = PrivacyAccountant(privacy=settings(**options), ledger_path=ledger_path)
    privatizer = GradientPrivatizer(mechanism=mechanism or TopAgg(top_k=4), accountant=accountant)
    return [privatizer, accountant]


def trainer_for(tmp_path, callbacks, max_steps=5, **options) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "max_steps": max_steps,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(**{**defaults, **options, "callbacks": [*callbacks, *options.get("callbacks", [])]})


@pytest.fixture
def run_tiny(tmp_path):
    """Train a tiny GAN and return (module, privatizer, accountant, trainer)."""

    def run(module=None, data=None, mechanism=None, max_steps=5, ledger_path=None, trainer_options=None, **privacy):
        privatizer, accountant = callbacks_for(mechanism, ledger_path, **privacy)
        trainer = trainer_for(tmp_path, [privatizer, accountant], max_steps, **(trainer_options or {}))
        module = module or tiny_gan()
        trainer.fit(module, datamodule=data or TinyData())
        return module, privatizer, accountant, trainer

    return run

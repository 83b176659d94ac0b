"""Trainers, networks and callbacks under which the seam would leak are refused before a record is read."""

import dataclasses

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from callbacks import GradientPrivatizer, PrivacyAccountant, PrivateCheckpoint
from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.base import ContributionSpec
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.modules.base import PrivateModule
from tests.conftest import TinyData, callbacks_for, tiny_gan, trainer_for
from tests.modules.test_release_seam import fit


class TestUnsafeSettings:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"gradient_clip_val": 1.0}, "gradient_clip_val"),
            ({"accumulate_grad_batches": 2}, "accumulate_grad_batches"),
        ],
    )
    def test_trainer_settings_that_spoil_the_guarantee_are_refused(self, tmp_path, options, words):
        # Lightning refuses both under manual optimisation; the privatizer does not rely on that.
        with pytest.raises(MisconfigurationException):
            fit(tmp_path, tiny_gan(), **options)
        privatizer, accountant = callbacks_for()
        trainer = trainer_for(tmp_path, [privatizer, accountant], **options)
        with pytest.raises(ConfigurationError, match=words):
            privatizer.setup(trainer, tiny_gan(), "fit")

    def test_fp16_scaling_is_refused(self, tmp_path):
        privatizer, accountant = callbacks_for()
        trainer = trainer_for(tmp_path, [privatizer, accountant])
        trainer.strategy.precision_plugin.precision = "16-mixed"
        with pytest.raises(ConfigurationError, match="precision"):
            trainer.fit(tiny_gan(), datamodule=TinyData())

    def test_batch_norm_under_per_record_clipping_is_refused(self, tmp_path):
        class PerRecord(PrivateModule):
            def __init__(self):
                super().__init__()
                self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

            def contribution_spec(self):
                return ContributionSpec.records(expected_batch_size=8, vector_dim=10)

            def released_networks(self):
                return {"net": self.net}

            def configure_optimizers(self):
                return torch.optim.SGD(self.net.parameters(), lr=0.1)

            def training_step(self, batch, batch_idx):
                return None

        with pytest.raises(ConfigurationError, match=r"net\.1"):
            fit(tmp_path, PerRecord(), callbacks=callbacks_for(Gaussian()))

    def test_a_missing_accountant_is_refused(self, tmp_path):
        privatizer, _ = callbacks_for()
        with pytest.raises(ConfigurationError, match="lose the ledger"):
            fit(tmp_path, tiny_gan(), callbacks=[privatizer])

    def test_two_privatizers_are_refused(self, tmp_path):
        first, accountant = callbacks_for()

        class Other(GradientPrivatizer):
            state_key = "other"

        second = Other(mechanism=Gaussian(), accountant=accountant)
        with pytest.raises(ConfigurationError, match="one GradientPrivatizer"):
            fit(tmp_path, tiny_gan(), callbacks=[first, second, accountant])

    def test_a_module_without_the_seam_is_refused(self, tmp_path):
        class Plain(pl.LightningModule):
            def training_step(self, batch, batch_idx):
                return None

            def configure_optimizers(self):
                return None

        with pytest.raises(ConfigurationError, match="needs a PrivateModule"):
            fit(tmp_path, Plain())

    def test_plans_hold_no_tensors(self):
        """Events and bounds are computed from public facts: nothing in a plan can carry data."""
        module = tiny_gan()
        privatizer, _ = callbacks_for()
        privatizer.plan_run(module, TinyData(), 5)
        values = dataclasses.asdict(privatizer.plan)["spec"] | {"noise": privatizer.plan.noise_multiplier}
        assert not any(isinstance(value, torch.Tensor) for value in values.values())


def test_planning_reads_no_record():
    class Unreadable(TinyData):
        def read(self):
            raise AssertionError("records were read while the plan was made")

    privatizer, accountant = callbacks_for()
    budget = privatizer.plan_run(tiny_gan(), Unreadable(), 5)
    assert budget.num_releases == 5
    assert isinstance(accountant, PrivacyAccountant)


class TestCheckpoints:
    def test_the_one_that_lightning_adds_is_refused(self, tmp_path):
        """The broken twin is a plain Trainer: it would leave teachers in ./checkpoints for all to read."""
        with pytest.raises(ConfigurationError, match="ModelCheckpoint would write teachers"):
            fit(tmp_path, tiny_gan(), enable_checkpointing=True)
        assert not list(tmp_path.rglob("*.ckpt"))

    def test_ours_makes_a_folder_for_its_owner_alone(self, tmp_path):
        privatizer, accountant = callbacks_for()
        ours = PrivateCheckpoint(path=tmp_path / "kept" / "last.ckpt", accountant=accountant)
        fit(tmp_path, tiny_gan(), callbacks=[privatizer, accountant, ours], enable_checkpointing=True)
        assert (tmp_path / "kept" / "last.ckpt").exists()
        assert (tmp_path / "kept").stat().st_mode & 0o077 == 0

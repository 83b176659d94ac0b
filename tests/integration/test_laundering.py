"""No run may leave out what its generator learned from, or the conditions under which that was released."""

import re

import pytest
import pytorch_lightning as pl
import torch

from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import ConfigurationError, PrivacyProtocolError
from lightning_dp.mechanisms.adaptive import AdaptiveGaussian
from tests.cli.runs import read_json
from tests.conftest import TinyData, callbacks_for, tiny_discriminator_gan, tiny_gan, trainer_for
from tests.modules.test_dpgan import tiny_dpgan

SHORT = ("--trainer.max_steps", "2", "--evaluate", "false")
LONG = ("--trainer.max_steps", "4", "--evaluate", "false", "--privacy.target_epsilon", "20")


class TestAnotherRunFolder:
    @pytest.mark.parametrize(
        ("flag", "value", "name"),
        [("--privacy.insecure_seed", "1", "unverified"), ("--telemetry.raw", "true", "conditional_on")],
    )
    def test_conditions_of_the_old_run_are_not_dropped(self, fit, tmp_path, flag, value, name):
        old, new = tmp_path / "old", tmp_path / "new"
        assert fit(*SHORT, "--run_dir", old, flag, value).code == 0
        outcome = fit(*LONG, "--run_dir", new, "--ckpt_path", old / "private" / "last.ckpt")
        assert outcome.code == 2
        assert name in outcome.err
        assert len(outcome.err.splitlines()) == 1
        assert not (new / "claim.json").exists()
        # Under the old conditions it may go on, and still says so; beyond its plan in its own folder only.
        assert fit(*LONG, "--run_dir", old, "--ckpt_path", "last", flag, value).code == 0
        claim = read_json(old / "claim.json")
        assert claim["num_releases"] == 4
        assert claim["assumptions"]

    def test_a_longer_plan_does_not_take_in_a_shorter_run(self, fit, tmp_path):
        """It would read as if the longer plan had been fixed before the first release."""
        old, noise = tmp_path / "old", ("--privacy.noise_multiplier", "20", "--privacy.target_epsilon", "null")
        assert fit(*SHORT, *noise, "--run_dir", old).code == 0
        longer = ("--trainer.max_steps", "4", "--evaluate", "false", *noise)
        outcome = fit(*longer, "--run_dir", tmp_path / "new", "--ckpt_path", old / "private" / "last.ckpt")
        assert outcome.code == 2
        assert "planned=" in outcome.err
        assert fit(*longer, "--run_dir", old, "--ckpt_path", "last").code == 0
        claim = read_json(old / "claim.json")
        assert (claim["level"], claim["num_releases"], claim["planned_releases"]) == ("UNVERIFIED", 4, 2)

    def test_another_partition_is_refused_wherever_the_run_goes_on(self, fit, tmp_path):
        """One record would sit in two trained teachers."""
        old = tmp_path / "old"
        assert fit(*SHORT, "--run_dir", old).code == 0
        other = ("--model.partition_key", "1")
        for flags in (
            ("--run_dir", old, "--ckpt_path", "last"),
            ("--run_dir", tmp_path / "new", "--ckpt_path", old / "private" / "last.ckpt"),
        ):
            outcome = fit(*LONG, *flags, *other)
            assert outcome.code == 2
            assert "plan" in outcome.err
            assert re.search(r"partition_key('?: |=)1", outcome.err)
            assert len(outcome.err.splitlines()) == 1
        assert fit(*LONG, "--run_dir", old, "--ckpt_path", "last").code == 0

    def test_a_checkpoint_without_its_ledger_is_refused(self, fit, tmp_path):
        old, emptied = tmp_path / "old", tmp_path / "emptied.ckpt"
        assert fit(*SHORT, "--run_dir", old).code == 0
        checkpoint = torch.load(old / "private" / "last.ckpt", weights_only=True)
        torch.save(checkpoint | {"callbacks": {}}, emptied)
        outcome = fit(*LONG, "--run_dir", tmp_path / "new", "--ckpt_path", emptied)
        assert outcome.code != 0
        assert "learned from 2 releases, but the ledger holds 0" in outcome.err
        assert len(outcome.err.splitlines()) == 1
        assert len(PrivacyLedger.read(tmp_path / "new" / "ledger.jsonl")) == 0


class TestSecondFit:
    @pytest.mark.parametrize("make", [tiny_gan, tiny_discriminator_gan])
    def test_fresh_callbacks_cannot_forget_the_first(self, tmp_path, make):
        module = make()
        trainer_for(tmp_path, callbacks_for(), 3).fit(module, datamodule=TinyData())
        with pytest.raises(PrivacyProtocolError, match="learned from 3 releases, but the ledger holds 0"):
            trainer_for(tmp_path, callbacks_for(), 3).fit(module, datamodule=TinyData())

    def test_an_adaptive_mechanism_brings_nothing_from_the_first(self, tmp_path):
        """Its clipping norm follows from releases of the first run, which the ledger of the second does not hold."""
        mechanism, norms = AdaptiveGaussian(initial_norm=0.1), []

        class Watch(pl.Callback):
            def on_train_start(self, trainer, pl_module):
                norms.append(mechanism.max_grad_norm)

        for _ in range(2):
            privacy = {"target_epsilon": None, "noise_multiplier": 8.0, "neighboring_relation": "add_or_remove_one"}
            callbacks = [*callbacks_for(mechanism, **privacy), Watch()]
            trainer_for(tmp_path, callbacks, 3).fit(tiny_dpgan(), datamodule=TinyData())
            assert mechanism.max_grad_norm != 0.1
        assert norms == [0.1, 0.1]

    def test_but_a_resumed_run_goes_on_at_the_norm_that_it_had_reached(self, tmp_path):
        """The other way round: forgetting at set-up comes before the checkpoint is loaded."""
        path, checkpoint = tmp_path / "ledger.jsonl", tmp_path / "last.ckpt"
        privacy = {"target_epsilon": None, "noise_multiplier": 8.0, "neighboring_relation": "add_or_remove_one"}
        first, second, norms = AdaptiveGaussian(initial_norm=0.1), AdaptiveGaussian(initial_norm=0.1), []
        trainer = trainer_for(tmp_path, callbacks_for(first, path, **privacy), 3)
        trainer.fit(tiny_dpgan(), datamodule=TinyData())
        trainer.save_checkpoint(checkpoint)

        class Watch(pl.Callback):
            def on_train_start(self, trainer, pl_module):
                norms.append(second.max_grad_norm)

        trainer = trainer_for(tmp_path, [*callbacks_for(second, path, **privacy), Watch()], 5)
        trainer.fit(tiny_dpgan(), datamodule=TinyData(), ckpt_path=checkpoint, weights_only=True)
        assert norms == [first.max_grad_norm] != [0.1]

    def test_the_same_ledger_file_goes_on(self, tmp_path):
        module, path = tiny_gan(), tmp_path / "ledger.jsonl"
        for steps in (2, 4):
            callbacks = callbacks_for(ledger_path=path, target_epsilon=None, noise_multiplier=5.0)
            trainer_for(tmp_path, callbacks, steps).fit(module, datamodule=TinyData())
        assert len(PrivacyLedger.read(path)) == 4

    @pytest.mark.parametrize("is_copied", [False, True], ids=["the module", "its weights"])
    def test_the_ledger_of_another_run_is_not_its_own(self, tmp_path, is_copied):
        """It holds as many releases as the module learned from; the broken version compares numbers alone."""
        first, other = tiny_gan(), tmp_path / "other.jsonl"
        privacy = {"target_epsilon": None, "noise_multiplier": 5.0}
        trainer_for(tmp_path, callbacks_for(**privacy), 2).fit(first, datamodule=TinyData())
        trainer_for(tmp_path, callbacks_for(ledger_path=other, **privacy), 3).fit(tiny_gan(), datamodule=TinyData())
        module = first
        if is_copied:
            module = tiny_gan()
            module.load_state_dict(first.state_dict())
        trainer = trainer_for(tmp_path, callbacks_for(ledger_path=other, **privacy), 5)
        with pytest.raises(PrivacyProtocolError, match="3 of other processes"):
            trainer.fit(module, datamodule=TinyData())

    def test_the_number_is_saved_with_the_weights(self, tmp_path):
        """Whatever a method does in its own checkpoint hooks."""
        module, path = tiny_gan(), tmp_path / "ledger.jsonl"
        trainer = trainer_for(tmp_path, callbacks_for(ledger_path=path), 3)
        trainer.fit(module, datamodule=TinyData())
        copied = tiny_gan()
        copied.load_state_dict(module.state_dict())
        with pytest.raises((PrivacyProtocolError, ConfigurationError), match="learned from 3 releases"):
            trainer_for(tmp_path, callbacks_for(), 3).fit(copied, datamodule=TinyData())

    def test_another_law_of_noise_is_refused(self, fit, tmp_path):
        """A run begun under another default keeps its epsilon, with the noise that it was planned with."""
        old = tmp_path / "old"
        floating = ("--mechanism.noise", "gaussian")
        assert fit(*SHORT, "--run_dir", old, *floating).code == 0
        outcome = fit(*LONG, "--run_dir", old, "--ckpt_path", "last")
        assert outcome.code == 2
        assert "noise='gaussian', now noise='rounded_gaussian'" in outcome.err
        assert fit(*SHORT, "--run_dir", old, "--ckpt_path", "last", *floating).code == 0
        assert read_json(old / "claim.json")["level"] == "PROVED"

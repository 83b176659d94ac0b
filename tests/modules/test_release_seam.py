"""The seam refuses every way around `release` that we could think of."""

import copy
import gc
import weakref

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_dp.errors import PrivacyProtocolError
from lightning_dp.gradients.teachers import RowChunk
from lightning_dp.modules.guard import ReleaseGuard
from lightning_dp.modules.published import save_released
from lightning_dp.modules.release import Released, ReleaseSession
from lightning_dp.modules.teacher_gan import TeacherEnsembleGAN
from tests.conftest import TinyData, callbacks_for, tiny_gan, trainer_for

ROWS = torch.randn(4, 2, 10)


def chunk(rows=ROWS, queries=slice(0, 2)):
    return [RowChunk(teacher_ids=torch.arange(len(rows)), values=rows, queries=queries)]


def fit(tmp_path, module, callbacks=None, **options):
    trainer = trainer_for(tmp_path, callbacks if callbacks is not None else callbacks_for(), **options)
    trainer.fit(module, datamodule=TinyData())
    return trainer


class TestNoWayAround:
    def test_release_without_a_privatizer_is_refused(self):
        with pytest.raises(PrivacyProtocolError, match="No GradientPrivatizer is attached"):
            tiny_gan().release(chunk(), (2, 10))

    def test_training_without_a_privatizer_is_refused_before_the_first_step(self, tmp_path):
        module = tiny_gan()
        before = [p.clone() for p in module.parameters()]
        with pytest.raises(PrivacyProtocolError, match="No GradientPrivatizer"):
            fit(tmp_path, module, callbacks=[])
        assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))

    def test_two_releases_in_one_step_are_refused(self, tmp_path):
        class Twice(TeacherEnsembleGAN):
            def backward_released(self, outputs, released):
                self.release(chunk(), (2, 10))

        with pytest.raises(PrivacyProtocolError, match="called twice"):
            fit(tmp_path, as_class(Twice))

    def test_a_step_without_a_release_is_refused(self, tmp_path):
        class Never(TeacherEnsembleGAN):
            def training_step(self, batch, batch_idx):
                return None

        with pytest.raises(PrivacyProtocolError, match="without a release"):
            fit(tmp_path, as_class(Never))

    def test_a_step_on_an_unreleased_gradient_is_refused(self, tmp_path):
        class Direct(TeacherEnsembleGAN):
            """The bug: back-propagates a loss on private images next to the release."""

            def backward_released(self, outputs, released):
                real = self.trainer.datamodule.train_images.float() / 255
                (outputs.mean() - real.mean()).square().backward()

        with pytest.raises(PrivacyProtocolError, match="did not come from a release"):
            fit(tmp_path, as_class(Direct))

    def test_a_gradient_changed_after_its_release_is_refused(self, tmp_path):
        class Adds(TeacherEnsembleGAN):
            """The bug: a private regulariser accumulates into the released gradient."""

            def backward_released(self, outputs, released):
                super().backward_released(outputs, released)
                next(self.generator.parameters()).grad.add_(1e-9)

        with pytest.raises(PrivacyProtocolError, match="did not come from a release"):
            fit(tmp_path, as_class(Adds))

    def test_a_replaced_gradient_is_refused(self, tmp_path):
        class Replaces(TeacherEnsembleGAN):
            def backward_released(self, outputs, released):
                super().backward_released(outputs, released)
                for parameter in self.generator.parameters():
                    parameter.grad = 2 * parameter.grad

        with pytest.raises(PrivacyProtocolError, match="did not come from a release"):
            fit(tmp_path, as_class(Replaces))

    def test_a_gradient_changed_behind_its_version_is_refused(self, tmp_path):
        class Writes(TeacherEnsembleGAN):
            def backward_released(self, outputs, released):
                super().backward_released(outputs, released)
                next(self.generator.parameters()).grad.data.add_(1e-3)

        with pytest.raises(PrivacyProtocolError, match="did not come from a release"):
            fit(tmp_path, as_class(Writes))

    def test_overriding_a_hook_does_not_open_the_door(self, tmp_path):
        class Forgets(TeacherEnsembleGAN):
            """The bug: hooks without super(), and a private gradient."""

            def on_train_start(self):
                pass

            def on_train_batch_start(self, batch, batch_idx):
                pass

            def on_train_batch_end(self, outputs, batch, batch_idx):
                pass

            def backward_released(self, outputs, released):
                outputs.sum().backward()

        with pytest.raises(PrivacyProtocolError, match="did not come from a release"):
            fit(tmp_path, as_class(Forgets))

    def test_a_closure_that_computes_another_gradient_is_refused(self, tmp_path):
        class Closes(TeacherEnsembleGAN):
            def backward_released(self, outputs, released):
                super().backward_released(outputs, released)
                optimizer = self.optimizers().optimizer

                def closure():
                    self.generator.means.grad = torch.ones_like(self.generator.means)

                optimizer.step(closure)

        with pytest.raises(PrivacyProtocolError, match="did not come from a release"):
            fit(tmp_path, as_class(Closes))

    @pytest.mark.parametrize("edit", ["optimizer", "in place"])
    def test_parameters_that_move_outside_a_guarded_step_are_refused(self, tmp_path, edit):
        class Moves(TeacherEnsembleGAN):
            def training_step(self, batch, batch_idx):
                super().training_step(batch, batch_idx)
                if edit == "in place":
                    self.generator.means.data.add_(1e-3)
                    return
                own = torch.optim.SGD([self.generator.means], lr=0.1)
                self.generator.means.grad = torch.ones_like(self.generator.means)
                own.step()

        with pytest.raises(PrivacyProtocolError, match="changed outside a step"):
            fit(tmp_path, as_class(Moves))

    @pytest.mark.parametrize("part", ["average", "followed"])
    def test_an_average_takes_in_what_guarded_steps_left_and_nothing_else(self, tmp_path, part):
        """It is what is published, and no optimizer holds it."""

        class Edits(TeacherEnsembleGAN):
            def finish_step(self, **options):
                edited = self.average.network if part == "average" else self.generator
                before = edited.means.clone()
                edited.means.data.add_(1e-3)
                super().finish_step(**options)
                edited.means.data.copy_(before)

        with pytest.raises(PrivacyProtocolError, match="changed outside a step"):
            fit(tmp_path, as_class(Edits, ema_decay=0.5))

    @pytest.mark.parametrize("ema_decay", [0.0, 0.5])
    @pytest.mark.parametrize("way", ["parameter", "network", "options", "another"])
    def test_what_stands_in_the_place_of_a_watched_network_is_not_published(self, tmp_path, ema_decay, way):
        """The broken version compares the parameters that were there at first, which nobody touches."""
        module = tiny_gan(ema_decay=ema_decay)
        fit(tmp_path, module)
        module.check_published()
        published = module.released_model()
        if way == "parameter":
            published.means = nn.Parameter(published.means.detach() + 1e-3)
        elif way == "options":
            published.latent_dim += 1
        else:
            other = copy.deepcopy(published)
            other.means.data.add_(1e-3)
            if way == "another":
                module.released_model = lambda: other
            elif ema_decay:
                module.average.network = other
            else:
                module.generator = other
        with pytest.raises(PrivacyProtocolError, match=r"changed|nobody watches"):
            module.check_published()

    def test_an_average_that_was_edited_at_the_end_is_not_published(self, tmp_path):
        module = tiny_gan(ema_decay=0.5)
        fit(tmp_path, module)
        module.check_published()
        module.average.network.means.data.add_(1e-3)
        with pytest.raises(PrivacyProtocolError, match="changed outside a step"):
            module.check_published()

    @pytest.mark.parametrize("ema_decay", [0.0, 0.5])
    def test_whoever_saves_by_hand_is_held_to_the_guard_as_well(self, tmp_path, ema_decay):
        module = tiny_gan(ema_decay=ema_decay)
        fit(tmp_path, module)
        network = module.released_model()
        save_released(tmp_path / "right", network, {})
        network.means.data.add_(1e-3)
        with pytest.raises(PrivacyProtocolError, match="changed outside a step"):
            save_released(tmp_path / "wrong", network, {})
        assert not (tmp_path / "wrong").exists()
        kept = weakref.ref(network)
        del module, network  # is not kept alive for it
        gc.collect()
        assert kept() is None

    def test_a_released_nan_is_not_taken_for_another_gradient(self):
        parameter = nn.Parameter(torch.zeros(2))
        guard, optimizer = ReleaseGuard([parameter]), torch.optim.SGD([parameter], lr=0.1)
        guard.watch(optimizer)
        parameter.grad = torch.tensor([float("nan"), 1.0])
        guard.admit()
        optimizer.step()
        parameter.grad = torch.tensor([float("nan"), 1.0])
        guard.admit()
        optimizer.step()

    def test_stale_private_gradients_cannot_ride_along(self, tmp_path):
        module = tiny_gan()
        poison = torch.full_like(module.generator.means, 1e6)

        class Poisoner(pl.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                pl_module.generator.means.grad = poison.clone()

        fit(tmp_path, module, callbacks=[*callbacks_for(), Poisoner()])
        assert module.generator.means.grad.abs().max() < 1e3

    def test_a_tensor_is_no_released_value(self):
        module = tiny_gan()
        with pytest.raises(PrivacyProtocolError, match="not a tensor"):
            module.backward_released(torch.zeros(2, 10), torch.zeros(2, 10))

    def test_a_released_value_cannot_be_made_by_hand(self):
        with pytest.raises(PrivacyProtocolError, match="release\\(\\) alone"):
            Released(torch.zeros(2), 1, object())

    def test_post_processing_keeps_the_origin(self, tmp_path):
        seen = []

        class Spy(TeacherEnsembleGAN):
            def backward_released(self, outputs, released):
                seen.append(released)
                super().backward_released(outputs, released)

        fit(tmp_path, as_class(Spy))
        assert [released.number for released in seen] == [1, 2, 3, 4, 5]


def as_class(cls, **options):
    """A tiny GAN of another class."""
    module = tiny_gan(**options)
    module.__class__ = cls
    return module


class TestOrderOfTheLedger:
    def test_the_entry_is_on_disk_before_any_noise_is_drawn(self, tmp_path, monkeypatch):
        path = tmp_path / "ledger.jsonl"
        lines_at_noise = []
        original = ReleaseSession.release

        def spying_release(self, *args):
            draw = self._noise.whole
            object.__setattr__(
                self._noise,
                "whole",
                lambda *a, **k: lines_at_noise.append(len(path.read_text().splitlines())) or draw(*a, **k),
            )
            try:
                return original(self, *args)
            finally:
                object.__setattr__(self._noise, "whole", draw)

        monkeypatch.setattr(ReleaseSession, "release", spying_release)
        fit(tmp_path, tiny_gan(), callbacks=callbacks_for(ledger_path=path))
        assert lines_at_noise == [2, 3, 4, 5, 6]  # the header is the first line

    def test_a_failing_teacher_costs_its_release_but_leaks_nothing(self, tmp_path):
        path = tmp_path / "ledger.jsonl"

        class Fails(TeacherEnsembleGAN):
            def release(self, chunks, shape):
                def broken():
                    yield from chunk(torch.ones(1, 2, 10))
                    raise RuntimeError("teacher 3 failed")

                return super().release(broken(), shape)

        with pytest.raises(RuntimeError, match="teacher 3"):
            fit(tmp_path, as_class(Fails), callbacks=callbacks_for(ledger_path=path))
        assert len(path.read_text().splitlines()) == 2


class TestTelemetry:
    def keys(self, tmp_path, raw, name="raw/loss"):
        class Logs(TeacherEnsembleGAN):
            def training_step(self, batch, batch_idx):
                super().training_step(batch, batch_idx)
                self.log(name, self.trainer.datamodule.train_images.float().mean())

        privatizer, accountant = callbacks_for()
        privatizer.raw_telemetry = raw
        trainer = fit(tmp_path, as_class(Logs), callbacks=[privatizer, accountant])
        return set(trainer.callback_metrics), accountant

    def test_raw_numbers_are_dropped(self, tmp_path):
        keys, _ = self.keys(tmp_path, raw=False)
        assert not any(key.startswith("raw/") for key in keys)

    def test_raw_numbers_appear_when_asked_for_and_the_claim_says_so(self, tmp_path):
        keys, accountant = self.keys(tmp_path, raw=True)
        assert {key for key in keys if key.startswith("raw/")} == {"raw/loss", "raw/signal_to_noise"}
        claim = accountant.claim()
        assert (str(claim.level), claim.epsilon) == ("CONDITIONAL", None)
        assert "conditional on: the logs of this run staying private" in claim.statement()

    def test_a_name_that_promises_nothing_is_refused(self, tmp_path):
        with pytest.raises(PrivacyProtocolError, match="does not say"):
            self.keys(tmp_path, raw=True, name="train_loss")


def test_a_copy_of_a_method_averages_its_own_network(tmp_path):
    """A closure over the network would leave the copy's average with the original."""
    module = tiny_gan(ema_decay=0.5)
    copied = copy.deepcopy(module)
    fit(tmp_path, copied, max_steps=2)
    assert copied._follows[0] is copied.generator is not module.generator
    for averaged, first in zip(copied.average.network.parameters(), module.generator.parameters(), strict=True):
        assert not torch.equal(averaged, first)

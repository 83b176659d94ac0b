"""Saves everything that is needed to resume; private, because teachers and optimizer states are in it."""

import os
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from typing_extensions import override

from callbacks.held_interrupt import HeldInterrupt
from callbacks.privacy_accountant import PrivacyAccountant
from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.ranks import ALONE, Ranks
from lightning_dp.modules.base import PrivateModule


class StreamedCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint straight to its file, and maps it into memory when it is read.

    Lightning's own copies all of it in memory first, which an ensemble that lives on a disk does not fit.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "wb", opener=_for_the_owner) as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch turns a short write into a RuntimeError
            Path(path).unlink(missing_ok=True)
            reason = error.strerror if isinstance(error, OSError) else "the disk took only part of it"
            raise ConfigurationError(
                f"The checkpoint {path} could not be written ({reason}); the one before it is whole, and every release "
                "stays charged. Free the disk and go on with the same command and --ckpt_path last."
            ) from error

    @override
    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        _refuse_for(_why_not_whole(Path(path)), Path(path))
        # Nothing but tensors and plain values, whatever was asked: a file may not run code.
        stored: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True, mmap=True)
        return stored


def _for_the_owner(path: str, flags: int) -> int:
    """Open a file that holds teachers and whatever else learned from records, wherever a program puts it."""
    descriptor = os.open(path, flags, 0o600)
    os.fchmod(descriptor, 0o600)  # one that was there before
    return descriptor


def check_checkpoint(path: Path) -> None:
    """Refuse a file that no run has saved, or in which one bit has changed since; nothing in it is executed.

    Raises:
        ConfigurationError: It is no checkpoint, or no whole one.
    """
    reason = _why_not_whole(path)
    if reason is None and "state_dict" not in torch.load(path, map_location="cpu", weights_only=True, mmap=True):
        reason = "no network in it"
    _refuse_for(reason, path)


def _refuse_for(reason: str | None, path: Path) -> None:
    if reason is not None:
        raise ConfigurationError(
            f"Expected the checkpoint of a run (RUN/private/last.ckpt), got {path} ({reason}). Put a whole copy back, "
            "or start a new run in another --run_dir (the epsilon of this one stays spent)."
        )


def _why_not_whole(path: Path) -> str | None:
    """Return why a file is not what `save_checkpoint` wrote; reads all of it, once per process."""
    try:
        found = path.stat()
        return _spoilt(path, found.st_mtime_ns, found.st_size, found.st_ino)
    except OSError as error:
        return str(error.strerror)


@lru_cache(maxsize=4)
def _spoilt(path: Path, *_: int) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return "a part of it was changed"
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return None
    except OSError:
        raise
    except Exception:  # whatever unzipping and unpickling make of a file that is none
        return "not readable as one"


class PrivateCheckpoint(Checkpoint):
    """Saves the newest state of a run: every so many releases, with the last release, and on Ctrl-C.

    The file is replaced at once: a kill while it is written leaves the one before. What is released after it and lost
    in a crash stays charged by the ledger, so a larger `every_n_releases` costs budget in a crash, never privacy.

    Args:
        path: The checkpoint file; a folder that is not there yet is made for its owner alone.
        accountant: Knows how many releases are planned and made.
        every_n_releases: Releases between checkpoints.
    """

    def __init__(self, *, path: Path, accountant: PrivacyAccountant, every_n_releases: int = 100) -> None:
        if every_n_releases < 1:
            raise ConfigurationError(f"Expected checkpoint_every >= 1, got checkpoint_every={every_n_releases}.")
        self.path = path
        self.accountant = accountant
        self.every_n_releases = every_n_releases
        self._saved_step = -1
        self._interrupt: HeldInterrupt | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = StreamedCheckpointIO()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._interrupt = HeldInterrupt(_ranks(pl_module))
        self._interrupt.hold()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # The last state is saved before evaluation begins, which takes longer than a step.
        if trainer.should_stop:
            self._let_go()  # no release follows that could carry the word
        must_stop = _ranks(pl_module).must_stop and not trainer.should_stop
        if must_stop or trainer.should_stop or len(self.accountant.ledger) % self.every_n_releases == 0:
            self._save(trainer)
        if must_stop:
            raise KeyboardInterrupt  # on all processes, after the same release

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._let_go()
        self._save(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._let_go()
        # Alone only: of many processes, one that is here by itself (a second Ctrl-C) would wait for the others.
        if isinstance(exception, KeyboardInterrupt) and trainer.global_step > 0 and trainer.world_size == 1:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        if self._saved_step == trainer.global_step or trainer.global_step == 0:
            return
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            os.replace(part, self.path)

    def _let_go(self) -> None:
        if self._interrupt is not None:
            self._interrupt.let_go()


def _ranks(module: pl.LightningModule) -> Ranks:
    return module.ranks if isinstance(module, PrivateModule) else ALONE

"""Draws a grid of released samples, into the run folder and the loggers that take images."""

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from typing_extensions import override

from lightning_dp.errors import ConfigurationError
from lightning_dp.evaluation.grid import save_sample_grid
from lightning_dp.modules.base import PrivateModule

_logger = logging.getLogger(__name__)


class SampleGrid(pl.Callback):
    """Saves samples of the released generator, one class a row; nothing for methods that train none.

    Args:
        path: The PNG file; overwritten by the newest grid.
        per_class: Images of each class.
        every_n_releases: Also draw during training; null draws at the end only.
        sample_seed: Seed of the samples, the same for every grid of a run.
    """

    def __init__(
        self, *, path: Path, per_class: int = 10, every_n_releases: int | None = None, sample_seed: int = 2
    ) -> None:
        if per_class < 1:
            raise ConfigurationError(f"Expected grid.per_class >= 1, got {per_class=}.")
        if every_n_releases is not None and every_n_releases < 1:
            raise ConfigurationError(f"Expected evaluate_every >= 1 (or null), got evaluate_every={every_n_releases}.")
        self.path = path
        self.per_class = per_class
        self.every_n_releases = every_n_releases
        self.sample_seed = sample_seed
        self._num_batches = 0
        self._is_final = False

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._num_batches += 1
        if self.every_n_releases is not None and self._num_batches % self.every_n_releases == 0:
            self._draw(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer, pl_module)
        self._is_final = True

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A run resumed after its last release trains no more, so nothing was drawn yet.
        if not self._is_final:
            self._draw(trainer, pl_module)

    @rank_zero_only
    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, PrivateModule)
        if not pl_module.makes_images:
            return
        generator = pl_module.released_generator()
        labels = torch.arange(generator.num_classes).repeat_interleave(self.per_class)
        images, labels = generator.sample(len(labels), seed=self.sample_seed, labels=labels)
        try:
            save_sample_grid(self.path, images, labels, per_class=self.per_class)
        except ConfigurationError as error:
            # Diverged samples, say. The budget is spent: claim and release must be written all the same.
            _logger.warning("No grid of samples: %s", error)
            return
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("samples", [str(self.path)], step=trainer.global_step)

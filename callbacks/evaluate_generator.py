"""Judges what a run releases against the real test split, during or after training."""

import logging
import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from typing_extensions import override

from lightning_dp.errors import ConfigurationError
from lightning_dp.evaluation.classification import ClassificationResult
from lightning_dp.evaluation.protocol import EvaluationProtocol, EvaluationResult
from lightning_dp.modules.base import PrivateModule

_logger = logging.getLogger(__name__)


class EvaluateGenerator(pl.Callback):
    """Samples the released generator and logs FID, precision, recall and downstream accuracy; a classifier's accuracy.

    The test split is no part of the training records. Its numbers are for the reader: nothing in the run depends on
    them, and no checkpoint is chosen by them.

    Args:
        protocol: How samples are judged.
        every_n_releases: Also evaluate during training; null evaluates at the end only.
        sample_seed: Seed of the samples.

    Attributes:
        result: The newest.
        time_s: What all of them took.
    """

    def __init__(
        self,
        *,
        protocol: EvaluationProtocol | None = None,
        every_n_releases: int | None = None,
        sample_seed: int = 1,
    ) -> None:
        if every_n_releases is not None and every_n_releases < 1:
            raise ConfigurationError(f"Expected evaluate_every >= 1 (or null), got evaluate_every={every_n_releases}.")
        self.protocol = protocol if protocol is not None else EvaluationProtocol()
        self.every_n_releases = every_n_releases
        self.sample_seed = sample_seed
        self.result: EvaluationResult | ClassificationResult | None = None
        self.time_s = 0.0
        self._num_batches = 0
        self._judged_at = -1

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._num_batches += 1
        if self.every_n_releases is not None and self._num_batches % self.every_n_releases == 0:
            self._evaluate(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._judged_at != self._num_batches:  # nothing was learned since
            self._evaluate(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A run resumed after its last release trains no more, so nothing was judged yet.
        if self.result is None:
            self._evaluate(trainer, pl_module)

    @rank_zero_only
    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, PrivateModule)
        _logger.info("Judging what is released against the real test split ...")
        data, start = trainer.datamodule, time.monotonic()  # type: ignore[attr-defined]
        self._judged_at = self._num_batches
        try:
            with torch.random.fork_rng():
                self.result = pl_module.evaluate_released(
                    data.test_images, data.test_labels, self.protocol, seed=self.sample_seed
                )
        except ConfigurationError as error:
            # Diverged samples, say. The budget is spent: claim and release must be written all the same.
            _logger.warning("What is released could not be judged: %s", error)
            return
        finally:
            self.time_s += time.monotonic() - start
        for logger in trainer.loggers:
            logger.log_metrics(flat_metrics(self.result), step=trainer.global_step)


def flat_metrics(result: EvaluationResult | ClassificationResult) -> dict[str, float]:
    """Return the numbers of an evaluation under the names that loggers see."""
    return {f"eval/{name}": value for name, value in result.metrics().items()}

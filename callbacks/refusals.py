"""What would spoil the guarantee: trainer settings, and layers that couple records; refused before a record is read."""

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import WandbLogger
from torch import nn

from callbacks.private_checkpoint import PrivateCheckpoint
from callbacks.private_ddp import check_strategy
from lightning_dp.errors import ConfigurationError
from lightning_dp.modules.base import PrivateModule

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def refuse_settings(trainer: pl.Trainer, *, raw_telemetry: bool) -> None:
    """Refuse settings under which gradients change after their release, releases mix, or private numbers leave.

    Args:
        trainer: The trainer, with its callbacks and loggers.
        raw_telemetry: Whether numbers without noise are logged.

    Raises:
        ConfigurationError: Gradient clipping, accumulation, fp16, a strategy that averages, numbers without noise sent
            to W&B, or a checkpoint that others could read.
    """
    # Other loggers than W&B are the caller's word.
    if raw_telemetry and any(isinstance(one, WandbLogger) and not one._offline for one in trainer.loggers):
        raise ConfigurationError(
            "telemetry.raw logs numbers without noise, and W&B online would send them away; leave one of them out "
            "(--wandb offline)."
        )
    _refuse_open_checkpoints(trainer)
    _ignore_requeue_signals(trainer)
    if trainer.gradient_clip_val:
        raise ConfigurationError(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val} would change gradients after their release; "
            "leave it out. The mechanism bounds each row by itself."
        )
    if trainer.accumulate_grad_batches != 1:
        raise ConfigurationError(
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} would mix releases; "
            "set it to 1. Rows are chunked inside one release (--model.chunk_size); a larger batch is "
            "--model.expected_batch_size."
        )
    refuse_precision(trainer.precision)
    check_strategy(trainer)


def refuse_precision(precision: str | int) -> None:
    """Refuse precisions in which a step may be skipped; the command line asks before Lightning puts others in place.

    Args:
        precision: As a trainer names it, or as it was asked for.

    Raises:
        ConfigurationError: It is none of those that may be used.
    """
    if str(precision) not in ("32-true", "32", "bf16-mixed", "bf16"):
        raise ConfigurationError(
            f"Expected trainer.precision 32-true or bf16-mixed, got precision={precision}. (fp16 scales losses and "
            "skips steps on overflow, which depends on data without noise.)"
        )


def _refuse_open_checkpoints(trainer: pl.Trainer) -> None:
    """Refuse callbacks that would write teachers where anybody reads them; Lightning adds one unless told not to."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Checkpoint) and not isinstance(callback, PrivateCheckpoint):
            raise ConfigurationError(
                f"{type(callback).__name__} would write teachers and optimizer states where others can read them; pass "
                "Trainer(enable_checkpointing=False), or a callbacks.PrivateCheckpoint, which can resume too."
            )


def _ignore_requeue_signals(trainer: pl.Trainer) -> None:
    """Switch off what Lightning does when SLURM takes a job back: a checkpoint in mid-step, where others read it."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment):
        environment.auto_requeue = False


def refuse_coupled_records(module: PrivateModule) -> None:
    """Refuse layers that mix the records of a batch where each record is bounded by itself.

    Args:
        module: The method, after `describe_data`.

    Raises:
        ConfigurationError: A network normalises over a batch of records.
    """
    if module.contribution_spec().kind != "record":
        return
    # Networks that no record passes through (a generator that learns from a released critic) may mix their own fakes.
    coupled = [
        f"{part}.{name}"
        for part, network in module.networks_of_records().items()
        for name, layer in network.named_modules()
        if isinstance(layer, _BATCH_NORMS)
    ]
    if coupled:
        raise ConfigurationError(
            "Batch normalisation couples the records of a batch, so per-record clipping bounds nothing: "
            f"{', '.join(coupled)}. Use GroupNorm."
        )

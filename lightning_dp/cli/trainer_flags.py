"""Trainer settings of the command line: what the user gave, and what would have to be ignored."""

from typing import Any

from pytorch_lightning.callbacks import Callback, Checkpoint

from callbacks import GradientPrivatizer, PrivacyAccountant
from callbacks.refusals import refuse_precision
from lightning_dp.errors import ConfigurationError


def refuse_own(trainer: Any) -> None:
    """Refuse trainer settings that the command line makes itself, or would have to ignore."""
    for callback in given_callbacks(trainer):
        if isinstance(callback, GradientPrivatizer | PrivacyAccountant):
            raise ConfigurationError(
                f"trainer.callbacks holds a {type(callback).__name__}; --mechanism and --privacy already make one."
            )
        if isinstance(callback, Checkpoint):
            raise ConfigurationError(
                f"trainer.callbacks holds a {type(callback).__name__}, which would write teachers and optimizer states "
                "outside private/; leave it out: the run saves private/last.ckpt itself (--checkpoint_every sets how "
                "often)."
            )
    if trainer.max_epochs not in (None, -1) or trainer.min_epochs is not None or trainer.min_steps is not None:
        raise ConfigurationError(
            "trainer.max_epochs, min_epochs and min_steps fight with the budget, which is planned in releases: leave "
            "them out and set --trainer.max_steps."
        )
    if trainer.max_steps == 0 or trainer.max_steps < -1:
        raise ConfigurationError(
            f"Expected trainer.max_steps >= 1 releases (or -1: as many as the budget holds), got {trainer.max_steps}."
        )
    if trainer.enable_checkpointing is False or trainer.barebones:
        raise ConfigurationError(
            "trainer.enable_checkpointing=false and trainer.barebones leave no way to resume, so a crash would waste "
            "the budget; leave them out (--checkpoint_every sets how often)."
        )
    if trainer.precision is not None:
        refuse_precision(trainer.precision)  # on a CPU, Lightning would make bf16-mixed of 16-mixed
    if trainer.logger not in (None, True, False):
        raise ConfigurationError("trainer.logger is made by --wandb and the run folder; leave it out, or set false.")


def given_callbacks(trainer: Any) -> list[Callback]:
    """Return the user's own callbacks; one alone need not stand in a list."""
    given = trainer.callbacks or []
    return [given] if isinstance(given, Callback) else list(given)

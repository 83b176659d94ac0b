"""The loggers of a run: CSV in the run folder, and W&B, which needs neither account nor network."""

import os
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger


def make_loggers(
    run_dir: Path, config: dict[str, Any], *, name: str, mode: str, project: str, group: str | None, folder: Path
) -> list[Logger]:
    """Return the loggers of one attempt at a run; nothing is written yet.

    Args:
        run_dir: The run folder, which names the run.
        config: The resolved configuration, shown by W&B.
        name: Name of the experiment.
        mode: auto, online, offline or disabled; auto is online when logged in.
        project: W&B project.
        group: W&B group.
        folder: Where logs go: the run folder, or its private part.
    """
    attempt = len(list((folder / "metrics").glob("attempt_*")))
    loggers: list[Logger] = [CSVLogger(folder, name="metrics", version=f"attempt_{attempt}")]
    if mode != "disabled":
        import wandb

        wandb_logger = WandbLogger(
            project=project,
            group=group,
            name=f"{name}-{run_dir.name}",
            save_dir=str(folder),
            offline=mode == "offline" or (mode == "auto" and not is_logged_in()),
            log_model=False,
            config=config,
            # Memory and load, every few seconds, follow the secret size of batches, and would be sent away.
            settings=wandb.Settings(x_disable_stats=os.environ.get("WANDB_X_DISABLE_STATS", "true") != "false"),
        )
        wandb_logger._wandb_init.pop("anonymous", None)  # Lightning passes it, and W&B warns that it means nothing
        loggers.append(wandb_logger)
    return loggers


def finish(loggers: list[Logger]) -> None:
    """End the W&B run of this process, so that the next run does not write into it."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and logger._experiment is not None:
            logger.experiment.finish()


def is_logged_in() -> bool:
    """Tell whether W&B has a key at hand, without asking the network."""
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return "api.wandb.ai" in netrc.read_text()
    except OSError:
        return False

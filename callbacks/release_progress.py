"""A progress bar that counts releases and shows the epsilon spent."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typing_extensions import override

from callbacks.privacy_accountant import PrivacyAccountant
from lightning_dp.evaluation.card_text import ceil_text

_LINES_IN_A_LOG = 10


class ReleaseProgress(ProgressBar):
    """Shows releases made, releases planned, epsilon and time; a line now and then where there is no terminal.

    Where records are sampled, epsilon takes long to compute: the bar shows the last one with its release, lines compute
    their own.

    Args:
        accountant: Knows the ledger.
    """

    def __init__(self, *, accountant: PrivacyAccountant) -> None:
        super().__init__()
        self.accountant = accountant
        self._console = Console()
        self._bar: Progress | None = None
        self._task: Any = None

    @override
    def disable(self) -> None:
        """Do nothing: other ranks never start a bar."""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or not self._console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("releases {task.completed}/{task.total}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[spent]}"),
            console=self._console,
        )
        total = self.accountant.budget.num_releases if self.accountant.budget is not None else None
        self._task = self._bar.add_task("releases", total=total, completed=len(self.accountant.ledger), spent="")
        self._bar.start()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = len(self.accountant.ledger)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, spent=self._spent(done))
            return
        total = self.accountant.budget.num_releases if self.accountant.budget is not None else 0
        if trainer.is_global_zero and total and (done == total or done % max(1, total // _LINES_IN_A_LOG) == 0):
            self.accountant.speak()  # a line stays, so its epsilon is that of its releases
            self._console.print(f"releases {done}/{total}, {self._spent(done)}")

    def _spent(self, done: int) -> str:
        """Return the epsilon in words; one that is behind says of which release it is, for it only grows."""
        epsilon, of = self.accountant.epsilon, self.accountant.epsilon_releases
        if epsilon is None:
            return "no epsilon is proved" if of else ""
        return f"epsilon {ceil_text(epsilon)}" + (f" at release {of}" if of < done else "")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

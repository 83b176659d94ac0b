"""Shows a comparison on a terminal: one line per cell that is settled, one bar per cell that runs."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from callbacks.run_folder import LEDGER_FILE
from lightning_dp.benchmark.backends import Task
from lightning_dp.benchmark.grid import Cell
from lightning_dp.benchmark.plan import CellPlan
from lightning_dp.benchmark.records import CellRecord
from lightning_dp.evaluation.card_text import ceil_text, number_text, seconds_text
from lightning_dp.wording import counted

_STYLES = {"finished": "green", "refused": "yellow", "failed": "red", "interrupted": "yellow", "waiting": "dim"}
_SHOWN = ("accuracy/test", "accuracy/cnn", "accuracy/mlp", "accuracy/logistic", "fid")


class ConsoleReporter:
    """Prints lines that stay, and bars where the console is a terminal.

    Args:
        console: Where to print.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._running: dict[str, tuple[TaskID, Path]] = {}
        self._num_waiting = 0
        self._num_settled = 0
        self._whole: TaskID | None = None

    def planned(self, cell: Cell, plan: CellPlan | None, record: CellRecord, index: int, total: int) -> None:
        """Tell what will become of a cell: refused, finished before, or waiting."""
        self._num_waiting += record.status == "waiting"
        noise = (
            "" if plan is None or plan.noise_multiplier is None else f", noise multiplier {plan.noise_multiplier:.4g}"
        )
        length = "" if plan is None else f"{counted(plan.num_releases, 'release')}{noise}"
        self._line(f"[{index}/{total}]", record, record.reason or length)

    def started(self, task: Task, run_dir: Path, num_releases: int, *, resumed: bool) -> None:
        """Tell that a run began."""
        if self._whole is None:
            self._bars.start()
            self._whole = self._bars.add_task("runs", total=self._num_waiting)
        word = "resumed" if resumed else "started"
        if not self.console.is_terminal:
            self.console.print(Text(f"{word}: {task.name}"), soft_wrap=True)
        self._running[task.name] = (self._bars.add_task(task.name, total=num_releases), run_dir / LEDGER_FILE)

    def ended(self, record: CellRecord) -> None:
        """Tell how a run ended."""
        self._num_settled += 1
        if (found := self._running.pop(record.cell, None)) is not None:
            self._bars.remove_task(found[0])
        if self._whole is not None:
            self._bars.update(self._whole, completed=self._num_settled)
        self._line(f"[{self._num_settled}/{self._num_waiting}]", record, record.reason or _summary(record))

    def tick(self) -> None:
        """Read the number of releases off the ledgers of running cells."""
        if self.console.is_terminal:
            for bar, ledger in self._running.values():
                self._bars.update(bar, completed=_num_releases(ledger))

    def close(self) -> None:
        """Take the bars away."""
        self._bars.stop()

    def _line(self, count: str, record: CellRecord, what: str) -> None:
        line = Text.assemble(
            f"{count} ",
            (f"{record.status:<11}", _STYLES[record.status]),
            f" {record.cell}",
            f": {what}" if what else "",
        )
        self.console.print(line, soft_wrap=True)


def _summary(record: CellRecord) -> str:
    parts = []
    if record.status == "finished":
        parts.append(f"epsilon {ceil_text(record.epsilon)}" if record.epsilon is not None else str(record.level))
        parts += [f"{name} {number_text(record.metrics[name])}" for name in _SHOWN if name in record.metrics]
        if "total_time_s" in record.cost:
            parts.append(seconds_text(record.cost["total_time_s"]))
    return ", ".join(parts)


def _num_releases(ledger: Path) -> int:
    """Return how many releases a ledger holds, while another process writes it."""
    try:
        return max(0, ledger.read_bytes().count(b"\n") - 1)
    except OSError:
        return 0

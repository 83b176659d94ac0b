"""Runs a comparison: plans every cell, runs what is missing in processes of their own, records what became of each."""

import fcntl
import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import yaml

from callbacks.run_folder import LAST_CHECKPOINT, LEDGER_FILE, PRIVATE_FOLDER
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.benchmark.backends import Backend, Task, last_words
from lightning_dp.benchmark.grid import Cell, Grid, merge
from lightning_dp.benchmark.plan import CellPlan, Planner, request_key
from lightning_dp.benchmark.records import (
    RECORDS_FILE,
    CellRecord,
    finished_card,
    finished_record,
    open_record,
    read_records,
    write_records,
)
from lightning_dp.benchmark.reservations import Reservations, Share
from lightning_dp.benchmark.selection import ALL_CELLS, Selection
from lightning_dp.errors import ConfigurationError

RUNS_FOLDER = "runs"
_REQUESTS_FOLDER = "requests"
_LOGS_FOLDER = "logs"
_LOCK_FILE = ".lock"
_INTERRUPTED = 130  # exit code of the command line on Ctrl-C

WandbMode = Literal["auto", "online", "offline", "disabled"]


class Reporter(Protocol):
    """Shows how a comparison gets on."""

    def planned(self, cell: Cell, plan: CellPlan | None, record: CellRecord, index: int, total: int) -> None:
        """Tell what will become of a cell: refused, finished before, or waiting."""

    def started(self, task: Task, run_dir: Path, num_releases: int, *, resumed: bool) -> None:
        """Tell that a run began."""

    def ended(self, record: CellRecord) -> None:
        """Tell how a run ended."""

    def tick(self) -> None:
        """Called a few times a second while runs are going on."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A cell that has to run."""

    cell: Cell
    plan: CellPlan
    key: str
    run_dir: Path
    resumes: bool

    @property
    def share(self) -> Share:
        """What it asks of the budget of its data set."""
        return Share(cell=self.cell.id, data=self.cell.data, run_dir=self.run_dir, plan=self.plan)


class Comparison:
    """The cells of a grid and the folder in which their runs live.

    A run folder is named after its cell and its resolved request, so a changed request gets a new one and what the
    old one spent stays on record.

    Args:
        grid: The grid.
        folder: The comparison's folder; made if missing, continued if not.
        planner: Plans a request as the command line would, without data.
        wandb: W&B mode of every run; None leaves it to the configurations.
        threads: Threads of one run.

    Attributes:
        records: One record per cell, in the grid's order.
        reservations: The cells' shares in the budgets of their data sets; None for a comparison outside of any.
    """

    def __init__(
        self, grid: Grid, folder: Path, *, planner: Planner, wandb: WandbMode | None = None, threads: int = 1
    ) -> None:
        self.grid = grid
        self.folder = folder.resolve()
        self.records: dict[str, CellRecord] = {}
        self._planner = planner
        self._wandb = wandb
        self._threads = threads
        self._jobs: list[_Job] = []
        budget = grid.dataset_budget
        self.reservations = None if budget is None else Reservations(self.folder, budget)

    def plan(self, reporter: Reporter, selection: Selection = ALL_CELLS) -> None:
        """Calibrate the noise of every chosen cell, and refuse those that cannot be, before anything runs.

        Args:
            reporter: Is told of the chosen cells.
            selection: Cells that are to run. The others keep the record that they have for the same request.
        """
        selection.check(self.grid)
        (self.folder / _REQUESTS_FOLDER).mkdir(parents=True, exist_ok=True)
        before = {} if selection == ALL_CELLS else self._records_before()
        self.records, self._jobs = {}, []
        cells = [cell for cell in self.grid.cells() if self._keep_unless_chosen(cell, selection, before)]
        for index, cell in enumerate(cells, start=1):
            planned = self._plan(cell)
            if planned is not None:
                cell, plan, record = planned
                self.records[cell.id] = record
                reporter.planned(cell, plan, record, index, len(cells))
        self.records = self._in_grid_order()
        write_records(self.folder, self.records.values())

    def _in_grid_order(self) -> dict[str, CellRecord]:
        order = itertools.chain.from_iterable((cell.id, cell.without_epsilon().id) for cell in self.grid.cells())
        return {name: self.records[name] for name in dict.fromkeys(order) if name in self.records}

    def _records_before(self) -> Mapping[str, CellRecord]:
        """Return the records of earlier calls; none where there was none."""
        if not (self.folder / RECORDS_FILE).exists():
            return {}
        return {record.cell: record for record in read_records(self.folder)}

    def _keep_unless_chosen(self, cell: Cell, selection: Selection, before: Mapping[str, CellRecord]) -> bool:
        """Tell whether a cell is chosen; if it is not, set the record that it has, or one that says it waits."""
        if selection.has(cell):
            return True
        if cell.without_epsilon().id in self.records:
            return False  # another epsilon's cell stands for it
        for known in (cell, cell.without_epsilon()):  # where a mechanism without privacy runs once for all epsilons
            record = before.get(known.id)
            if record is not None and self._is_request_of(known) and self._has_its_card(record):
                self.records[known.id] = record
                return False
        self.records[cell.id] = open_record(cell, "waiting")
        return False

    def _has_its_card(self, record: CellRecord) -> bool:
        return record.card is None or (self.folder / record.card).is_file()

    def _plan(self, cell: Cell) -> tuple[Cell, CellPlan | None, CellRecord] | None:
        """Return a cell with its plan and first record; None for a run without privacy that is there already."""
        request = self._write_request(cell)
        try:
            plan = self._planner(request)
        except ConfigurationError as error:
            return cell, None, open_record(cell, "refused", reason=" ".join(str(error).split()))
        except Exception as error:  # a constructor's bug ends one cell, not the comparison
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return cell, None, open_record(cell, "refused", reason=reason)
        if not plan.is_private:
            request.unlink()
            cell = cell.without_epsilon()
            if cell.id in self.records:
                return None
            self._write_request(cell)
        return cell, plan, self._find(cell, plan)

    def _find(self, cell: Cell, plan: CellPlan) -> CellRecord:
        """Return the record of a cell whose run may be there already; queue it where it is not."""
        try:
            job, record = self._look_up(cell, plan)
        except ConfigurationError as error:
            return open_record(cell, "failed", plan=plan, reason=str(error))
        if job is not None and self.reservations and (reason := self.reservations.refusal(job.share)) is not None:
            return open_record(cell, "refused", plan=plan, reason=reason)
        if job is not None:
            self._jobs.append(job)
        return record

    def _look_up(self, cell: Cell, plan: CellPlan) -> tuple[_Job | None, CellRecord]:
        key = request_key(plan.resolved)
        for attempt in itertools.count(1):
            again = f"-attempt{attempt}" if attempt > 1 else ""
            run_dir = self.folder / RUNS_FOLDER / f"{cell.id}-{key}{again}"
            waiting = open_record(cell, "waiting", plan=plan)
            if not (run_dir / LEDGER_FILE).exists():
                return _Job(cell=cell, plan=plan, key=key, run_dir=run_dir, resumes=False), waiting
            if (card := finished_card(run_dir, key)) is not None:
                return None, finished_record(cell, card, run_dir, self.folder)
            if can_go_on(run_dir, plan):
                return _Job(cell=cell, plan=plan, key=key, run_dir=run_dir, resumes=True), waiting
        raise AssertionError("itertools.count ends")

    def check_budget(self) -> None:
        """Refuse what `run` would refuse now for want of budget; writes nothing.

        Raises:
            ConfigurationError: The cells that `plan` queued do not fit into the budgets of their data sets.
        """
        if self.reservations is not None:
            self.reservations.check([job.share for job in self._jobs])

    def run(self, backend: Backend, reporter: Reporter) -> None:
        """Run the cells that `plan` queued; a failed one is recorded and the others go on.

        Under a budget all of them are reserved before the first runs.

        Raises:
            ConfigurationError: They do not fit into the budgets of their data sets: then none runs.
            KeyboardInterrupt: After the running cells were interrupted and recorded; the same call goes on later.
        """
        queue = deque(self._jobs)
        running: dict[str, _Job] = {}
        with only_here(self.folder):
            if self.reservations is not None:
                self.reservations.reserve([job.share for job in self._jobs])
            try:
                while queue or running:
                    while queue and len(running) < backend.slots:
                        job = queue.popleft()
                        task = self._task(job)
                        backend.start(task)
                        running[task.name] = job
                        reporter.started(task, job.run_dir, job.plan.num_releases, resumed=job.resumes)
                    for task, code in backend.collect():
                        self._end(running.pop(task.name), task, code, reporter)
                    reporter.tick()
            except KeyboardInterrupt:
                with suppress(KeyboardInterrupt):  # asked twice: they were told, and end by themselves
                    backend.interrupt()
                for job in running.values():
                    self._note(open_record(job.cell, "interrupted", plan=job.plan), reporter)
                raise KeyboardInterrupt("interrupted; the same command goes on where it stopped") from None

    def _end(self, job: _Job, task: Task, code: int, reporter: Reporter) -> None:
        try:
            card = finished_card(job.run_dir, job.key) if code == 0 else None
        except ConfigurationError as error:
            return self._note(open_record(job.cell, "failed", plan=job.plan, reason=str(error)), reporter)
        if card is not None:
            return self._note(finished_record(job.cell, card, job.run_dir, self.folder), reporter)
        reason = last_words(task, code)
        if code == 0:
            reason = f"it ended well, but {job.run_dir} holds no card of it: can every node see that folder?"
        status: Literal["failed", "interrupted"] = "interrupted" if code == _INTERRUPTED else "failed"
        return self._note(open_record(job.cell, status, plan=job.plan, reason=reason), reporter)

    def _note(self, record: CellRecord, reporter: Reporter) -> None:
        if record.reason is not None:  # reports are published, with no path of the machine
            record = replace(record, reason=record.reason.replace(f"{self.folder}/", ""))
        self.records[record.cell] = record
        write_records(self.folder, self.records.values())
        reporter.ended(record)

    def _task(self, job: _Job) -> Task:
        arguments = ["fit", "--config", str(self._request_file(job.cell)), "--run_dir", str(job.run_dir)]
        return Task(
            name=job.cell.id,
            arguments=(
                *arguments,
                *(("--ckpt_path", "last") if job.resumes else ()),
                *(self.reservations.flags(job.share) if self.reservations is not None else ()),
            ),
            folder=Path.cwd(),
            log=self.folder / _LOGS_FOLDER / job.cell.id,
            threads=self._threads,
        )

    def _write_request(self, cell: Cell) -> Path:
        """Write the configuration that `fit` will be given, and return its file."""
        path = self._request_file(cell)
        path.write_text(yaml.safe_dump(self._request(cell), sort_keys=False), encoding="utf-8")
        return path

    def _request(self, cell: Cell) -> dict[str, Any]:
        shown: dict[str, Any] = {"trainer": {"enable_progress_bar": False}}
        if self._wandb is not None:
            shown["wandb"] = self._wandb
        return merge(cell.config, shown)

    def _is_request_of(self, cell: Cell) -> bool:
        """Tell whether the request on disk is what the grid asks of a cell now, wherever it is shown."""
        path = self._request_file(cell)
        if not path.is_file():
            return False
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {**written, "wandb": None} == {**self._request(cell), "wandb": None}

    def _request_file(self, cell: Cell) -> Path:
        return self.folder / _REQUESTS_FOLDER / f"{cell.id}.yaml"


@contextmanager
def only_here(folder: Path) -> Iterator[IO[str]]:
    """Keep a second process from running the same comparison.

    Args:
        folder: The comparison's folder.

    Raises:
        ConfigurationError: One does.
    """
    with (folder / _LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigurationError(
                f"Another process runs the comparison in {folder}. Wait for it, or give another --out."
            ) from None
        yield file


def can_go_on(run_dir: Path, plan: CellPlan) -> bool:
    """Tell whether an unfinished run can still end: all spent, and nothing kept of it, cannot.

    Args:
        run_dir: Its folder.
        plan: Its plan.
    """
    checkpoint = run_dir / PRIVATE_FOLDER / LAST_CHECKPOINT
    return checkpoint.exists() or len(PrivacyLedger.read(run_dir / LEDGER_FILE)) < plan.num_releases

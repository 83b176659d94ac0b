"""Chooses among the cells of a grid on private data and charges the choice: all of them, or a random number of draws.

Two ways to pay. `all`: every candidate runs once, and all of them are composed; everything may be shown. `random`: a
random number of candidates is drawn, each from the list, and the best alone leaves; that costs less than composition,
because neither the number of runs nor anything of the others is told. So the draws, their folders, logs and scores lie
in a private folder, no progress is shown, and the folder is deleted when the best has been published.

The choice is charged before its first run: the ledger of the selection holds it, and the budget of the data set.
"""

import secrets
import shutil
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from callbacks.run_folder import LEDGER_FILE
from lightning_dp.accounting.budget_request import DatasetBudgetSettings, RunRequest
from lightning_dp.accounting.claim import PrivacyClaim
from lightning_dp.accounting.claiming import claim_from_ledger
from lightning_dp.accounting.composition import Counts
from lightning_dp.accounting.coverage import beyond_the_usual, selection_not_covered
from lightning_dp.accounting.dataset_budget import DatasetBudget
from lightning_dp.accounting.events import Sampling
from lightning_dp.accounting.filters import joined
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.accounting.plan import parse_plan, plan_header
from lightning_dp.accounting.selection import RepeatLaw, selection_event
from lightning_dp.benchmark.backends import Backend, Task
from lightning_dp.benchmark.draws import Draws
from lightning_dp.benchmark.grid import Cell, Grid, merge
from lightning_dp.benchmark.plan import CellPlan, Planner, request_key
from lightning_dp.benchmark.records import finished_card
from lightning_dp.benchmark.runner import can_go_on, only_here
from lightning_dp.benchmark.score import Score
from lightning_dp.benchmark.selection import ALL_CELLS, Selection
from lightning_dp.benchmark.tuning_result import Chosen
from lightning_dp.errors import ConfigurationError, LedgerError
from lightning_dp.evaluation.report import RunCard

PRIVATE_FOLDER = "private"
_INTERRUPTED = 130
_SAME = ("dataset", "fingerprint", "relation", "unit", "num_records", "target_delta")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A cell that may be drawn.

    Attributes:
        cell: The cell.
        plan: Its plan.
        request: File of its configuration.
    """

    cell: Cell
    plan: CellPlan
    request: Path


class Tuning:
    """A selection among the cells of a grid, and the folder in which it is made.

    Guarantee: the claim of the published run is that of the whole selection, charged before the first run; draws are
    made once, and a selection that goes on makes those that are left.

    Args:
        grid: Its cells are the candidates; all on one data set.
        folder: Where the best run is published; made if missing, continued if not.
        planner: Plans a request as the command line would, without data.
        score: By what the best is found.
        law: Law of the number of runs; None makes each candidate once, and charges all.
        chosen: Which cells are candidates.
        threads: Threads of one run.

    Attributes:
        candidates: The candidates by id, after `plan`.
    """

    def __init__(
        self,
        grid: Grid,
        folder: Path,
        *,
        planner: Planner,
        score: Score,
        law: RepeatLaw | None,
        chosen: Selection = ALL_CELLS,
        threads: int = 1,
    ) -> None:
        self.grid, self.folder, self.score, self.law = grid, folder.resolve(), score, law
        self.candidates: dict[str, Candidate] = {}
        self.private = self.folder / PRIVATE_FOLDER
        self._planner, self._chosen, self._threads = planner, chosen, threads
        self._run_id = secrets.token_hex(8)

    def plan(self) -> PrivacyClaim:
        """Plan every candidate from public facts, and return what the selection will claim.

        Raises:
            ConfigurationError: A candidate cannot be, has no score, or is on other records than the first.
        """
        self._chosen.check(self.grid)
        cells = {cell.id: cell for cell in self.grid.cells() if self._chosen.has(cell)}
        (self.private / "requests").mkdir(parents=True, exist_ok=True)
        self.private.chmod(0o700)
        for name, cell in cells.items():
            request = self.private / "requests" / f"{name}.yaml"
            shown = {"trainer": {"enable_progress_bar": False}, "wandb": "disabled"}
            request.write_text(yaml.safe_dump(merge(cell.config, shown), sort_keys=False), encoding="utf-8")
            try:
                plan = self._planner(request)
            except ConfigurationError as error:
                raise ConfigurationError(f"The candidate {name} cannot run: {error}") from None
            self.score.check(plan.resolved, name)
            self._check_same(name, plan.header)
            self.candidates[name] = Candidate(cell=cell, plan=plan, request=request)
        ledger = PrivacyLedger(self._header(), None)
        ledger.append_all(self._charge())
        return claim_from_ledger(ledger)

    def check_budget(self) -> None:
        """Refuse a selection that the budget of its data set has no room for; writes nothing."""
        if (settings := self._budget_settings()) is not None and not (self.folder / LEDGER_FILE).exists():
            DatasetBudget(Path(str(settings.folder))).check(settings, [self._asked(self._header())])

    def run(self, backend: Backend) -> Chosen | None:
        """Charge the selection, make its runs, or those that are left of it, and return the best.

        Returns:
            The best run; None if none was drawn or none ended, which are not told apart.

        Raises:
            KeyboardInterrupt: After the running ones were interrupted; the same call goes on with the same draws.
            ConfigurationError: The budget has no room, the folder holds another selection, or a run was interrupted.
        """
        with only_here(self.folder):
            with self._opened() as ledger:
                claim = claim_from_ledger(ledger)
            draws = Draws.read(self.private)
            self._make(backend, draws)
            found = [(place, self._card(place, draws)) for place in range(len(draws.cells))]
        scores = [(self.score.of(card), place, card) for place, card in found if card is not None]
        ended = [(score, place, card) for score, place, card in scores if score is not None]
        if not ended:
            return None
        best, place, card = max(ended, key=lambda one: (one[0], -one[1]))  # of equals, the one drawn first
        everything = {draws.cells[at]: self.score.shown(score) for score, at, _ in ended} if self.law is None else {}
        return Chosen(
            cell=draws.cells[place],
            score=self.score.shown(best),
            card=card,
            run_dir=self._run_dir(place),
            claim=claim,
            run_id=str(ledger.header["run_id"]),
            scores=everything,
        )

    def _opened(self) -> PrivacyLedger:
        """Return the ledger of the selection, which holds its charge; draw once, before that."""
        path, header = self.folder / LEDGER_FILE, self._header()
        is_new = not path.exists()
        ledger = PrivacyLedger(header, path) if is_new else PrivacyLedger.reopen(path)
        try:
            self._check_header(ledger, header)
            if (settings := self._budget_settings()) is not None:
                budget, run = DatasetBudget(Path(str(settings.folder))), str(ledger.header["run_id"])
                budget.reserve(settings, [self._asked(ledger.header, released=len(ledger))])
                ledger.on_append(lambda: budget.note(run, ledger))
                if len(ledger):
                    budget.note(run, ledger)  # refuses an older copy
            if not len(ledger):
                Draws.make(self.private, list(self.candidates), self.law)
                ledger.append_all(self._charge())
            elif not Draws.exist(self.private):
                raise LedgerError(
                    f"{self.folder} has been charged for a selection whose draws are gone; drawing anew would be "
                    "another one. Give another --out (and its price)."
                )
        except BaseException:
            ledger.close()
            if is_new and not len(ledger):
                path.unlink()  # empty, and ours
            raise
        return ledger

    def _make(self, backend: Backend, draws: Draws) -> None:
        waiting = deque(place for place in range(len(draws.cells)) if self._is_open(place, draws))
        running: dict[str, int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < backend.slots:
                    place = waiting.popleft()
                    task = self._task(place, draws)
                    backend.start(task)
                    running[task.name] = place
                for task, code in backend.collect():
                    place = running.pop(task.name)
                    if code not in (0, _INTERRUPTED) or (code == 0 and self._card(place, draws) is None):
                        draws.fail(place)
        except KeyboardInterrupt:
            with suppress(KeyboardInterrupt):  # asked twice: they were told, and end by themselves
                backend.interrupt()
            raise KeyboardInterrupt("interrupted; the same command goes on with the same draws") from None
        if any(self._is_open(place, draws) for place in range(len(draws.cells))):
            raise ConfigurationError("A run was interrupted by somebody else; the same command goes on with it.")

    def _is_open(self, place: int, draws: Draws) -> bool:
        """Tell whether a draw is still to be made; what spent all and kept nothing has failed."""
        if place in draws.failed or self._card(place, draws) is not None:
            return False
        run_dir, plan = self._run_dir(place), self.candidates[draws.cells[place]].plan
        if not (run_dir / LEDGER_FILE).exists() or can_go_on(run_dir, plan):
            return True
        draws.fail(place)
        return False

    def _card(self, place: int, draws: Draws) -> RunCard | None:
        run_dir = self._run_dir(place)
        if place in draws.failed or not run_dir.exists():
            return None
        return finished_card(run_dir, request_key(self.candidates[draws.cells[place]].plan.resolved))

    def _run_dir(self, place: int) -> Path:
        """Return the folder of a draw: a candidate that is drawn twice runs twice, with noise of its own."""
        return self.private / "runs" / f"{place:04d}"

    def _task(self, place: int, draws: Draws) -> Task:
        run_dir, name = self._run_dir(place), f"{place:04d}"
        resume = ("--ckpt_path", "last") if (run_dir / LEDGER_FILE).exists() else ()
        request = str(self.candidates[draws.cells[place]].request)
        return Task(
            name=name,
            arguments=("fit", "--config", request, "--run_dir", str(run_dir), *resume),
            folder=Path.cwd(),
            log=self.private / "logs" / name,
            threads=self._threads,
        )

    def _plans(self) -> list[Counts]:
        return [parse_plan(one.plan.header["planned"]) for one in self.candidates.values()]

    def _charge(self) -> Counts:
        """Return what the selection costs, before anything is drawn."""
        if self.law is None:
            return joined(*self._plans())
        event = selection_event(self._plans(), self.law, relation=self.grid.relation)
        return {(event, Sampling(scheme="full")): 1}

    def _header(self) -> dict[str, Any]:
        headers = [one.plan.header for one in self.candidates.values()]
        mechanisms = ", ".join(_each([str(header["mechanism"])] for header in headers))
        sampled = [how for plan in self._plans() for _, how in plan if not how.executed]
        charge = self._charge()
        return {
            **{name: headers[0].get(name) for name in _SAME},
            "run_id": self._run_id,
            "mechanism": mechanisms if self.law is None else f"the best of a random number of runs of {mechanisms}",
            "accountant": self.grid.accountant if self.law is None else "auto",
            "unverified": [
                *_each(header.get("unverified", ()) for header in headers),
                *["Poisson sampling that was not executed"] * bool(sampled),
                *self.score.unverified(),
            ],
            "conditional_on": _each(header.get("conditional_on", ()) for header in headers),
            "not_covered": [
                *selection_not_covered(charge, is_random=self.law is not None),
                *self.score.not_covered(str(headers[0].get("dataset"))),
                *_each(beyond_the_usual(header.get("not_covered")) for header in headers),
            ],
            "plan": {"candidates": sorted(self.candidates), "score": self.score.name},
            "planned": plan_header(charge),
            "dataset_budget": True if self.grid.dataset_budget is not None else None,
        }

    def _check_header(self, ledger: PrivacyLedger, header: Mapping[str, Any]) -> None:
        for name, value in header.items():
            if name != "run_id" and ledger.header.get(name) != value:
                raise ConfigurationError(
                    f"{self.folder} holds another selection: its {name} is another. Go on with the settings that it "
                    "was begun with, or give another --out."
                )

    def _check_same(self, name: str, header: Mapping[str, Any]) -> None:
        first = next(iter(self.candidates.values()), None)
        for key in _SAME if first is not None else ():
            own = first.plan.header.get(key) if first is not None else None
            if header.get(key) != own:
                raise ConfigurationError(
                    f"Expected all candidates with {key}={own!r}, got {key}={header.get(key)!r} of {name}: one "
                    "selection speaks of one data set. Narrow the grid, or give --only."
                )

    def _budget_settings(self) -> DatasetBudgetSettings | None:
        return self.grid.dataset_budget

    def _asked(self, header: Mapping[str, Any], released: int = 0) -> RunRequest:
        run, needed = str(header["run_id"]), parse_plan(header["planned"])
        return RunRequest(run=run, name=str(self.folder), header=header, needed=needed, released=released)

    def close(self, *, keep: bool) -> None:
        """End the selection: delete what must not leave; where all candidates are charged, show their folders.

        Args:
            keep: Keep the private folder, where nothing was chosen.
        """
        if self.law is None and (self.private / "runs").exists():
            shutil.move(self.private / "runs", self.folder / "runs")
        if not keep and self.private.exists():
            shutil.rmtree(self.private)


def delete_leftovers(folder: Path) -> None:
    """Delete the draws that a crash left behind after the best of them was published.

    Args:
        folder: The selection's folder.
    """
    is_random = any(event.kind == "selection" for event, _ in PrivacyLedger.read(folder / LEDGER_FILE).counts())
    if is_random and (folder / PRIVATE_FOLDER).exists():
        shutil.rmtree(folder / PRIVATE_FOLDER)


def _each(texts: Any) -> list[str]:
    return list(dict.fromkeys(text for part in texts for text in part))

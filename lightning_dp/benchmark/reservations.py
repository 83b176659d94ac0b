"""The shares of a comparison's cells in the budgets of their data sets: one list, reserved before any cell runs."""

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from callbacks.run_folder import LEDGER_FILE
from lightning_dp.accounting.budget_request import DatasetBudgetSettings, RunRequest, check_level
from lightning_dp.accounting.budget_state import BudgetState
from lightning_dp.accounting.dataset_budget import DatasetBudget
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.accounting.plan import parse_plan
from lightning_dp.benchmark.plan import RESERVATIONS_FILE, CellPlan
from lightning_dp.errors import BudgetExceededError, ConfigurationError, LedgerError
from lightning_dp.wording import counted

DATA = "{data}"
"""Stands in the folder of a budget for the label of the data set."""

_MOST_NAMES = 6


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one cell asks.

    Attributes:
        cell: Its id.
        data: Label of its data set.
        run_dir: Its run folder.
        plan: Its plan.
    """

    cell: str
    data: str
    run_dir: Path
    plan: CellPlan


class Reservations:
    """Reserves all runs of a launch together, and remembers under which name each did, so that none does twice.

    Guarantee: no cell runs before all of the launch are reserved; what a cell holds it keeps, whatever becomes of it.

    Args:
        folder: The comparison's folder.
        settings: The budget; `{data}` in its folder stands for the label of the data set.
    """

    def __init__(self, folder: Path, settings: DatasetBudgetSettings) -> None:
        self.folder = folder
        self.settings = settings

    def of(self, data: str) -> DatasetBudgetSettings:
        """Return the budget of a data set, its folder as every working directory finds it."""
        path = Path(str(self.settings.folder).replace(DATA, data)).absolute()
        return replace(self.settings, folder=str(path))

    def refusal(self, share: Share) -> str | None:
        """Return why no budget would take a cell, however much were left; None if one might."""
        try:
            check_level(self._request(share, "planned"), self.of(share.data), Path(str(self.of(share.data).folder)))
        except ConfigurationError as error:
            return str(error)
        return None

    def check(self, shares: Sequence[Share]) -> None:
        """Refuse what `reserve` would refuse now; writes nothing.

        Raises:
            ConfigurationError: As `reserve`.
        """
        names = self._names(shares)
        for settings, group in self._groups(shares):
            requests = [self._request(share, names[share.run_dir.name]) for share in group]
            self._refuse_strangers(settings, requests)
            self._ask(settings, group, requests, is_check=True)

    def reserve(self, shares: Sequence[Share]) -> None:
        """Reserve cells, all or none on each data set; what a run holds already is not reserved twice.

        Args:
            shares: All cells of a launch that are about to run.

        Raises:
            BudgetExceededError: They do not fit; the message says which of them would.
            ConfigurationError: Another data set or relation; or runs in the comparison's folder are in no budget.
            LedgerError: The budget, or a ledger, cannot be read.
        """
        self.check(shares)  # no data set reserves for a launch that another one refuses
        names = self._names(shares)
        self._write(names)
        for settings, group in self._groups(shares):
            requests = [self._request(share, names[share.run_dir.name]) for share in group]
            self._ask(settings, group, requests, is_check=False)

    def flags(self, share: Share) -> tuple[str, ...]:
        """Return the flags under which `fit` finds the share of a cell."""
        settings = self.of(share.data)
        allowed = ("--dataset_budget.allow_unproved", "true") if settings.allow_unproved else ()
        name = self._names([share])[share.run_dir.name]
        return ("--dataset_budget.folder", str(settings.folder), "--dataset_budget.reservation", name, *allowed)

    def states(self, labels: Sequence[str]) -> list[BudgetState]:
        """Return what is reserved in the budgets of these data sets, of those that were opened."""
        folders = dict.fromkeys(Path(str(self.of(label).folder)) for label in labels)
        return [budget.state() for budget in map(DatasetBudget, folders) if budget.exists()]

    def _groups(self, shares: Sequence[Share]) -> list[tuple[DatasetBudgetSettings, list[Share]]]:
        found: dict[DatasetBudgetSettings, list[Share]] = {}
        for share in shares:
            found.setdefault(self.of(share.data), []).append(share)
        return list(found.items())

    def _ask(
        self, settings: DatasetBudgetSettings, group: list[Share], requests: list[RunRequest], *, is_check: bool
    ) -> None:
        budget = DatasetBudget(Path(str(settings.folder)))
        try:
            if is_check:
                budget.check(settings, requests)
            else:
                budget.reserve(settings, requests)
        except BudgetExceededError as error:
            fitting = budget.fitting(settings, requests)
            raise BudgetExceededError(f"{error} {_advice([share.cell for share in group], fitting)}") from None
        except LedgerError:
            raise
        except ConfigurationError as error:
            hint = f" (A folder for each data set: {settings.folder}/{DATA}.)" if "other records" in str(error) else ""
            raise ConfigurationError(f"{error}{hint}") from None

    def _request(self, share: Share, run: str) -> RunRequest:
        header = share.plan.header
        needed = parse_plan(header["planned"])
        return RunRequest(run=run, name=str(share.run_dir), header=header, needed=needed)

    def _names(self, shares: Sequence[Share]) -> dict[str, str]:
        """Return the name of the reservation of each run folder: its ledger's, the one noted before, or a new one."""
        found = read_names(self.folder)
        for share in shares:
            ledger = share.run_dir / LEDGER_FILE
            if ledger.exists():
                found[share.run_dir.name] = str(PrivacyLedger.read(ledger).header.get("run_id"))
            elif share.run_dir.name not in found:
                found[share.run_dir.name] = secrets.token_hex(8)
        return found

    def _write(self, names: Mapping[str, str]) -> None:
        """Note the names on the disk; a crash before they are reserved leaves names that stand for nothing yet."""
        draft = self.folder / f"{RESERVATIONS_FILE}.part"
        with draft.open("w", encoding="utf-8") as file:
            json.dump(dict(names), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, self.folder / RESERVATIONS_FILE)

    def _refuse_strangers(self, settings: DatasetBudgetSettings, requests: Sequence[RunRequest]) -> None:
        """Refuse a folder with runs on these records that no budget, or another one, has charged."""
        budget = DatasetBudget(Path(str(settings.folder)))
        known = budget.state().runs if budget.exists() else {}
        fingerprint = requests[0].header.get("fingerprint")
        for path in sorted(self.folder.glob(f"runs/*/{LEDGER_FILE}")):
            ledger = PrivacyLedger.read(path)
            is_ours = ledger.header.get("fingerprint") == fingerprint and len(ledger)
            if is_ours and str(ledger.header.get("run_id")) not in known:
                raise ConfigurationError(
                    f"{path.parent} has made {counted(len(ledger), 'release')} not charged to the budget in "
                    f"{settings.folder}. Give another --out for a comparison within this budget."
                )


def read_names(folder: Path) -> dict[str, str]:
    """Return the name of the reservation of each run folder of a comparison; empty where none was made.

    Raises:
        LedgerError: The file is none of ours.
    """
    path = folder / RESERVATIONS_FILE
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(found, dict) and all(isinstance(value, str) for value in found.values())):
            raise ValueError("no names of run folders")
        return {str(key): value for key, value in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise LedgerError(f"Expected the reservations of a comparison in {path}, got: {error}.") from None


def _advice(cells: Sequence[str], fitting: Sequence[int]) -> str:
    """Return in words which cells would fit."""
    if not fitting:
        return "None of the cells would fit by itself."
    names = [cells[index] for index in fitting[:_MOST_NAMES]]
    more = f" and {len(fitting) - len(names)} more" if len(fitting) > len(names) else ""
    return f"{len(fitting)} of {len(cells)} cells would fit together: --only {' '.join(names)}{more}"

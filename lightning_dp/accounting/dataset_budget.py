"""One budget for all runs on the same records: each reserves its whole plan before its first release, or is refused."""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.budget_file import BudgetFile, LockedBudgetFile
from lightning_dp.accounting.budget_request import (
    DatasetBudgetSettings,
    RunRequest,
    check_known,
    check_level,
    check_same_data,
    check_terms,
    unit_of,
)
from lightning_dp.accounting.budget_shortage import Shortage, do_fit, shortage_of
from lightning_dp.accounting.budget_state import (
    BudgetState,
    BudgetTerms,
    RunCharge,
    state_of,
)
from lightning_dp.accounting.claim import ClaimLevel
from lightning_dp.accounting.composition import Counts
from lightning_dp.accounting.coverage import beyond_the_usual
from lightning_dp.accounting.events import parse_relation
from lightning_dp.accounting.filters import best_order, joined, rule_for, without_non_private
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.accounting.plan import plan_header
from lightning_dp.errors import BudgetExceededError, ConfigurationError, LedgerError
from lightning_dp.wording import counted


@dataclass
class DatasetBudget:
    """The budget in one folder.

    Guarantee: whatever the runs do, and however each is chosen in view of the others, all of them together stay within
    the budget's epsilon and delta, as long as every run on these records is in it. A reservation is on disk before the
    run's first release; two processes cannot both take the last of it.

    Not covered: runs that were made without this budget; data sets of other fingerprints that hold some of the same
    records; whoever puts the folder back to an older state.

    Args:
        folder: The folder.
    """

    folder: Path
    _file: BudgetFile = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self._file = BudgetFile(self.folder)

    def state(self) -> BudgetState:
        """Return what is reserved, verified line by line.

        Raises:
            LedgerError: Missing, altered or cut.
        """
        return state_of(self._file.read(), self._file.path)

    def exists(self) -> bool:
        """Tell whether the folder holds a budget."""
        return self._file.exists()

    def check(self, settings: DatasetBudgetSettings, requests: Sequence[RunRequest]) -> None:
        """Refuse what `reserve` would refuse now, without writing anything.

        Raises:
            ConfigurationError: As `reserve`.
        """
        state = self.state() if self._file.exists() else self._opened(settings, requests)
        self._missing(state, settings, requests)

    def reserve(self, settings: DatasetBudgetSettings, requests: Sequence[RunRequest]) -> str:
        """Reserve runs that were planned together, all or none; what a run holds already is not reserved twice.

        Args:
            settings: The flags; they found the budget if the folder holds none.
            requests: The runs.

        Returns:
            The id of the budget.

        Raises:
            BudgetExceededError: They would cross the budget; the message says what is left and what would fit.
            ConfigurationError: Another data set, relation, unit or budget, or a run that is not PROVED.
            LedgerError: The budget cannot be read or written.
        """
        with self._file.locked() as file:
            is_new = not file.lines
            state = self._opened(settings, requests) if is_new else state_of(file.lines, self._file.path)
            missing = self._missing(state, settings, requests)
            if is_new:
                file.append(state.terms.to_dict())
            if missing:
                file.append({"kind": "reserve", "runs": missing})
            return state.terms.id

    def fitting(self, settings: DatasetBudgetSettings, requests: Sequence[RunRequest]) -> list[int]:
        """Return which of several runs would fit together now, found by taking each in turn that still fits.

        Args:
            settings: As in `reserve`.
            requests: The runs that were refused together.
        """
        state = self.state() if self._file.exists() else self._opened(settings, requests)
        chosen: list[int] = []
        for index in range(len(requests)):
            asked = [lacking(state, requests[place]) for place in (*chosen, index)]
            if do_fit(state, asked):
                chosen.append(index)
        return chosen

    def lease(self, run: str, ledger: PrivacyLedger, upto: int) -> None:
        """Write down how many releases this process may make: before any beyond what was written down.

        A copy of the run folder, taken at any moment, lacks some of them and would make them again on the same
        reservation: it is refused where it lacks what was noted, and `unseen` charges it for the rest of the lease.
        A process goes on only while no copy has begun to release.

        Args:
            run: Its id.
            ledger: Its ledger, with the release that is about to be made.
            upto: Releases of this process in all that it may make before it asks again.

        Raises:
            LedgerError: The ledger is older than what was noted, or the reservation is gone.
        """
        with self._file.locked() as file:
            writers = ledger.writers()
            _check_not_older(self._charge(file, run), writers, self.folder)
            file.append({"kind": "lease", "run": run, "writers": writers, "writer": ledger.writer, "upto": upto})

    def unseen(self, run: str, ledger: PrivacyLedger) -> dict[str, int]:
        """Return how many releases each process of a run may have made of which its ledger knows nothing.

        Args:
            run: Its id.
            ledger: Its ledger.

        Raises:
            LedgerError: The ledger is older than what was noted.
        """
        charge = self.state().runs.get(run)
        if charge is None:
            return {}
        writers = ledger.writers()
        _check_not_older(charge, writers, self.folder)
        lost = {writer: upto - writers.get(writer, 0) for writer, upto in charge.leases.items()}
        return {writer: count for writer, count in lost.items() if count > 0}

    def note(self, run: str, ledger: PrivacyLedger, *, has_ended: bool = False) -> None:
        """Write down how far each process of a run has come.

        Args:
            run: Its id.
            ledger: Its ledger.
            has_ended: This process makes no release any more; what of its lease it did not use is free again.

        Raises:
            LedgerError: The ledger is older than what was noted, or the reservation is gone.
        """
        with self._file.locked() as file:
            charge = self._charge(file, run)
            writers = ledger.writers()
            _check_not_older(charge, writers, self.folder)
            ended = {"ended": ledger.writer} if has_ended and ledger.writer in charge.leases else {}
            if ended or any(charge.writers.get(writer) != count for writer, count in writers.items()):
                file.append({"kind": "seen", "run": run, "writers": writers, **ended})

    def give_back(self, run: str, ledger: PrivacyLedger | None) -> None:
        """Return the reservation of a run that has released nothing.

        A process that began it elsewhere meanwhile finds no reservation when it is about to draw its first noise.

        Args:
            run: Its id.
            ledger: Its ledger, open for writing, so that no process of the run is at work; None if it never began one.

        Raises:
            ConfigurationError: Something was released, so its plan stays charged.
            LedgerError: It stays charged with others that were admitted as one list, some of which have released.
        """
        with self._file.locked() as file:
            charge = self._charge(file, run)
            if ledger is not None and (ledger.path is None or ledger.header.get("run_id") != run):
                raise ConfigurationError(f"Expected the open ledger of run {run}; only it can show that it is empty.")
            if made := max(len(ledger or ()), sum(charge.writers.values())):
                raise ConfigurationError(
                    f"Run {charge.name!r} has made {counted(made, 'release')}, so its "
                    "whole plan stays charged: a claim states the plan, whatever made the run stop."
                )
            if state_of(file.lines, self._file.path).is_indivisible:
                raise LedgerError(
                    f"Run {charge.name!r} was admitted as part of one list, whose epsilon speaks of all of it, and "
                    "others of the list have released: it stays charged. It may still be made."
                )
            file.append({"kind": "return", "run": run})

    def _charge(self, file: LockedBudgetFile, run: str) -> RunCharge:
        charge = state_of(file.lines, self._file.path).runs.get(run)
        if charge is None:
            raise LedgerError(
                f"The reservation of run {run} is not in {self._file.path} (any more). Nothing may be released on it; "
                "restore the file, or start a new run."
            )
        return charge

    def _opened(self, settings: DatasetBudgetSettings, requests: Sequence[RunRequest]) -> BudgetState:
        """Return the empty state of a budget that these runs would found."""
        header = requests[0].header
        if settings.epsilon is None:
            raise ConfigurationError(
                f"{self.folder} holds no budget of a data set yet: say what all its runs together may spend, with "
                "--dataset_budget.epsilon."
            )
        plans = joined(*(request.needed for request in requests))
        delta = float(header["target_delta"]) if settings.delta is None else settings.delta
        rule, relation = settings.rule or rule_for(plans), parse_relation(str(header["relation"]))
        order = best_order(plans, relation, epsilon=settings.epsilon, delta=delta) if rule == "renyi" else None
        terms = BudgetTerms(
            id=secrets.token_hex(8),
            dataset=str(header.get("dataset", "unknown")),
            fingerprint=str(header.get("fingerprint", "unknown")),
            num_records=header.get("num_records"),
            relation=str(header["relation"]),
            unit=unit_of(str(header["unit"])),
            epsilon=settings.epsilon,
            delta=delta,
            rule=rule,
            order=order,
        )
        _ = terms.filter  # a budget that no rule can keep is refused here
        return BudgetState(terms=terms, path=self._file.path)

    def _missing(
        self, state: BudgetState, settings: DatasetBudgetSettings, requests: Sequence[RunRequest]
    ) -> list[dict[str, Any]]:
        """Return the part of a reserve line for each run that lacks something, if all of it together is admitted."""
        check_terms(state.terms, settings, self.folder)
        lines, missing = [], []
        for request in requests:
            check_same_data(state.terms, request.header)
            check_known(request, is_held=request.run in state.runs, folder=self.folder)
            if lacks := lacking(state, request):
                check_level(request, settings, self.folder)
                lines.append(
                    {
                        "run": request.run,
                        "name": request.name,
                        "mechanism": str(request.header.get("mechanism", "unknown")),
                        "level": str(request.level),
                        "reasons": list(request.reasons),
                        "not_covered": list(beyond_the_usual(request.header.get("not_covered"))),
                        "planned": plan_header(lacks),
                    }
                )
                missing.append(lacks)
        if shortage := shortage_of(state, missing):
            raise BudgetExceededError(_refusal(shortage, state.terms, self.folder))
        return lines


def lacking(state: BudgetState, request: RunRequest) -> Counts:
    """Return what a run asks beyond what it holds."""
    charge = state.runs.get(request.run)
    held: Counts = {} if charge is None else charge.counts
    return {key: count - held.get(key, 0) for key, count in request.needed.items() if count > held.get(key, 0)}


def _refusal(shortage: Shortage, terms: BudgetTerms, folder: Path) -> str:
    """Return in one line what is left and what would fit."""
    fits = []
    if shortage.num_releases is not None:
        fits.append(f"{counted(shortage.num_releases, 'release')} (now {shortage.num_planned})")
    if shortage.epsilon is not None:
        noise = f", noise multiplier about {shortage.noise_multiplier:.4g}" if shortage.noise_multiplier else ""
        fits.append(f"the same at an epsilon of {math.floor(1000 * shortage.epsilon) / 1000:g}{noise}")
    if shortage.num_runs > 1:
        fits = fits[-1:] if shortage.epsilon is not None else []
        fits = [f"{part.partition(',')[0]} for all {shortage.num_runs} runs together" for part in fits]
    would = f"What would fit: {', or '.join(fits)}" if fits else "Nothing of this kind would fit"
    return (
        f"This would cross the budget of {terms.dataset} in {folder} (epsilon={terms.epsilon:g}, "
        f"delta={terms.delta:g}, {terms.relation}): {100 * shortage.left:.3g} % of it is left, and "
        f"{100 * shortage.asked:.3g} % is asked. "
        f"{would}."
    )


def _check_not_older(charge: RunCharge, writers: Mapping[str, int], folder: Path) -> None:
    for writer, count in charge.writers.items():
        if writers.get(writer, 0) < count:
            raise LedgerError(
                f"The budget in {folder} knows {counted(count, 'release')} of run {charge.name!r} by one process, its "
                f"ledger holds {writers.get(writer, 0)} of them: this run folder is an older copy. Go on with the "
                "newer one, whose releases were made."
            )


def epsilon_of_run(charge: RunCharge, terms: BudgetTerms, delta: float) -> float | None:
    """Return what one run's plan costs by itself; None unless it is PROVED."""
    if charge.level is not ClaimLevel.PROVED:
        return None
    return compute_epsilon(without_non_private(charge.counts), delta=delta, relation=terms.relation).epsilon

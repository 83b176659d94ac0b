"""The ledger of a whole comparison: what all of its runs together spent on one data set."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from callbacks.run_folder import LEDGER_FILE
from lightning_dp.accounting.budget_state import BudgetState
from lightning_dp.accounting.claim import ClaimLevel, PrivacyClaim
from lightning_dp.accounting.claiming import ledger_level, make_claim
from lightning_dp.accounting.coverage import DEFAULT_NOT_COVERED, beyond_the_usual
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.accounting.plan import claimed_counts, plan_changes
from lightning_dp.benchmark.runner import RUNS_FOLDER
from lightning_dp.errors import LedgerError
from lightning_dp.wording import counted

_NOT_COVERED = (
    *DEFAULT_NOT_COVERED,
    "runs outside this comparison's folder, such as those by which its settings were chosen",
    "other data sets that hold some of the same records",
)


@dataclass(frozen=True, kw_only=True)
class Spending:
    """What all runs of a comparison spent on one data set under one relation.

    Attributes:
        dataset: Name of the data set; parts of it (`num_train`) share records, so they count together.
        num_runs: Runs with at least one release, unfinished ones included.
        num_proved: Those whose claim is PROVED.
        whole: What may be claimed of everything together.
        proved: What may be claimed of the PROVED runs alone, together; None where there are none, or all are.
        budget: The data set's budget, all runs in it included; None for a comparison outside of any.
    """

    dataset: str
    num_runs: int
    num_proved: int
    whole: PrivacyClaim
    proved: PrivacyClaim | None
    budget: BudgetState | None = None

    def lines(self) -> list[str]:
        """Return what a reader has to know, plainly, one sentence a line."""
        first = f"{self.dataset}: all {counted(self.num_runs, 'run')} together: {self.whole.statement()}"
        lines = [first]
        if self.proved is not None:
            lines.append(
                f"{self.dataset}: the {counted(self.num_proved, 'PROVED run')} alone, together: "
                f"{self.proved.statement()}"
            )
        return lines if self.budget is None else [*lines, budget_line(self.budget)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able values."""
        return {
            "dataset": self.dataset,
            "num_runs": self.num_runs,
            "num_proved": self.num_proved,
            "whole": self.whole.to_dict(),
            "proved": self.proved.to_dict() if self.proved else None,
            **({} if self.budget is None else {"dataset_budget": self.budget.claim().to_dict()}),
        }


def budget_line(state: BudgetState) -> str:
    """Return what is reserved in the budget of a data set, by this comparison and others."""
    terms = state.terms
    return (
        f"{terms.dataset}: its budget (epsilon={terms.epsilon:g} at delta={terms.delta:g}) is reserved to "
        f"{100 * min(1.0, state.spent):.3g} % by {counted(len(state.runs), 'run')}, this comparison's and others; "
        f"all of them: {state.claim().statement()}"
    )


def read_ledgers(folder: Path) -> list[PrivacyLedger]:
    """Return the ledgers of all runs in a comparison's folder, also of unfinished, failed and outdated ones.

    Raises:
        LedgerError: A ledger is altered, so the sum would be a guess.
    """
    found = []
    for path in sorted((folder / RUNS_FOLDER).glob(f"*/{LEDGER_FILE}")):
        try:
            found.append(PrivacyLedger.read(path))
        except LedgerError as error:
            raise LedgerError(f"What the comparison spent cannot be told: {error}") from None
    return found


def total_spending(
    ledgers: Iterable[PrivacyLedger], *, delta: float, budgets: Sequence[BudgetState] = ()
) -> list[Spending]:
    """Compose all ledgers about the same data set under the same relation.

    Args:
        ledgers: Ledgers of runs; those without a release are left out.
        delta: Delta of the statements.
        budgets: Budgets of data sets in which the runs are.

    Returns: One entry per data set and relation. Two relations are never one number.
    """
    used = [ledger for ledger in ledgers if len(ledger)]

    def kind(ledger: PrivacyLedger) -> tuple[str, str]:
        return str(ledger.header.get("dataset", "unknown")), str(ledger.header["relation"])

    groups = itertools.groupby(sorted(used, key=kind), key=kind)
    of = {(state.terms.dataset, state.terms.relation): state for state in budgets}
    return [_spending(name[0], list(group), delta, of.get(name)) for name, group in groups]


def _spending(dataset: str, ledgers: list[PrivacyLedger], delta: float, budget: BudgetState | None) -> Spending:
    proved = [ledger for ledger in ledgers if ledger_level(ledger) is ClaimLevel.PROVED]
    is_all = len(proved) == len(ledgers)
    return Spending(
        dataset=dataset,
        num_runs=len(ledgers),
        num_proved=len(proved),
        whole=_claim(ledgers, delta),
        proved=_claim(proved, delta) if proved and not is_all else None,
        budget=budget,
    )


def _claim(ledgers: Sequence[PrivacyLedger], delta: float) -> PrivacyClaim:
    counts: Counter[Any] = Counter()
    for ledger in ledgers:
        counts.update(claimed_counts(ledger))
    sizes = [ledger.header["num_records"] for ledger in ledgers if "num_records" in ledger.header]
    units = _each(ledger.unit for ledger in ledgers)
    return make_claim(
        counts,
        delta=delta,
        relation=ledgers[0].relation,
        # Every unit of ours is one record, reached in one way or another.
        unit=units[0] if len(units) == 1 else "record",
        mechanism=", ".join(_each(str(ledger.header.get("mechanism", "unknown")) for ledger in ledgers)),
        num_records=max(sizes, default=None),
        conditional_on=_each(text for ledger in ledgers for text in ledger.header.get("conditional_on", ())),
        unverified=_each(
            text for ledger in ledgers for text in (*ledger.header.get("unverified", ()), *plan_changes(ledger))
        ),
        not_covered=_each([*_NOT_COVERED, *(text for ledger in ledgers for text in _own(ledger))]),
    )


def _own(ledger: PrivacyLedger) -> tuple[str, ...]:
    return beyond_the_usual(ledger.header.get("not_covered"))


def _each(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))

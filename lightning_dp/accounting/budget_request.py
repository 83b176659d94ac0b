"""What a run asks of the budget of its data set, and what must agree before it is weighed at all."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from lightning_dp.accounting.accountants import checked_delta
from lightning_dp.accounting.budget_state import BudgetTerms
from lightning_dp.accounting.claim import ClaimLevel
from lightning_dp.accounting.claiming import plan_level
from lightning_dp.accounting.composition import Counts
from lightning_dp.accounting.events import ReleaseEvent, Sampling
from lightning_dp.accounting.filters import Rule
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.accounting.plan import keeps_plan, releases_left
from lightning_dp.errors import ConfigurationError
from lightning_dp.wording import counted


@dataclass(frozen=True, kw_only=True)
class DatasetBudgetSettings:
    """The budget that all runs on one data set share, as flags.

    The first run fixes epsilon, delta, relation and rule in the folder; later runs may leave them out.

    Args:
        folder: Folder of the budget; null leaves this run out of any.
        epsilon: Epsilon that all runs together may spend; needed by the first run.
        delta: Its delta (default: the first run's privacy.target_delta).
        rule: gaussian (exact; runs with Gaussian noise and no sampling only) or renyi (all runs, about a tenth more
            noise); default: gaussian if the first run allows it. Either holds for runs chosen in view of earlier ones.
        allow_unproved: Admit a run whose claim would not be PROVED. No epsilon can be stated of the data set then.
        reservation: Name under which a comparison has reserved this run already.
    """

    folder: str | None = None
    epsilon: float | None = None
    delta: float | None = None
    rule: Rule | None = None
    allow_unproved: bool = False
    reservation: str | None = None

    def __post_init__(self) -> None:
        if self.epsilon is not None and not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ConfigurationError(f"Expected a finite dataset_budget.epsilon > 0, got epsilon={self.epsilon}.")
        if self.delta is not None:
            checked_delta(self.delta)
        if self.rule is not None and self.rule not in get_args(Rule):
            raise ConfigurationError(f"Expected dataset_budget.rule gaussian or renyi, got rule={self.rule!r}.")
        given = [name for name in ("epsilon", "delta", "rule", "reservation") if getattr(self, name) is not None]
        if self.folder is None and (given or self.allow_unproved):
            name = given[0] if given else "allow_unproved"
            raise ConfigurationError(
                f"dataset_budget.{name} needs the folder of a budget: add --dataset_budget.folder."
            )


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What a run asks of the budget.

    Attributes:
        run: Its id, as in the header of its ledger.
        name: What a reader calls it.
        header: Public facts as its ledger's header holds them: relation, unit, dataset, fingerprint, target_delta,
            mechanism, conditional_on, unverified.
        needed: Everything it may release in all: what it has released, and what is left of its plan.
        released: How many releases it has made.
    """

    run: str
    name: str
    header: Mapping[str, Any]
    needed: Counts
    released: int = 0

    @property
    def level(self) -> ClaimLevel:
        """How much of its claim will be proved."""
        return plan_level(
            self.needed,
            unverified=self.header.get("unverified", ()),
            conditional_on=self.header.get("conditional_on", ()),
        )

    @property
    def reasons(self) -> tuple[str, ...]:
        """What its claim rests on beyond a proof."""
        return (*self.header.get("unverified", ()), *self.header.get("conditional_on", ()))


def needed_by(
    ledger: PrivacyLedger, *, planned: Counts, next_release: tuple[ReleaseEvent, Sampling] | None, num_releases: int
) -> Counts:
    """Return everything that a run may release in all: its plan, or what it has released and what is left.

    Args:
        ledger: Its ledger.
        planned: Its plan.
        next_release: What each coming release will be; None where only the plan is known.
        num_releases: Releases that it may make in all.
    """
    counts = ledger.counts()
    if not counts or next_release is None:
        return {key: max(planned.get(key, 0), counts.get(key, 0)) for key in (*planned, *counts)}
    left = releases_left(counts, planned, next_release, num_releases)
    # What of a warm start that died half-way was not made stays charged, as the claim charges it.
    before = planned if next_release in planned and keeps_plan(counts, planned) else counts
    return {**counts, **before, next_release: counts.get(next_release, 0) + left}


def unit_of(unit: str) -> str:
    """Return the unit of a data set's budget: every unit of ours is one record, reached in one way or another."""
    return unit.partition(" (")[0]


def check_terms(terms: BudgetTerms, settings: DatasetBudgetSettings, folder: Path) -> None:
    """Refuse flags that say something else than the budget, which was fixed by its first run."""
    for name in ("epsilon", "delta", "rule"):
        asked, fixed = getattr(settings, name), getattr(terms, name)
        if asked is not None and asked != fixed:
            raise ConfigurationError(
                f"The budget in {folder} was fixed with {name}={fixed}, got dataset_budget.{name}={asked}. Drop it."
            )


def check_same_data(terms: BudgetTerms, header: Mapping[str, Any]) -> None:
    """Refuse a run on other records, or under another relation: two relations are never one number."""
    given = {
        "dataset": str(header.get("dataset", "unknown")),
        "fingerprint": str(header.get("fingerprint", "unknown")),
        "relation": str(header["relation"]),
        "unit": unit_of(str(header["unit"])),
    }
    for name, value in given.items():
        fixed = getattr(terms, name)
        if value != fixed:
            raise ConfigurationError(
                f"Expected a run with {name}={fixed!r}, for which this data set's budget was opened, got "
                f"{name}={value!r}. Runs on other records, or under another relation, need a folder of their own."
            )


def check_known(request: RunRequest, *, is_held: bool, folder: Path) -> None:
    """Refuse a run that released before it reserved here: others were admitted as if it had not."""
    if request.released and not is_held:
        raise ConfigurationError(
            f"The run {request.name} has made {counted(request.released, 'release')}, of which the budget in "
            f"{folder} knows nothing. Give the folder in which it was begun (an older copy will not do), or start a "
            "new run."
        )


def check_level(request: RunRequest, settings: DatasetBudgetSettings, folder: Path) -> None:
    """Refuse a run that would leave the data set without an epsilon, unless that is what was asked for."""
    if request.level is ClaimLevel.PROVED or settings.allow_unproved:
        return
    reasons = f" ({'; '.join(request.reasons)})" if request.reasons else ""
    raise ConfigurationError(
        f"A run whose claim would be {request.level}{reasons} leaves the budget in {folder} without an epsilon. Add "
        "--dataset_budget.allow_unproved true if that is meant, or leave --dataset_budget.folder out and answer for it."
    )

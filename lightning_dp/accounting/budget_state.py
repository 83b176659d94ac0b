"""What the lines of a data set's budget say: its terms, what each run has reserved, and what may be claimed of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lightning_dp.accounting.accountants import EpsilonResult, checked_delta, compute_epsilon
from lightning_dp.accounting.claim import ClaimLevel, PrivacyClaim
from lightning_dp.accounting.composition import Counts
from lightning_dp.accounting.coverage import DEFAULT_NOT_COVERED
from lightning_dp.accounting.events import (
    NonPrivateRelease,
    ReleaseEvent,
    Sampling,
    event_from_dict,
    parse_relation,
)
from lightning_dp.accounting.filters import PrivacyFilter, joined, make_filter, without_non_private
from lightning_dp.errors import ConfigurationError, LedgerError

FORMAT = 1
KIND = "dataset budget"

FIXED_LIST = "if noise and length of each run were not chosen in view of what earlier ones released"
"""The condition under which the composition of all reservations is a bound."""

NOT_COVERED = (
    "choices (of hyper-parameters, of when to stop) that looked at the records other than through its runs",
    *(text for text in DEFAULT_NOT_COVERED if not text.startswith(("other runs", "the choice of hyper"))),
    "runs on the same records that were made without this budget",
    "other data sets (another fingerprint) that hold some of the same records",
)


@dataclass(frozen=True, kw_only=True)
class BudgetTerms:
    """What the first run fixed.

    Attributes:
        id: Random name of the budget.
        dataset: Name of the data set.
        fingerprint: Hash of its public facts.
        num_records: Its public size.
        relation: Name of the neighbouring relation.
        unit: The privacy unit.
        epsilon: What all runs together may spend.
        delta: At this delta.
        rule: The rule by which runs are admitted.
        order: Its order; None for one that has none.
    """

    id: str
    dataset: str
    fingerprint: str
    num_records: int | None
    relation: str
    unit: str
    epsilon: float
    delta: float
    rule: str
    order: float | None

    @property
    def filter(self) -> PrivacyFilter:
        """The rule with its limit."""
        order = math.inf if self.order is None else self.order
        return make_filter(self.rule, epsilon=self.epsilon, delta=self.delta, order=order)

    def to_dict(self) -> dict[str, Any]:
        """Return the header line."""
        return {"kind": KIND, "format": FORMAT, **asdict(self)}


@dataclass
class RunCharge:
    """What one run has reserved.

    Attributes:
        run: Its id.
        name: What a reader calls it.
        mechanism: Name of its mechanism.
        level: Level of its claim.
        reasons: What its claim rests on beyond a proof.
        not_covered: What its claim leaves out beyond the usual.
        counts: Everything that it may release.
        writers: Releases noted per process of the run.
        leases: Releases that a process which has not ended may have made at most, where that is more than was noted.
    """

    run: str
    name: str
    mechanism: str
    level: ClaimLevel
    reasons: tuple[str, ...]
    counts: dict[tuple[ReleaseEvent, Sampling], int]
    writers: dict[str, int] = field(default_factory=dict)
    leases: dict[str, int] = field(default_factory=dict)
    not_covered: tuple[str, ...] = ()


@dataclass
class BudgetState:
    """Terms and reservations.

    Attributes:
        terms: What the first run fixed.
        path: The file, for messages.
        runs: Reservations by run, those given back left out.
        is_fixed_list: Whether all of them were reserved together, before any release, and none given back after one.
    """

    terms: BudgetTerms
    path: Path
    runs: dict[str, RunCharge] = field(default_factory=dict)
    is_fixed_list: bool = True

    @property
    def counts(self) -> dict[tuple[ReleaseEvent, Sampling], int]:
        """Everything reserved by all runs, releases without privacy included."""
        return joined(*(charge.counts for charge in self.runs.values()))

    @property
    def is_untouched(self) -> bool:
        """Whether nothing that has a price is reserved: what comes next was chosen in view of no private release."""
        return not without_non_private(self.counts)

    @property
    def has_released(self) -> bool:
        """Whether any run has noted a release."""
        return any(charge.writers for charge in self.runs.values())

    @property
    def spent(self) -> float:
        """Share of the budget that is reserved, by its rule; above 1 for one list that an accountant let through."""
        rule = self.terms.filter
        try:
            total = rule.total(without_non_private(self.counts), parse_relation(self.terms.relation))
        except ConfigurationError:  # the rule has no price for that list, and admits nothing beside it
            return math.inf
        return total / rule.limit

    @property
    def is_indivisible(self) -> bool:
        """Whether a run that has released nothing stays charged all the same.

        An accountant let a list through that the rule would not hold, and some of it is released: what of the rest is
        made may now be chosen in view of that, and the list's epsilon speaks of all of it.
        """
        return self.has_released and self.spent > 1.0

    def claim(self, delta: float | None = None) -> PrivacyClaim:
        """Return what may be claimed of everything that these runs released and will release.

        Guarantee: the epsilon is the budget's, which holds however runs are chosen in view of each other; at another
        delta, what the rule's limit gives there. A single list that was planned together is composed instead.
        """
        delta = self.terms.delta if delta is None else delta
        levels = {charge.level for charge in self.runs.values()}
        order = (ClaimLevel.NONPRIVATE, ClaimLevel.UNVERIFIED, ClaimLevel.CONDITIONAL)
        level = next((one for one in order if one in levels), ClaimLevel.PROVED)
        found = self._guaranteed(delta) if level is ClaimLevel.PROVED else None
        mechanisms = dict.fromkeys(charge.mechanism for charge in self.runs.values())
        of_runs = (text for charge in self.runs.values() for text in charge.not_covered)
        samplers = dict.fromkeys(_sampling_words(sampling) for _, sampling in self.counts)
        return PrivacyClaim(
            level=level,
            epsilon=found.epsilon if found else None,
            delta=delta,
            relation=self.terms.relation,
            unit=self.terms.unit,
            accountant=found.accountant if found else "none",
            sampler="; ".join(samplers) or "none",
            num_releases=sum(self.counts.values()),
            mechanism=", ".join(mechanisms) or "no mechanism",
            assumptions=tuple(dict.fromkeys(text for charge in self.runs.values() for text in charge.reasons)),
            not_covered=tuple(dict.fromkeys((*NOT_COVERED, *of_runs))),
            warnings=found.notes if found else (),
        )

    def composed(self, delta: float | None = None) -> EpsilonResult | None:
        """Return the composition of all reservations as one list; None where not all runs are PROVED.

        A bound on its own under `FIXED_LIST` only; always one if `is_fixed_list`.
        """
        if any(charge.level is not ClaimLevel.PROVED for charge in self.runs.values()):
            return None
        return self.composition(self.counts, self.terms.delta if delta is None else delta)

    def _guaranteed(self, delta: float) -> EpsilonResult:
        if not self.counts or self.is_fixed_list:
            return self.composition(self.counts, delta)
        rule = self.terms.filter
        if self.spent > 1.0:  # only a first list may, and nothing is admitted after it
            raise LedgerError(f"{self.path} reserves more than its budget allows; it was not written by this program.")
        name = "gaussian" if rule.rule == "gaussian" else "rdp"
        note = "epsilon is that of the data set's budget, which holds however its runs are chosen in view of each other"
        return EpsilonResult(rule.epsilon_at(delta), name, (note,))

    def composition(self, counts: Counts, delta: float) -> EpsilonResult:
        """Return what an accountant says of one list of releases on this data set."""
        return compute_epsilon(counts, delta=delta, relation=self.terms.relation)


def state_of(lines: Sequence[Mapping[str, Any]], path: Path) -> BudgetState:
    """Return the state after the lines of a budget file.

    Args:
        lines: Header and lines, as `BudgetFile.read` returns them.
        path: The file, for messages.

    Raises:
        LedgerError: A line that this program does not write.
    """
    state = BudgetState(terms=_terms(lines[0], path), path=path)
    for number, line in enumerate(lines[1:], start=2):
        try:
            _apply(state, line)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LedgerError(f"{path}, line {number}: no line of a data set's budget ({error}).") from None
    return state


def _terms(header: Mapping[str, Any], path: Path) -> BudgetTerms:
    names = {item.name for item in fields(BudgetTerms)}
    try:
        if header["kind"] != KIND or header["format"] != FORMAT or set(header) != {"kind", "format", *names}:
            raise ValueError("not the header of a data set's budget")
        terms = BudgetTerms(**{name: header[name] for name in names})
        parse_relation(terms.relation)
        checked_delta(terms.delta)
        if not (math.isfinite(terms.epsilon) and terms.epsilon > 0):
            raise ValueError(f"expected a finite epsilon > 0, got {terms.epsilon!r}")
        _ = terms.filter
        return terms
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise LedgerError(f"{path}, line 1: {error}.") from None


def _apply(state: BudgetState, line: Mapping[str, Any]) -> None:
    if line["kind"] == "reserve":
        was_untouched = state.is_untouched
        for part in line["runs"]:
            _reserve(state, part)
        state.is_fixed_list = was_untouched or (state.is_fixed_list and not any(map(_has_price, line["runs"])))
    elif line["kind"] in ("seen", "lease"):
        charge = state.runs[line["run"]]
        noted = charge.writers
        noted |= {str(writer): max(_count(count), noted.get(writer, 0)) for writer, count in line["writers"].items()}
        if line["kind"] == "lease":
            charge.leases[str(line["writer"])] = _count(line["upto"])
        else:
            charge.leases.pop(str(line.get("ended")), None)
    elif line["kind"] == "return":
        if state.runs[line["run"]].writers:
            raise ValueError("a run with releases was given back")
        if state.is_indivisible:
            raise ValueError("a part of a list was given back that was admitted as a whole")
        # Fewer runs than were planned, in view of what was released: their composition is an odometer's, and no bound.
        state.is_fixed_list = state.is_fixed_list and not state.has_released
        del state.runs[line["run"]]
    else:
        raise ValueError(f"unknown kind {line['kind']!r}")


def _reserve(state: BudgetState, part: Mapping[str, Any]) -> None:
    counts = joined(
        *(
            {(event_from_dict(one["event"]), Sampling.from_dict(one["sampling"])): _count(one["count"])}
            for one in part["planned"]
        )
    )
    run = str(part["run"])
    level, reasons = ClaimLevel(part["level"]), tuple(str(text) for text in part["reasons"])
    not_covered = tuple(str(text) for text in part.get("not_covered", ()))
    if (held := state.runs.get(run)) is not None:
        held.counts = joined(held.counts, counts)
        held.reasons = tuple(dict.fromkeys((*held.reasons, *reasons)))
        order = list(ClaimLevel)  # from the best to the worst
        held.level = max(held.level, level, key=order.index)
        return
    name, mechanism = str(part["name"]), str(part["mechanism"])
    state.runs[run] = RunCharge(run, name, mechanism, level, reasons, counts, not_covered=not_covered)


def _has_price(part: Mapping[str, Any]) -> bool:
    return any(one["event"]["kind"] != NonPrivateRelease.kind for one in part["planned"])


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"expected a count >= 1, got {value!r}")
    return value


def _sampling_words(sampling: Sampling) -> str:
    if sampling.scheme == "full":
        return "all records in every release"
    return f"Poisson sampling at rate {sampling.rate:.6g}" + " (assumed, not executed)" * (not sampling.executed)

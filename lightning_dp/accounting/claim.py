"""What may be said of a run's privacy, in one line, and what may not."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import ROUND_CEILING, Decimal
from enum import StrEnum
from typing import Any, Self

from dp_accounting import NeighboringRelation

from lightning_dp.accounting.accountants import Accountant, Counts, EpsilonResult, checked_delta, compute_epsilon
from lightning_dp.accounting.coverage import DEFAULT_NOT_COVERED, default_not_covered
from lightning_dp.accounting.events import (
    NonPrivateRelease,
    Sampling,
    event_from_dict,
    parse_relation,
    relation_name,
)
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import ConfigurationError, LedgerError

_RELATION_LABELS = {
    "add_or_remove_one": "add-or-remove-one",
    "replace_one": "replace-one",
    "replace_special": "zero-out (one record becomes empty and contributes nothing; their number stays)",
}
_PLAN_CHANGED = (
    "that the run kept to the plan that was fixed before its first release (it was made longer, or its noise changed, "
    "perhaps in view of what had been released; plan the longest run, and stop early)"
)
_ACCOUNTANT_LABELS = {"gaussian": "exact Gaussian", "pld": "PLD", "rdp": "RDP", "none": "no"}


class ClaimLevel(StrEnum):
    """How much of a claim is proved; an epsilon is shown for PROVED only."""

    PROVED = "PROVED"
    CONDITIONAL = "CONDITIONAL"
    UNVERIFIED = "UNVERIFIED"
    NONPRIVATE = "NONPRIVATE"


@dataclass(frozen=True, kw_only=True)
class PrivacyClaim:
    """A statement about the privacy of everything released, with its conditions.

    Attributes:
        level: How much is proved.
        epsilon: The bound; None unless the level is PROVED, so that no other number can be ranked or quoted.
        delta: The delta of the statement.
        relation: Name of the neighbouring relation.
        unit: The privacy unit in words.
        accountant: "gaussian", "pld", "rdp" or "none".
        sampler: How records entered the releases, and whether the sampling was executed or assumed.
        num_releases: Number of releases made.
        mechanism: Name of the mechanism.
        assumptions: What the claim rests on beyond a proof: components without a bound, steps not checked.
        not_covered: What the epsilon does not speak of.
        warnings: What a reader should weigh (a delta too large, an accountant's fallback).
        planned_releases: Number of releases fixed before the first; None where no plan is known. Where fewer were made,
            epsilon is that of the plan.

    Raises:
        ConfigurationError: An epsilon with a level other than PROVED, or PROVED without a finite one.
    """

    level: ClaimLevel
    epsilon: float | None
    delta: float
    relation: str
    unit: str
    accountant: str
    sampler: str
    num_releases: int
    mechanism: str
    assumptions: tuple[str, ...] = ()
    not_covered: tuple[str, ...] = DEFAULT_NOT_COVERED
    warnings: tuple[str, ...] = ()
    planned_releases: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "level", ClaimLevel(self.level))
        relation_name(parse_relation(self.relation))
        checked_delta(self.delta)
        is_finite = self.epsilon is not None and math.isfinite(self.epsilon) and self.epsilon >= 0.0
        if (self.level is ClaimLevel.PROVED) != (self.epsilon is not None) or (
            self.epsilon is not None and not is_finite
        ):
            raise ConfigurationError(
                f"Expected a finite epsilon >= 0 with level PROVED and none with any other, got level={self.level}, "
                f"epsilon={self.epsilon!r}."
            )
        for name in ("assumptions", "not_covered", "warnings"):
            object.__setattr__(self, name, tuple(str(text) for text in getattr(self, name)))

    def statement(self) -> str:
        """Return the claim in one line; epsilon is rounded up and shown only when PROVED.

        Returns:
            For example "(epsilon=0.998, delta=1e-05)-DP per record, replace-one, exact Gaussian accountant, 400
            releases of TopAgg: PROVED".
        """
        plural = "release" if self.num_releases == 1 else "releases"
        planned = self.planned_releases
        is_early = self.level is ClaimLevel.PROVED and planned is not None and 0 < self.num_releases < planned
        made = f"{self.num_releases} of {planned} planned {plural}" if is_early else f"{self.num_releases} {plural}"
        releases = f"{made} of {self.mechanism}{', all charged' * is_early}"
        scope = f"per {self.unit}, {_RELATION_LABELS[self.relation]}"
        if self.level is ClaimLevel.PROVED and self.epsilon is not None:
            shown = f"(epsilon={epsilon_text(self.epsilon)}, delta={self.delta!r})-DP {scope}"
            line = f"{shown}, {_ACCOUNTANT_LABELS.get(self.accountant, self.accountant)} accountant, {releases}: PROVED"
        elif self.level is ClaimLevel.NONPRIVATE:
            line = f"No differential privacy {scope}: {releases} hold no bound on any record: NONPRIVATE"
        else:
            held = "conditional on" if self.level is ClaimLevel.CONDITIONAL else "assumed, not checked"
            reasons = "; ".join(self.assumptions)
            line = f"No epsilon is stated {scope}, {releases}; {held}: {reasons}: {self.level}"
        return " ".join(line.split())

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary of every field and the statement.

        Returns:
            The dictionary; `from_dict` inverts it.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return plain | {"level": str(self.level), "statement": self.statement()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a claim.

        Args:
            data: What `to_dict` returned.

        Returns:
            The claim.

        Raises:
            ConfigurationError: Unknown or missing fields, an invalid value, or a statement that is not the claim's own.
        """
        names = {field.name for field in fields(cls)}
        if isinstance(data, Mapping):
            data = {"planned_releases": None, **data}  # claims from before plans were kept
        if not isinstance(data, Mapping) or set(data) - {"statement"} != names:
            raise ConfigurationError(f"Expected a claim with exactly the fields {sorted(names)}, got {data!r}.")
        try:
            claim = cls(**{name: data[name] for name in names})
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"Expected a valid claim: {error}") from error
        if data.get("statement", claim.statement()) != claim.statement():
            raise ConfigurationError(
                f"Expected the claim's own statement {claim.statement()!r}, got statement={data['statement']!r}."
            )
        return claim


def make_claim(
    ledger_or_counts: PrivacyLedger | Counts,
    *,
    delta: float,
    relation: str | NeighboringRelation,
    unit: str,
    mechanism: str,
    num_records: int | None = None,
    accountant: Accountant = "auto",
    conditional_on: Sequence[str] = (),
    unverified: Sequence[str] = (),
    not_covered: Sequence[str] | None = None,
    extra_warnings: Sequence[str] = (),
    planned: Counts | None = None,
) -> PrivacyClaim:
    """Return what may be claimed of all releases in a ledger.

    The level is the worst that applies: NONPRIVATE for a release without noise, UNVERIFIED for Poisson sampling that
    was not executed or anything in `unverified`, CONDITIONAL for anything in `conditional_on`, else PROVED.

    Guarantee: under a plan, epsilon is that of the whole plan, also for a run that stopped before its end. Such a run
    is post-processing of the whole one, whatever released value made it stop; the smaller epsilon of the releases made
    would hold only if their number had been fixed. Releases beyond the plan, or of another noise, are UNVERIFIED: an
    epsilon that follows a choice made in view of releases bounds nothing unless a filter was set before the first.

    Args:
        ledger_or_counts: The ledger, or its counts.
        delta: Delta of the statement, in (0, 1).
        relation: The neighbouring relation; a ledger's own must agree.
        unit: The privacy unit in words; a ledger's own must agree.
        mechanism: Name of the mechanism.
        num_records: Number of records, for the warning about delta; taken from a ledger's header where it is there.
        accountant: Which accountant, as in `compute_epsilon`.
        conditional_on: Components assumed public (a pretrained network, say).
        unverified: Steps of the proof that were not checked.
        not_covered: What the epsilon does not speak of; None takes `default_not_covered`.
        extra_warnings: Further warnings to carry.
        planned: Counts that were fixed before the first release; None takes a ledger's own plan, and charges what was
            released where there is none.

    Returns:
        The claim.

    Raises:
        ConfigurationError: An invalid delta or relation, or one that contradicts the ledger.
    """
    relation, delta = parse_relation(relation), checked_delta(delta)
    counts: Counts
    if isinstance(ledger_or_counts, PrivacyLedger):
        _check_agreement(ledger_or_counts, relation, unit)
        num_records = num_records if num_records is not None else ledger_or_counts.header.get("num_records")
        counts = ledger_or_counts.counts()
        planned = ledger_plan(ledger_or_counts) if planned is None else planned
    else:
        counts = ledger_or_counts
    counts = {key: count for key, count in counts.items() if count != 0}
    assumed = [*unverified, *(_sampler(counts, executed=False)), *([] if _keeps(counts, planned) else [_PLAN_CHANGED])]
    level = _level(counts, assumed, conditional_on)
    warnings = list(extra_warnings)
    result: EpsilonResult | None = None
    if level is ClaimLevel.PROVED:
        charged = planned if planned is not None and counts else counts
        result = compute_epsilon(charged, delta=delta, relation=relation, accountant=accountant)
        warnings += result.notes
        if sum(charged.values()) > sum(counts.values()):
            warnings.append(
                "the run stopped before its plan was over: epsilon is that of the plan, which holds whatever released "
                "value the stop looked at"
            )
    if num_records is not None and delta > 1 / num_records:
        warnings.append(
            f"delta={delta!r} is above 1 / num_records for num_records={num_records}: "
            "publishing one whole record at random would satisfy it"
        )
    return PrivacyClaim(
        level=level,
        epsilon=result.epsilon if result else None,
        delta=delta,
        relation=relation_name(relation),
        unit=unit,
        accountant=result.accountant if result else "none",
        sampler="; ".join([*_sampler(counts, executed=True), *_sampler(counts, executed=False)]) or "none",
        num_releases=sum(counts.values()),
        mechanism=mechanism,
        assumptions=(*assumed, *conditional_on),
        not_covered=default_not_covered({**counts, **(planned or {})}) if not_covered is None else tuple(not_covered),
        warnings=tuple(dict.fromkeys(warnings)),
        planned_releases=None if planned is None else sum(planned.values()),
    )


def plan_header(planned: Counts) -> list[dict[str, Any]]:
    """Return a plan as the JSON-able list that a ledger's header holds under "planned".

    Args:
        planned: How often each (event, sampling) will be released at most.
    """
    return [
        {"event": event.to_dict(), "sampling": sampling.to_dict(), "count": count}
        for (event, sampling), count in planned.items()
    ]


def ledger_plan(ledger: PrivacyLedger) -> Counts | None:
    """Return the plan in a ledger's header; None where there is none.

    Raises:
        LedgerError: What the header holds is no plan.
    """
    written = ledger.header.get("planned")
    return None if written is None else parse_plan(written)


def parse_plan(written: Any) -> Counts:
    """Return the plan that `plan_header` wrote.

    Raises:
        LedgerError: It is none.
    """
    try:
        return {
            (event_from_dict(part["event"]), Sampling.from_dict(part["sampling"])): int(part["count"])
            for part in written
        }
    except (ConfigurationError, KeyError, TypeError, ValueError) as error:
        raise LedgerError(f"Expected a plan in the ledger's header, got planned={written!r} ({error}).") from None


def claimed_counts(ledger: PrivacyLedger) -> Counts:
    """Return what a claim charges: the plan while the ledger keeps to it, else what was released."""
    plan, counts = ledger_plan(ledger), ledger.counts()
    return plan if plan is not None and counts and _keeps(counts, plan) else counts


def _keeps(counts: Counts, planned: Counts | None) -> bool:
    """Tell whether the releases are among those planned."""
    return planned is None or all(count <= planned.get(key, 0) for key, count in counts.items())


def claim_from_ledger(ledger: PrivacyLedger, *, delta: float | None = None) -> PrivacyClaim:
    """Return the claim of a run from its ledger alone; a run's own claim is made by the same call.

    The header holds, besides relation, unit and number of records: mechanism, target_delta, accountant, the lists
    conditional_on, unverified and warnings, and the plan that was fixed before the first release.

    Args:
        ledger: The ledger of a run.
        delta: Delta of the statement; None takes the run's own.

    Raises:
        LedgerError: The header was not written by a run.
    """
    header = ledger.header
    try:
        mechanism, own_delta = str(header["mechanism"]), float(header["target_delta"])
    except (KeyError, TypeError, ValueError):
        raise LedgerError(
            "Expected a ledger whose header names mechanism and target_delta, as every run writes it, got "
            f"{sorted(header)}."
        ) from None
    return make_claim(
        ledger,
        delta=own_delta if delta is None else delta,
        relation=ledger.relation,
        unit=ledger.unit,
        mechanism=mechanism,
        accountant=header.get("accountant", "auto"),
        conditional_on=tuple(header.get("conditional_on", ())),
        unverified=tuple(header.get("unverified", ())),
        extra_warnings=tuple(header.get("warnings", ())),
    )


def ledger_level(ledger: PrivacyLedger) -> ClaimLevel:
    """Return the level that a claim from this ledger has, without composing anything.

    Args:
        ledger: The ledger of a run, whose header says what its claim rests on.
    """
    header, counts = ledger.header, ledger.counts()
    assumed = [*header.get("unverified", ()), *_sampler(counts, executed=False), *plan_changes(ledger)]
    return _level(counts, assumed, header.get("conditional_on", ()))


def plan_level(counts: Counts, *, unverified: Sequence[str], conditional_on: Sequence[str]) -> ClaimLevel:
    """Return the level that a run will have if it keeps to these planned releases.

    Args:
        counts: How often each (event, sampling) will be released.
        unverified: Steps of the proof that are not checked.
        conditional_on: Components assumed public.
    """
    return _level(counts, [*unverified, *_sampler(counts, executed=False)], conditional_on)


def plan_changes(ledger: PrivacyLedger) -> tuple[str, ...]:
    """Return, in words, that a run left the plan of its ledger; nothing if it keeps to it."""
    return () if _keeps(ledger.counts(), ledger_plan(ledger)) else (_PLAN_CHANGED,)


def spent_epsilon(ledger: PrivacyLedger, *, accountant: Accountant = "auto") -> float | None:
    """Return what the releases so far cost: the claim of a run that was planned to end here. None unless PROVED.

    Where records are sampled, it is rough, and slightly too large, until the plan is over.

    Args:
        ledger: The ledger of a run.
        accountant: As in `compute_epsilon`.
    """
    if ledger_level(ledger) is not ClaimLevel.PROVED:
        return None
    delta = float(ledger.header["target_delta"])
    counts, planned = ledger.counts(), ledger_plan(ledger)
    is_rough = planned is not None and counts != planned
    return compute_epsilon(
        counts, delta=delta, relation=ledger.relation, accountant=accountant, is_rough=is_rough
    ).epsilon


def _check_agreement(ledger: PrivacyLedger, relation: NeighboringRelation, unit: str) -> None:
    """Refuse to speak of a relation or a unit for which the ledger's sensitivities were not computed."""
    if relation is not ledger.relation or unit != ledger.unit:
        raise ConfigurationError(
            f"Expected the ledger's own relation={relation_name(ledger.relation)} and unit={ledger.unit!r}, "
            f"got relation={relation_name(relation)}, unit={unit!r}. Sensitivities hold for the ledger's only."
        )


def _level(counts: Counts, assumed: Sequence[str], conditional_on: Sequence[str]) -> ClaimLevel:
    if any(isinstance(event, NonPrivateRelease) for event, _ in counts):
        return ClaimLevel.NONPRIVATE
    if assumed:
        return ClaimLevel.UNVERIFIED
    return ClaimLevel.CONDITIONAL if conditional_on else ClaimLevel.PROVED


def _sampler(counts: Counts, *, executed: bool) -> list[str]:
    """Return the samplings in words, once each."""
    words = []
    for _, sampling in counts:
        if sampling.executed is executed:
            way = "executed" if executed else "assumed, not executed"
            poisson = f"Poisson sampling at rate {sampling.rate:.6g} ({way})"
            words.append("all records in every release" if sampling.scheme == "full" else poisson)
    return list(dict.fromkeys(words))


def epsilon_text(epsilon: float) -> str:
    """Return epsilon with three decimals, never below it: a claim must not promise more than was proved.

    Args:
        epsilon: A finite bound.
    """
    return str(Decimal(repr(epsilon)).quantize(Decimal("0.001"), rounding=ROUND_CEILING))

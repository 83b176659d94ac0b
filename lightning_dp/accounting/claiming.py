"""What may be claimed of releases: the level that their conditions allow, and the epsilon where all is proved."""

import math
from collections.abc import Sequence
from typing import Final

from dp_accounting import NeighboringRelation

from lightning_dp.accounting.accountants import Accountant, Counts, checked_delta, compute_epsilon
from lightning_dp.accounting.claim import ClaimLevel, PrivacyClaim
from lightning_dp.accounting.coverage import default_not_covered
from lightning_dp.accounting.events import NonPrivateRelease, parse_relation, relation_name
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.accounting.plan import PLAN_CHANGED, keeps_plan, ledger_plan, plan_changes
from lightning_dp.errors import LedgerError

_USUAL: Final = 10.01  # a target of 10 is met from below; what is above is called weak in the field's guidelines


def make_claim(
    counts: Counts,
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
    """Return what may be claimed of releases.

    The level is the worst that applies: NONPRIVATE for a release without noise, UNVERIFIED for Poisson sampling that
    was not executed or anything in `unverified`, CONDITIONAL for anything in `conditional_on`, else PROVED.

    Guarantee: under a plan, epsilon is that of the whole plan, also for a run that stopped before its end. Such a run
    is post-processing of the whole one, whatever released value made it stop; the smaller epsilon of the releases made
    would hold only if their number had been fixed. Releases beyond the plan, or of another noise, are UNVERIFIED: an
    epsilon that follows a choice made in view of releases bounds nothing unless a filter was set before the first.

    Args:
        counts: How often each (event, sampling) was released.
        delta: Delta of the statement, in (0, 1).
        relation: The neighbouring relation of the events' sensitivities.
        unit: The privacy unit in words.
        mechanism: Name of the mechanism.
        num_records: Number of records, for the warning about delta.
        accountant: Which accountant, as in `compute_epsilon`.
        conditional_on: Components assumed public (a pretrained network, say).
        unverified: Steps of the proof that were not checked.
        not_covered: What the epsilon does not speak of; None takes `default_not_covered`.
        extra_warnings: Further warnings to carry.
        planned: Counts that were fixed before the first release; None charges what was released.

    Raises:
        ConfigurationError: An invalid delta or relation.
    """
    relation, delta = parse_relation(relation), checked_delta(delta)
    counts = {key: count for key, count in counts.items() if count != 0}
    executed, assumed_of = (_sampler(counts, executed=executed) for executed in (True, False))
    assumed = [*unverified, *assumed_of, *([] if keeps_plan(counts, planned) else [PLAN_CHANGED])]
    level = _level(counts, assumed, conditional_on)
    epsilon, stated_by = None, "none"
    notes: tuple[str, ...] = ()
    if level is ClaimLevel.PROVED:
        epsilon, stated_by, notes = _stated(counts, planned, delta=delta, relation=relation, accountant=accountant)
    warnings = [*extra_warnings, *notes, *_of_large_epsilon(epsilon), *_of_large_delta(delta, num_records)]
    return PrivacyClaim(
        level=level,
        epsilon=epsilon,
        delta=delta,
        relation=relation_name(relation),
        unit=unit,
        accountant=stated_by,
        sampler="; ".join([*executed, *assumed_of]) or "none",
        num_releases=sum(counts.values()),
        mechanism=mechanism,
        assumptions=(*assumed, *conditional_on),
        not_covered=default_not_covered({**counts, **(planned or {})}) if not_covered is None else tuple(not_covered),
        warnings=tuple(dict.fromkeys(warnings)),
        planned_releases=None if planned is None else sum(planned.values()),
    )


def _stated(
    counts: Counts, planned: Counts | None, *, delta: float, relation: NeighboringRelation, accountant: Accountant
) -> tuple[float, str, tuple[str, ...]]:
    """Return epsilon of the plan where there is one and it was begun, who composed it, and what is to be said of it."""
    charged = planned if planned is not None and counts else counts
    result = compute_epsilon(charged, delta=delta, relation=relation, accountant=accountant)
    return result.epsilon, result.accountant, (*result.notes, *_of_early_stop(counts, charged))


def _of_early_stop(counts: Counts, charged: Counts) -> list[str]:
    """Return the warning that more is charged than was released, if it is."""
    if sum(charged.values()) <= sum(counts.values()):
        return []
    return [
        "the run stopped before its plan was over: epsilon is that of the plan, which holds whatever released "
        "value the stop looked at"
    ]


def _of_large_epsilon(epsilon: float | None) -> list[str]:
    """Return the warning that epsilon promises little, if it does."""
    if epsilon is None or not _USUAL < epsilon < math.inf:
        return []
    return [
        f"epsilon={epsilon:.4g} is a weak promise: what was released may change the odds on one record by a factor "
        "of up to e^epsilon (10 and less is usual)"
    ]


def _of_large_delta(delta: float, num_records: int | None) -> list[str]:
    """Return the warning that delta allows what nobody would call private, if it does."""
    if num_records is None or delta <= 1 / num_records:
        return []
    return [
        f"delta={delta!r} is above 1 / num_records for num_records={num_records}: "
        "publishing one whole record at random would satisfy it"
    ]


def claim_from_ledger(ledger: PrivacyLedger, *, delta: float | None = None) -> PrivacyClaim:
    """Return the claim of a run from its ledger alone; a run's own claim is made by the same call.

    The header holds, besides relation, unit and number of records: mechanism, target_delta, accountant, the lists
    conditional_on, unverified and warnings, what is not covered where it is not the usual, and the plan that was fixed
    before the first release.

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
        ledger.counts(),
        delta=own_delta if delta is None else delta,
        relation=ledger.relation,
        unit=ledger.unit,
        mechanism=mechanism,
        num_records=header.get("num_records"),
        accountant=header.get("accountant", "auto"),
        conditional_on=tuple(header.get("conditional_on", ())),
        unverified=tuple(header.get("unverified", ())),
        extra_warnings=tuple(header.get("warnings", ())),
        not_covered=header.get("not_covered"),
        planned=ledger_plan(ledger),
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

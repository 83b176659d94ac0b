"""The releases that were fixed before the first one, and whether a run kept to them."""

from typing import Any, Final

from lightning_dp.accounting.composition import Counts
from lightning_dp.accounting.events import ReleaseEvent, Sampling, event_from_dict
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import ConfigurationError, LedgerError

PLAN_CHANGED: Final = (
    "that the run kept to the plan that was fixed before its first release (it was made longer, or its noise changed, "
    "perhaps in view of what had been released; plan the longest run, and stop early)"
)
"""The assumption that a claim rests on once a run has left its plan."""


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
    return plan if plan is not None and counts and keeps_plan(counts, plan) else counts


def releases_left(
    counts: Counts, planned: Counts, next_release: tuple[ReleaseEvent, Sampling] | None, num_releases: int
) -> int:
    """Return how many more releases of a kind a run may make.

    Planned releases of other kinds that were never made (of a warm start that died half-way, say) are not made up for:
    with one more of its own kind than planned, a run would leave its plan, and lose its epsilon.

    Args:
        counts: What was released.
        planned: What was fixed beforehand.
        next_release: What each coming release will be; None where only the plan is known.
        num_releases: Releases that the run may make in all.
    """
    is_planned = next_release in planned
    others = (max(0, n - counts.get(key, 0)) for key, n in planned.items() if is_planned and key != next_release)
    return max(0, num_releases - sum(counts.values()) - sum(others))


def keeps_plan(counts: Counts, planned: Counts | None) -> bool:
    """Tell whether the releases are among those planned.

    Args:
        counts: What was released.
        planned: What was fixed beforehand; None where there was no plan, which every release keeps to.
    """
    return planned is None or all(count <= planned.get(key, 0) for key, count in counts.items())


def plan_changes(ledger: PrivacyLedger) -> tuple[str, ...]:
    """Return, in words, that a run left the plan of its ledger; nothing if it keeps to it."""
    return () if keeps_plan(ledger.counts(), ledger_plan(ledger)) else (PLAN_CHANGED,)

"""Releases of a ledger as compressed runs: what a checkpoint carries, and what one copy holds beyond another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_dp.accounting.events import ReleaseEvent, Sampling, event_from_dict
from lightning_dp.accounting.ledger_header import checked_header
from lightning_dp.accounting.ledger_lines import FORMAT, canonical_json, digest
from lightning_dp.errors import LedgerError


@dataclass
class Run:
    """Equal releases of one writer, one after the other."""

    writer: str
    event: ReleaseEvent
    sampling: Sampling
    count: int

    def is_like(self, other: "Run") -> bool:
        """Say whether both are the same writer's releases of one kind."""
        return (self.writer, self.event, self.sampling) == (other.writer, other.event, other.sampling)


def runs_of(writer: str, runs: Sequence[Run]) -> list[Run]:
    """Return one writer's releases, equal neighbours joined (a merge may have split them)."""
    joined: list[Run] = []
    for run in runs:
        if run.writer == writer and joined and joined[-1].is_like(run):
            joined[-1].count += run.count
        elif run.writer == writer:
            joined.append(replace(run))
    return joined


def runs_beyond(ours: list[Run], theirs: list[Run]) -> list[Run]:
    """Return what one writer's releases in another copy hold beyond ours: the common prefix is spent once."""
    for place, run in enumerate(theirs):
        if place >= len(ours) or not ours[place].is_like(run):
            return theirs[place:]
        if ours[place].count != run.count:
            missing = run.count - ours[place].count
            if missing > 0:
                return [Run(run.writer, run.event, run.sampling, missing), *theirs[place + 1 :]]
            # Ours went on with the same event; theirs may only end here, else the two went separate ways.
            return theirs[place + 1 :]
    return []


def parse_state(state: Mapping[str, Any]) -> tuple[dict[str, Any], list[Run]]:
    """Return header and runs of a state whose checksum holds.

    Args:
        state: What `make_state` returned, as a checkpoint kept it.

    Raises:
        LedgerError: It was altered, or is incomplete.
    """
    try:
        body = {name: state[name] for name in ("format", "header", "runs")}
        if digest("", canonical_json(body)) != state["sha256"] or set(state) != {*body, "sha256"}:
            raise ValueError("its checksum does not match")
        runs = [
            Run(str(run["writer"]), event_from_dict(run["event"]), Sampling.from_dict(run["sampling"]), run["count"])
            for run in body["runs"]
        ]
        if any(type(run.count) is not int or run.count < 1 for run in runs):
            raise ValueError("a run without a positive count")
        return checked_header(body["header"]), runs
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LedgerError(
            f"The ledger in this checkpoint cannot be trusted: {error}. Resume from another one."
        ) from error


def make_state(header: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
    """Return a ledger as plain JSON-able values with a checksum; `parse_state` inverts it.

    Args:
        header: The ledger's header.
        runs: Its releases in order.

    Returns:
        A new dictionary that shares nothing with the ledger.
    """
    body = {
        "format": FORMAT,
        "header": dict(header),
        "runs": [
            {"writer": run.writer, "event": run.event.to_dict(), "sampling": run.sampling.to_dict(), "count": run.count}
            for run in runs
        ],
    }
    return body | {"sha256": digest("", canonical_json(body))}

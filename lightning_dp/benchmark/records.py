"""The records of a comparison: one JSON line per cell, its numbers copied from the run card and from nowhere else."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from callbacks.run_folder import LEDGER_FILE
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.benchmark.grid import Cell
from lightning_dp.benchmark.plan import CellPlan, request_key
from lightning_dp.errors import ConfigurationError
from lightning_dp.evaluation.card_text import is_proved
from lightning_dp.evaluation.report import JSON_NAME, RunCard, read_run_card

RECORDS_FILE = "records.jsonl"

Status = Literal["waiting", "refused", "finished", "failed", "interrupted"]
_FIDELITY = ("fid", "kid", "precision", "recall")


@dataclass(frozen=True, kw_only=True)
class CellRecord:
    """What became of one cell.

    Guarantee: holds an epsilon, asked or spent, only where the claim's level is PROVED or nothing was claimed yet.

    Attributes:
        cell: Its id.
        method: Label of the method.
        mechanism: Label of the mechanism.
        data: Label of the data set.
        seed: Public seed.
        target_epsilon: Epsilon that was asked.
        delta: Delta of the comparison.
        relation: Neighbouring relation of the comparison.
        status: waiting, refused (before it ran), finished, failed or interrupted.
        reason: Why it was refused, or how it failed.
        noise_multiplier: Calibrated before launch; None without a plan or without privacy.
        num_releases: Planned releases.
        epsilon: Epsilon spent.
        level: Level of the claim.
        statement: The claim in one sentence.
        metrics: Quality by name; accuracies as `accuracy/CLASSIFIER`.
        protocol_hash: Of the evaluation; metrics compare only where it is equal.
        cost: Seconds and memory.
        run_dir: Run folder, relative to the comparison's.
        card: Run card, relative to the comparison's folder.
    """

    cell: str
    method: str
    mechanism: str
    data: str
    seed: int
    target_epsilon: float | None
    delta: float
    relation: str
    status: Status
    reason: str | None = None
    noise_multiplier: float | None = None
    num_releases: int | None = None
    epsilon: float | None = None
    level: str | None = None
    statement: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    protocol_hash: str | None = None
    cost: Mapping[str, Any] = field(default_factory=dict)
    run_dir: str | None = None
    card: str | None = None

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ConfigurationError(f"Expected status out of {', '.join(get_args(Status))}, got {self.status!r}.")
        if self.level is not None and self.level != "PROVED" and (self.epsilon, self.target_epsilon) != (None, None):
            raise ConfigurationError(f"Expected no epsilon in a record of level {self.level}, got {self.epsilon=}.")


def open_record(cell: Cell, status: Status, *, plan: CellPlan | None = None, reason: str | None = None) -> CellRecord:
    """Return the record of a cell that has no card.

    Args:
        cell: The cell.
        status: Any but finished.
        plan: Its plan, where there is one.
        reason: Why it was refused, or how it failed.
    """
    privacy = cell.config["privacy"]
    return CellRecord(
        cell=cell.id,
        method=cell.method,
        mechanism=cell.mechanism,
        data=cell.data,
        seed=cell.seed,
        target_epsilon=cell.epsilon,
        delta=privacy["target_delta"],
        relation=privacy["neighboring_relation"],
        status=status,
        reason=reason,
        noise_multiplier=plan.noise_multiplier if plan else None,
        num_releases=plan.num_releases if plan else None,
    )


def finished_record(cell: Cell, card: RunCard, run_dir: Path, folder: Path) -> CellRecord:
    """Return the record of a cell from its run card.

    Args:
        cell: The cell.
        card: Its card.
        run_dir: The run folder.
        folder: The comparison's folder.
    """
    claim, relative = card.claim, run_dir.relative_to(folder)
    return CellRecord(
        cell=cell.id,
        method=cell.method,
        mechanism=cell.mechanism,
        data=cell.data,
        seed=cell.seed,
        target_epsilon=card.budget.get("target_epsilon") if is_proved(claim) else None,
        delta=float(claim["delta"]),
        relation=str(claim["relation"]),
        status="finished",
        noise_multiplier=card.mechanism.get("noise_multiplier"),
        num_releases=claim.get("num_releases"),
        epsilon=claim["epsilon"],
        level=str(claim["level"]).upper(),
        statement=card.claim_statement,
        metrics=card_metrics(card),
        protocol_hash=protocol_of(card),
        cost=dict(card.cost),
        run_dir=str(relative),
        card=str(relative / JSON_NAME),
    )


def card_metrics(card: RunCard) -> dict[str, float]:
    """Return the quality in a card by name, accuracies as `accuracy/CLASSIFIER`; empty if nothing was evaluated."""
    evaluation = card.evaluation or {}
    found = {f"accuracy/{name}": value for name, value in evaluation.get("accuracy", {}).items()}
    found |= {name: evaluation[name] for name in _FIDELITY if name in evaluation}
    return {name: float(value) for name, value in found.items()}


def protocol_of(card: RunCard) -> str | None:
    """Return the hash of a card's metric protocol; None for classifiers, which are judged by their own accuracy."""
    found = (card.evaluation or {}).get("protocol_hash")
    return None if found is None else str(found)


def finished_card(run_dir: Path, key: str) -> RunCard | None:
    """Return the card of a run that ended and that answers a request, None if there is none.

    Args:
        run_dir: The run folder.
        key: `request_key` of the request.

    Raises:
        ConfigurationError: The run's ledger is altered.
    """
    try:
        card = read_run_card(run_dir)
    except ConfigurationError:  # not there, torn, or of an older format
        return None
    is_answer = request_key(card.config) == key
    ledger = run_dir / LEDGER_FILE
    if not is_answer or not ledger.is_file():
        return None
    return card if len(PrivacyLedger.read(ledger)) == card.claim.get("num_releases") else None


def write_records(folder: Path, records: Iterable[CellRecord]) -> Path:
    """Write all records at once; a crash leaves the old file or the new one.

    Args:
        folder: The comparison's folder.
        records: One per cell.

    Returns: The file.
    """
    path = folder / RECORDS_FILE
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(_plain(record)) + "\n" for record in records), encoding="utf-8")
    os.replace(draft, path)
    return path


def read_records(folder: Path) -> list[CellRecord]:
    """Read what `write_records` wrote.

    Raises:
        ConfigurationError: Missing, or not records.
    """
    path = folder / RECORDS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [CellRecord(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(f"Expected the records of a comparison, got {path}: {error}.") from None


def _plain(record: CellRecord) -> dict[str, Any]:
    values = asdict(record)
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}

"""The report of a comparison. Every number in its tables comes from a run card; what was spent, from the ledgers."""

import datetime
import json
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_dp.accounting.budget_state import BudgetState
from lightning_dp.benchmark.appendix import claims, costs, each, ledger, missing, protocols
from lightning_dp.benchmark.document import (
    Bullets,
    Figure,
    Heading,
    Paragraph,
    Part,
    Strong,
    Table,
    write_markdown,
    write_page,
)
from lightning_dp.benchmark.figures import sample_sheet, utility_plot
from lightning_dp.benchmark.records import CellRecord
from lightning_dp.benchmark.rows import RULE, Result, Row, best_row, blocks_of, metrics_of, rows_of
from lightning_dp.benchmark.spending import Spending, read_ledgers, total_spending
from lightning_dp.evaluation.card_text import ceil_text, number_text
from lightning_dp.evaluation.report import read_run_card
from lightning_dp.wording import counted

MARKDOWN_FILE = "report.md"
PAGE_FILE = "report.html"
SPENDING_FILE = "spending.json"
STATEMENT = "statement"
"""Column of what runs without an epsilon state."""

_IN_TABLES = ("accuracy/test", "accuracy/cnn", "accuracy/mlp", "accuracy/logistic", "fid", "precision", "recall")
_TITLES = {"fid": "FID", "kid": "KID", "accuracy/cnn": "accuracy, CNN", "accuracy/mlp": "accuracy, MLP"}
_PLOTTED = ("accuracy/test", "accuracy/cnn", "accuracy/mlp", "accuracy/logistic", "fid")


def write_report(
    folder: Path, records: Sequence[CellRecord], *, name: str, delta: float, budgets: Sequence[BudgetState] = ()
) -> list[Spending]:
    """Write `report.md` with its figures, `report.html` and `spending.json` into a comparison's folder.

    Args:
        folder: The comparison's folder.
        records: One per cell; only their status, reason and card's path are used.
        name: Name of the comparison.
        delta: Delta of the comparison.
        budgets: Budgets of data sets in which its runs are.

    Returns: What all runs together spent, per data set.

    Raises:
        ConfigurationError: A card that a record names cannot be read, or a ledger is altered.
    """
    results = [_result(folder, record) for record in records if record.card is not None]
    spent = total_spending(read_ledgers(folder), delta=delta, budgets=budgets)
    parts = report_parts(name, records, results, spent)
    write_markdown(parts, folder / MARKDOWN_FILE)
    write_page(parts, folder / PAGE_FILE)
    text = json.dumps([entry.to_dict() for entry in spent], indent=2)
    (folder / SPENDING_FILE).write_text(text + "\n", encoding="utf-8")
    return spent


def result_tables(folder: Path, records: Sequence[CellRecord]) -> list[tuple[str, Table]]:
    """Return the report's tables of results, each with its title, for a terminal.

    Args:
        folder: The comparison's folder.
        records: One per cell.
    """
    rows = rows_of(_result(folder, record) for record in records if record.card is not None)
    tables, title = [], ""
    for part in [*_ranked(rows), *_unranked(rows)]:
        if isinstance(part, Heading):
            title = part.text
        elif isinstance(part, Table):
            tables.append((title, part))
    return tables


def report_parts(
    name: str, records: Sequence[CellRecord], results: Sequence[Result], spent: Sequence[Spending]
) -> list[Part]:
    """Return the report as parts.

    Args:
        name: Name of the comparison.
        records: One per cell.
        results: The finished runs, from their cards.
        spent: What all runs together spent.
    """
    rows = rows_of(results)
    return [
        *_head(name, records, results),
        *_ranked(rows),
        *_unranked(rows),
        *_curves(rows),
        *_samples(rows),
        *costs(rows),
        *ledger(spent),
        *claims(results),
        *protocols(results),
        *missing(records),
    ]


def _result(folder: Path, record: CellRecord) -> Result:
    path = folder / str(record.card)
    return Result(read_run_card(path), path.parent)


def _head(name: str, records: Sequence[CellRecord], results: Sequence[Result]) -> list[Part]:
    counts = {status: sum(record.status == status for record in records) for status in dict.fromkeys(_STATUSES)}
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return [
        Heading(f"Comparison: {name}", 1),
        Paragraph(f"Written {today}{_commit()}. {counted(len(records), 'cell')}: {told}."),
        Bullets(_statements(results)),
    ]


def _commit() -> str:
    """Return the commit of the code where it runs from a checkout, else nothing."""
    folder = Path(__file__).parent
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return f" at commit {told.stdout.strip()}"


_STATUSES = ("finished", "failed", "refused", "interrupted", "waiting")


def _statements(results: Sequence[Result]) -> list[str]:
    """Return what is common to the runs: the privacy statement, the machine, the versions."""
    relations = each(
        f"Neighbouring relation {result.card.claim['relation']}, delta {number_text(result.card.claim['delta'])}: "
        "every epsilon below is stated under it."
        for result in results
    )
    machines = each(f"Machine: {_machine(result)}." for result in results)
    versions = each(f"Versions: {', '.join(f'{k} {v}' for k, v in r.card.versions.items())}." for r in results)
    return [*relations, *machines, *versions]


def _machine(result: Result) -> str:
    cost = result.card.cost
    return (
        ", ".join(str(cost[key]) for key in ("machine", "processors", "memory", "device") if key in cost)
        or "not stated"
    )


def _ranked(rows: Sequence[Row]) -> list[Part]:
    """Return the tables of PROVED rows, one for each group that may be ranked."""
    parts: list[Part] = [Heading("Results"), Paragraph(RULE)]
    blocks = blocks_of(row for row in rows if row.is_proved)
    for block in sorted(blocks, key=lambda block: (block[0].first.data, block[0].target_epsilon or 0.0)):
        metrics = [name for name in metrics_of(block) if name in _IN_TABLES]
        best = {metric: best_row(block, metric) for metric in metrics}
        body = []
        for row in block:
            cells = [Strong(row.text(m)) if best[m] is row else row.text(m) for m in metrics]
            spent = ceil_text(row.epsilon if row.epsilon is not None else "-")
            body.append([row.first.card.title, row.first.mechanism, *cells, spent, str(len(row.results))])
        parts.append(Heading(_block_title(block[0]), 3))
        parts.append(Table(["method", "mechanism", *map(_title, metrics), "epsilon spent", "seeds"], body))
    return parts if blocks else [*parts, Paragraph("No run with a PROVED claim has finished.")]


def _title(metric: str) -> str:
    return _TITLES.get(metric, metric.replace("/", ", "))


def _block_title(row: Row) -> str:
    target = "no target" if row.target_epsilon is None else f"epsilon {row.target_epsilon:g}"
    return f"{row.first.data}, {target}, {_judged(row)}"


def _judged(row: Row) -> str:
    if row.protocol is not None:
        return f"metric protocol {row.protocol}"
    return "released classifiers on the test split" if row.first.card.evaluation else "not evaluated"


def _unranked(rows: Sequence[Row]) -> list[Part]:
    """Return the rows that have no epsilon, each with its own statement."""
    others = [row for row in rows if not row.is_proved]
    if not others:
        return []
    parts: list[Part] = [
        Heading("Not ranked"),
        Paragraph("These runs have no PROVED claim. They show what their statement says, and no epsilon."),
    ]
    for block in _by_protocol(others):
        metrics = [name for name in metrics_of(block) if name in _IN_TABLES]
        body = [
            [r.first.card.title, r.first.mechanism, *(r.text(m) for m in metrics), _noise(r), str(len(r.results)), s]
            for r in block
            for s in [r.first.card.claim_statement]
        ]
        parts.append(Heading(f"{block[0].first.data}, {_judged(block[0])}", 3))
        parts.append(
            Table(["method", "mechanism", *map(_title, metrics), "noise multiplier", "seeds", STATEMENT], body)
        )
    return parts


def _noise(row: Row) -> str:
    return number_text(row.first.card.mechanism.get("noise_multiplier", "none"))


def _by_protocol(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the rows in groups of one data set, relation, delta and metric protocol."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.first.row_key[:5], []).append(row)
    return list(groups.values())


def _curves(rows: Sequence[Row]) -> list[Part]:
    parts: list[Part] = []
    for group in _by_protocol(rows):
        for metric in (name for name in metrics_of(group) if name in _PLOTTED):
            if (png := utility_plot(group, metric)) is not None:
                data = group[0].first.data
                name = f"utility-{len(parts)}-{data}-{metric}.png".replace("/", "_")
                parts.append(Figure(name, png, f"{data}: {metric} over epsilon, {_judged(group[0])}."))
    return [Heading("Privacy and utility"), *parts] if parts else []


def _samples(rows: Sequence[Row]) -> list[Part]:
    parts: list[Part] = []
    for data in each(row.first.data for row in rows):
        shown = sorted((r for r in rows if r.first.data == data), key=lambda r: r.target_epsilon or float("inf"))
        if (png := sample_sheet([row.first for row in shown])) is not None:
            caption = f"{data}: samples of the first seed of every row, one class a line."
            parts.append(Figure(f"samples-{len(parts)}-{data}.png", png, caption))
    return [Heading("Samples"), *parts] if parts else []

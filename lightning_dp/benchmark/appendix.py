"""The parts of a report behind its tables: costs, what was spent, every claim, protocols, and what is missing."""

import json
import statistics
from collections.abc import Iterable, Sequence

from lightning_dp.benchmark.document import Bullets, Heading, Paragraph, Part, Table
from lightning_dp.benchmark.records import CellRecord
from lightning_dp.benchmark.rows import Result, Row, mean_text
from lightning_dp.benchmark.spending import Spending
from lightning_dp.evaluation.card_text import seconds_text


def costs(rows: Sequence[Row]) -> list[Part]:
    """Return the table of times and memory."""
    if not rows:
        return []
    header = ["method", "mechanism", "epsilon", "training", "evaluation", "total a run", "processor", "peak memory, MB"]
    body = []
    for row in rows:
        times = [_seconds(row.cost(f"{part}_time_s")) for part in ("train", "evaluation", "total", "cpu")]
        target = "-" if row.target_epsilon is None else f"{row.target_epsilon:g}"
        memory = mean_text([float(round(value)) for value in row.cost("peak_memory_mb")])
        body.append([row.first.card.title, row.first.mechanism, target, *times, memory, str(len(row.results))])
    whole = sum(sum(row.cost("total_time_s")) for row in rows)
    return [
        Heading("Cost"),
        Table([*header, "runs"], body),
        Paragraph(
            "Means over seeds; the processor's time counts all threads and the start of the process. All finished runs "
            f"together took {seconds_text(whole)}, start of processes left out."
        ),
    ]


def _seconds(values: Sequence[float]) -> str:
    return seconds_text(statistics.fmean(values)) if values else "-"


def ledger(spent: Sequence[Spending]) -> list[Part]:
    """Return what all ledgers in the folder add up to."""
    return [
        Heading("What the whole comparison spent"),
        Paragraph(
            "An epsilon above speaks of one run, published alone. Whoever sees all of them learns more: here all "
            "ledgers in this folder are composed, those of failed and repeated runs included."
        ),
        Bullets([line for entry in spent for line in entry.lines()] or ["Nothing was released."]),
        *(Paragraph(text, is_warning=True) for text in each(w for entry in spent for w in entry.whole.warnings)),
        Paragraph(f"Not covered: {'; '.join(each(t for e in spent for t in e.whole.not_covered)) or 'nothing named'}."),
    ]


def claims(results: Sequence[Result]) -> list[Part]:
    """Return every claim in full: what all of them say once, then each with what it says besides; equal ones once."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(json.dumps([result.card.title, result.card.claim, result.card.seed_policy]), []).append(
            result
        )
    if not groups:
        return []
    lines = {key: _claim_lines(group[0]) for key, group in groups.items()}
    shared = [line for line in next(iter(lines.values())) if all(line in other for other in lines.values())]
    parts: list[Part] = [Heading("Every claim in full"), Paragraph("All of them:"), Bullets(shared)]
    for key, group in groups.items():
        seeds = ", ".join(str(result.seed) for result in group)
        parts.append(Heading(f"{Row(tuple(group)).label}, {group[0].data}, seeds {seeds}", 3))
        parts.append(Paragraph(group[0].card.claim_statement))
        own = [line for line in lines[key] if line not in shared]
        parts += [Bullets(own)] if own else []
    return parts


def _claim_lines(result: Result) -> list[str]:
    claim = result.card.claim
    lines = [f"privacy unit: {claim['unit']}", f"sampler: {claim.get('sampler', 'not stated')}"]
    for title, key in (("assumes", "assumptions"), ("not covered", "not_covered"), ("warning", "warnings")):
        lines += [f"{title}: {text}" for text in claim.get(key, ())]
    return [*lines, f"seed policy: {result.card.seed_policy}"]


def protocols(results: Sequence[Result]) -> list[Part]:
    """Return the settings behind every protocol hash."""
    found = {}
    for result in results:
        evaluation = result.card.evaluation or {}
        if "protocol_hash" in evaluation:
            found[evaluation["protocol_hash"]] = result.card.config.get("evaluation", {})
    if not found:
        return []
    lines = [f"{key}: {json.dumps(settings)}" for key, settings in found.items()]
    return [
        Heading("Metric protocols"),
        Paragraph("FID and accuracy compare only under one hash, on one test split; no table above mixes two."),
        Bullets(lines),
    ]


def missing(records: Sequence[CellRecord]) -> list[Part]:
    """Return the cells that did not finish, with the reason."""
    unfinished = [record for record in records if record.status != "finished"]
    if not unfinished:
        return []
    groups: dict[tuple[str, ...], list[int]] = {}
    for record in unfinished:
        target = "-" if record.target_epsilon is None else f"{record.target_epsilon:g}"
        row = (record.method, record.mechanism, record.data, target, record.status, record.reason or "-")
        groups.setdefault(row, []).append(record.seed)
    body = [[*row[:4], ", ".join(map(str, seeds)), *row[4:]] for row, seeds in groups.items()]
    header = ["method", "mechanism", "data", "epsilon", "seeds", "status", "reason"]
    return [Heading("Cells without a result"), Table(header, body)]


def each(texts: Iterable[str]) -> list[str]:
    """Return every text once, in order."""
    return list(dict.fromkeys(texts))

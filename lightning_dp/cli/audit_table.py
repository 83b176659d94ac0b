"""``lightning-dp audit --table``: every pair of a method and a mechanism, proved from above and audited from below."""

import datetime
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_dp.errors import ConfigurationError, PrivacyProtocolError

if TYPE_CHECKING:
    from lightning_dp.auditing.door import Door
    from lightning_dp.auditing.method import MethodRun
    from lightning_dp.auditing.result import AuditResult

DEFAULT_FILE = "docs/guarantees.md"
START, END = "<!-- audited pairs: begin -->", "<!-- audited pairs: end -->"
COMMAND = "lightning-dp audit --table"

_STEPS = 3
_NOISE_MULTIPLIER = 1.0
_LARGEST_RELEASE = 20_000  # numbers; a wider release gets fewer trials
_LEAST_CALLS = 200
_PREFERRED = ("add_or_remove_one", "replace_one", "replace_special")
_HEADER = (
    "method",
    "mechanism",
    "relation",
    "level",
    "proved epsilon",
    "audited lower bound (confidence)",
    "of any law",
    "whole method",
    "audits",
    "verdict",
    "date",
)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TableRow:
    """One audited pair.

    Attributes:
        cells: Text by column.
        results: The audits behind it.
    """

    cells: tuple[str, ...]
    results: "tuple[AuditResult, ...]"


def write_table(configs: Path, out: Path, *, calls: int, only: str | None, confidence: float, delta: float) -> int:
    """Audit all pairs and put the table between its markers; exit code 1 if one is violated.

    Args:
        configs: Folder of configurations of whole runs.
        out: File with both markers; one that is missing is made.
        calls: Releases of each world of the two-world test.
        only: Only configurations whose name holds this; rows of others stay as they are.
        confidence: Of the lower bounds.
        delta: Of the claims.

    Raises:
        ConfigurationError: The file has no markers.
    """
    from lightning_dp.auditing.result import AuditResult, Verdict, worst_verdict

    old = out.read_text(encoding="utf-8") if out.exists() else f"{START}\n{END}\n"
    if START not in old or END not in old:
        raise ConfigurationError(f"Expected the markers {START} and {END} in {out}; add them where the table belongs.")
    before, rest = old.split(START, 1)
    inside, after = rest.split(END, 1)
    kept = _known_rows(inside) if only is not None else {}
    results: list[AuditResult] = []
    number = 0
    for row in _rows(configs, calls=calls, only=only, confidence=confidence, delta=delta):
        number += 1
        results += row.results
        kept[row.cells[:3]] = row.cells
        # After each pair: the whole table takes an hour, and what was measured should survive an interruption.
        table = _table_text(kept.values(), delta=delta, calls=calls)
        out.write_text(f"{before}{START}\n{table}\n{END}{after}", encoding="utf-8")
    found = worst_verdict(results)
    print(f"{number} pairs audited, verdict: {found}; table in {out}")
    return 1 if found is Verdict.VIOLATED else 0


def _known_rows(table: str) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Return the rows of a table that was written before, by method, mechanism and relation."""
    lines = [line.strip().strip("|").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    cells = [tuple(cell.strip() for cell in line) for line in lines]
    return {row[:3]: row for row in cells if len(row) == len(_HEADER) and row != _HEADER}


def _table_text(rows: "Iterable[tuple[str, ...]]", *, delta: float, calls: int) -> str:
    lines = [
        f"By `{COMMAND}`: noise multiplier {_NOISE_MULTIPLIER:g}, delta {delta:g}, one release (whole method: "
        f"{_STEPS}), {calls} trials of each world where a release is no wider than {_LARGEST_RELEASE:,} numbers, else fewer.",
        "",
        f"| {' | '.join(_HEADER)} |",
        f"|{'---|' * len(_HEADER)}",
        *(f"| {' | '.join(row)} |" for row in sorted(rows)),
    ]
    return "\n".join(lines)


def _rows(configs: Path, *, calls: int, only: str | None, confidence: float, delta: float) -> Iterator[TableRow]:
    """Yield one row for each method and mechanism that run together, under the first relation with a proof."""
    from lightning_dp.benchmark.matrix import merged_methods
    from lightning_dp.cli.matrix import all_pairs

    for names, pairs in merged_methods(all_pairs(configs)).items():
        if only is not None and only not in names:
            continue
        config = configs / f"{names.split(', ')[0]}.yaml"
        for pair in pairs:
            relation = next((name for name in _PREFERRED if name in pair.levels), None)
            if relation is None or str(pair.levels[relation]) == "NONPRIVATE":
                continue
            _logger.info(f"{pair.module} with {pair.mechanism}, {relation} ({config.stem})")
            yield audit_pair(
                config,
                pair.mechanism,
                relation,
                level=str(pair.levels[relation]),
                calls=calls,
                confidence=confidence,
                delta=delta,
            )


def audit_pair(
    config: Path, mechanism: str, relation: str, *, level: str, calls: int, confidence: float, delta: float
) -> TableRow:
    """Audit one pair: the mechanism on the rows of the configuration as it stands, and a small version of the method.

    Args:
        config: Configuration of the method.
        mechanism: Class name.
        relation: Neighbouring relation.
        level: Claim level of the pair.
        calls: See `write_table`.
        confidence: See `write_table`.
        delta: See `write_table`.
    """
    door, sampling, run = _whole_door(config, mechanism, relation, delta)
    results = [*_mechanism_results(door, sampling, calls, confidence, delta)]
    results.append(_method_result(config, run, relation, delta))
    named = {result.audit: result for result in results}
    worlds, method = named["two worlds"], named.get("method")
    claimed = worlds.claimed_epsilon
    return TableRow(
        cells=(
            f"{type(run.module).__name__} (`{config.stem}`)",
            mechanism,
            relation,
            level,
            f"{claimed:.3f}",
            f"{worlds.lower_bound:.3f} ({confidence:.0%})",
            f"{worlds.measured['epsilon_any_mechanism']:.3f}",
            "—" if method is None else f"{method.measured['ratio']:.3f} of the bound, {_rows_text(method)}",
            ", ".join(named),
            _verdict_text(results),
            datetime.date.today().isoformat(),
        ),
        results=tuple(results),
    )


def _rows_text(method: "AuditResult") -> str:
    changed = int(method.measured["changed_rows"])
    return f"{changed} row{'s' * (changed != 1)} changed"


def _verdict_text(results: "Sequence[AuditResult]") -> str:
    from lightning_dp.auditing.result import worst_verdict

    found = worst_verdict(results)
    doubtful = [result.audit for result in results if str(result.verdict) != "consistent"]
    return str(found) + (f" ({', '.join(doubtful)})" if doubtful else "")


def _flags(mechanism: str, relation: str, delta: float) -> tuple[str, ...]:
    return (
        *("--privacy.neighboring_relation", relation, "--privacy.target_epsilon", "null"),
        *("--privacy.noise_multiplier", str(_NOISE_MULTIPLIER), "--privacy.target_delta", str(delta)),
    )


def _whole_door(config: Path, mechanism: str, relation: str, delta: float) -> "tuple[Door, Any, MethodRun]":
    """Return the door of a configuration as it stands, how records enter it, and the module with its mechanism."""
    from lightning_dp.accounting.events import parse_relation
    from lightning_dp.auditing.door import Door
    from lightning_dp.auditing.method import MethodRun
    from lightning_dp.cli.matrix import _own_mechanism, _variants
    from lightning_dp.cli.planning import plan_cli
    from lightning_dp.mechanisms.base import ReleasePlan

    others = [_own_mechanism(path) for path in sorted(config.parent.glob("*.yaml"))]
    cli = plan_cli(config, *_flags(mechanism, relation, delta), "--trainer.max_steps", "1")
    spec = cli.model.contribution_spec()
    for variant in _variants(mechanism, _own_mechanism(config), iter(others)):
        try:
            variant.check(spec)
            plan = ReleasePlan(spec=spec, relation=parse_relation(relation), noise_multiplier=_NOISE_MULTIPLIER)
            variant.step_event(plan)
        except ConfigurationError:
            continue
        door = Door(mechanism=variant, plan=plan)
        run = MethodRun(
            module=cli.model, data=cli.datamodule, mechanism=variant, privacy=cli.privatizer.accountant.privacy
        )
        return door, cli.model.sampling, run
    raise PrivacyProtocolError(f"{mechanism} runs with {config.stem} by the matrix, but not here.")


def _mechanism_results(
    door: "Door", sampling: Any, calls: int, confidence: float, delta: float
) -> "Iterator[AuditResult]":
    """Yield the audits of a mechanism that a release of this size allows."""
    from lightning_dp.auditing.suite import audit_mechanism
    from lightning_dp.auditing.two_worlds import audit_two_worlds

    size = door.shape[0] * door.mechanism.encoded_dim(door.plan.spec)
    if size > _LARGEST_RELEASE:
        calls = max(_LEAST_CALLS, calls * _LARGEST_RELEASE // size)
    names = ("protocol", "sensitivity", "noise", "noise hygiene", "directions")
    yield from audit_mechanism(door, calls=min(calls, 500), confidence=confidence, delta=delta, only=names)
    yield audit_two_worlds(door, calls=calls, sampling=sampling, confidence=confidence, delta=delta)


def _method_result(config: Path, run: "MethodRun", relation: str, delta: float) -> "AuditResult":
    """Return the audit of a small version of the method with the same mechanism and options."""
    from lightning_dp.auditing.method import audit_method
    from lightning_dp.cli.audit import small_run

    # Teachers under zero-out are played out as replace-one, which moves as much or more.
    make = small_run(config, *_flags(type(run.mechanism).__name__, relation, delta), steps=_STEPS)

    def make_run() -> "MethodRun":
        return replace(make(), mechanism=run.mechanism)

    return audit_method(make_run, steps=_STEPS)

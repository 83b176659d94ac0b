"""``lightning-dp audit --table``: every pair of a method and a mechanism, proved from above and audited from below."""

import copy
import datetime
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_dp.errors import ConfigurationError, PrivacyProtocolError

if TYPE_CHECKING:
    from lightning_dp.auditing.door import Door
    from lightning_dp.auditing.method import MethodRun
    from lightning_dp.auditing.result import AuditResult
    from lightning_dp.mechanisms.base import Mechanism

DEFAULT_FILE = "docs/guarantees.md"
START, END = "<!-- audited pairs: begin -->", "<!-- audited pairs: end -->"
COMMAND = "lightning-dp audit --table"

_STEPS = 3
_NOISE_MULTIPLIER = 1.0
_AUDITS = ("protocol", "sensitivity", "noise", "noise hygiene", "directions")
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
        f"By `{COMMAND}`, for a small version of each configuration (at most a hundred embedded digits, small "
        f"networks): noise multiplier {_NOISE_MULTIPLIER:g}, delta {delta:g}, one release (whole method: {_STEPS}), "
        f"{calls} trials of each world.",
        "",
        f"| {' | '.join(_HEADER)} |",
        f"|{'---|' * len(_HEADER)}",
        *(f"| {' | '.join(row)} |" for row in sorted(rows)),
    ]
    return "\n".join(lines)


def _rows(configs: Path, *, calls: int, only: str | None, confidence: float, delta: float) -> Iterator[TableRow]:
    """Yield one row for each method and mechanism that run together, under the first relation with a proof.

    Each method is planned once, small; a pair is judged, and audited, as that plan stands.
    """
    from lightning_dp.benchmark.matrix import judge_pair
    from lightning_dp.cli.audit import small_run
    from lightning_dp.cli.matrix import _own_mechanism, _variants
    from lightning_dp.cli.messages import subclass_names
    from lightning_dp.mechanisms.base import Mechanism

    paths = sorted(configs.glob("*.yaml"))
    known = {path: _own_mechanism(path) for path in paths}
    for path in _one_of_each(paths, only):
        run = small_run(path, "--privacy.target_delta", str(delta), steps=_STEPS)()
        facts: Any = run.data
        for name in subclass_names(Mechanism):
            variants = list(_variants(name, known[path], iter(known.values())))
            pair = judge_pair(path.stem, run.module, facts, variants)
            relation = next((one for one in _PREFERRED if one in pair.levels), None)
            if relation is None or str(pair.levels[relation]) == "NONPRIVATE":
                continue
            _logger.info(f"{pair.module} with {pair.mechanism}, {relation} ({path.stem})")
            yield audit_pair(
                path.stem,
                replace(run, privacy=replace(run.privacy, neighboring_relation=relation)),
                variants,
                level=str(pair.levels[relation]),
                calls=calls,
                confidence=confidence,
            )


def _one_of_each(paths: Sequence[Path], only: str | None) -> list[Path]:
    """Return the first configuration of each method, teachers of another kind and secret judges being another one."""
    found: dict[tuple[object, ...], Path] = {}
    for path in paths:
        if only is not None and only not in path.stem:
            continue
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        options = model.get("init_args", {})
        teachers = (options.get("teachers") or {}).get("class_path")
        found.setdefault((model["class_path"], teachers, "expected_judges" in options), path)
    return list(found.values())


def audit_pair(
    name: str, run: "MethodRun", variants: "Sequence[Mechanism]", *, level: str, calls: int, confidence: float
) -> TableRow:
    """Audit one pair: the mechanism on rows as the method states them, and the method.

    Args:
        name: Of the configuration.
        run: Module, data and privacy.
        variants: The mechanism with different options; the first that has a proof is audited.
        level: Claim level of the pair.
        calls: See `write_table`.
        confidence: See `write_table`.
    """
    from lightning_dp.auditing.method import audit_method
    from lightning_dp.auditing.suite import audit_mechanism
    from lightning_dp.auditing.two_worlds import audit_two_worlds

    door, delta = _first_door(run, variants), run.privacy.target_delta
    results = audit_mechanism(door, calls=calls, confidence=confidence, delta=delta, only=_AUDITS)
    worlds = audit_two_worlds(door, calls=calls, sampling=run.module.sampling, confidence=confidence, delta=delta)

    def make_run() -> "MethodRun":
        # The records are the same; what changes them puts new ones in their place.
        return replace(
            run, module=copy.deepcopy(run.module), data=copy.copy(run.data), mechanism=copy.copy(door.mechanism)
        )

    method = audit_method(make_run, steps=_STEPS)
    results = [*results, worlds, method]
    return TableRow(
        cells=(
            f"{type(run.module).__name__} (`{name}`)",
            type(door.mechanism).__name__,
            run.privacy.neighboring_relation,
            level,
            f"{worlds.claimed_epsilon:.3f}",
            f"{worlds.lower_bound:.3f} ({confidence:.0%})",
            f"{worlds.measured['epsilon_any_mechanism']:.3f}",
            f"{method.measured['ratio']:.3f} of the bound, {_rows_text(method)}",
            ", ".join(result.audit for result in results),
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

    doubtful = [result.audit for result in results if str(result.verdict) != "consistent"]
    return str(worst_verdict(results)) + (f" ({', '.join(doubtful)})" if doubtful else "")


def _first_door(run: "MethodRun", variants: "Sequence[Mechanism]") -> "Door":
    """Return the door of the first mechanism that has a proof."""
    from lightning_dp.auditing.door import Door
    from lightning_dp.mechanisms.base import ReleasePlan

    spec = run.module.contribution_spec()
    for mechanism in variants:
        try:
            mechanism.check(spec)
            plan = ReleasePlan(spec=spec, relation=run.privacy.relation, noise_multiplier=_NOISE_MULTIPLIER)
            mechanism.step_event(plan)
        except ConfigurationError:
            continue
        return Door(mechanism=mechanism, plan=plan)
    raise PrivacyProtocolError("A pair runs by the matrix, but not here.")

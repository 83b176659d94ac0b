"""``lightning-dp audit --table``: every pair of a method and a mechanism, proved from above and audited from below."""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_dp.cli.audit_pairs import TableOptions, TableRow, audit_pair, method_name
from lightning_dp.errors import ConfigurationError
from lightning_dp.wording import counted

if TYPE_CHECKING:
    from lightning_dp.auditing.method import MethodRun
    from lightning_dp.benchmark.matrix import Pair
    from lightning_dp.mechanisms.base import Mechanism

DEFAULT_FILE = "docs/guarantees.md"
START, END = "<!-- audited pairs: begin -->", "<!-- audited pairs: end -->"
COMMAND = "lightning-dp audit --table"

_PREFERRED = ("add_or_remove_one", "replace_one", "replace_special")
_HEADER = (
    "method",
    "mechanism",
    "relation",
    "level",
    "proved epsilon",
    "audited: of the stated law",
    "audited: of any law (within reach), draws",
    "whole method",
    "why lower",
    "audits",
    "verdict",
    "date",
)

_logger = logging.getLogger(__name__)


class _Progress:
    """Rows of a table that is not finished, in a file beside it, so that an interrupted one goes on.

    Args:
        out: The file of the table.
        options: How rows are made; rows that were made in another way are dropped.
    """

    def __init__(self, out: Path, options: TableOptions) -> None:
        self.path = out.with_suffix(".partial.jsonl")
        self._first = json.dumps(asdict(options))
        self.rows: list[TableRow] = []
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        if lines and lines[0] == self._first:
            # A line that was cut off while it was written is measured again.
            whole = [line for line in lines[1:] if line.endswith("}")]
            self.rows = [TableRow(tuple(found["cells"]), found["verdict"]) for found in map(json.loads, whole)]
            self.rows = [row for row in self.rows if len(row.cells) == len(_HEADER)]
        self._write()

    def _write(self) -> None:
        lines = [self._first, *(json.dumps(asdict(row)) for row in self.rows)]
        self.path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def add(self, row: TableRow) -> None:
        """Keep one more row."""
        self.rows.append(row)
        self._write()

    @property
    def keys(self) -> set[tuple[str, ...]]:
        """Methods and mechanisms that are done."""
        return {row.cells[:2] for row in self.rows}


def write_table(configs: Path, out: Path, *, options: TableOptions, only: str | None) -> int:
    """Audit all pairs and put the table between its markers; exit code 1 if one is violated.

    The table is written when all rows are there. Until then they are kept in OUT.partial.jsonl, and the same command
    goes on from them; delete that file to start again.

    Args:
        configs: Folder of configurations of whole runs.
        out: File with both markers; one that is missing is made.
        options: How.
        only: Only configurations whose name holds this; rows of others stay as they are.

    Raises:
        ConfigurationError: The file has no markers.
    """
    before, inside, after = _parts(out)
    progress = _Progress(out, options)
    if progress.rows:
        _logger.info(f"{len(progress.rows)} rows were measured before an interruption ({progress.path}).")
    try:
        for row in _rows(configs, options=options, only=only, done=progress.keys):
            progress.add(row)
    except KeyboardInterrupt:
        there = f"{counted(len(progress.rows), 'row')} kept in {progress.path}"
        raise KeyboardInterrupt(f"interrupted, {there}; the same command goes on from there") from None
    kept = _known_rows(inside) if only is not None else {}
    kept |= {row.cells[:3]: row.cells for row in progress.rows}
    table = _table_text(kept.values(), options)
    before, _, after = _parts(out)  # words around it may have changed in the meantime
    out.write_text(f"{before}{START}\n{table}\n{END}{after}", encoding="utf-8")
    progress.path.unlink()
    verdicts = [row.verdict for row in progress.rows]
    found = next((one for one in ("violated", "inconclusive") if one in verdicts), "consistent")
    print(f"{len(verdicts)} pairs audited, verdict: {found}; table in {out}")
    return 1 if found == "violated" else 0


def _parts(out: Path) -> tuple[str, str, str]:
    """Return what stands before, between and after the markers of a file."""
    text = out.read_text(encoding="utf-8") if out.exists() else f"{START}\n{END}\n"
    if START not in text or END not in text:
        raise ConfigurationError(f"Expected the markers {START} and {END} in {out}; add them where the table belongs.")
    before, rest = text.split(START, 1)
    inside, after = rest.split(END, 1)
    return before, inside, after


def _known_rows(table: str) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Return the rows of a table that was written before, by method, mechanism and relation."""
    lines = [line.strip().strip("|").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    cells = [tuple(cell.strip() for cell in line) for line in lines]
    return {row[:3]: row for row in cells if len(row) == len(_HEADER) and row != _HEADER}


def _table_text(rows: "Iterable[tuple[str, ...]]", options: TableOptions) -> str:
    lines = [
        f"By `{COMMAND}`, for a small version of each configuration (at most a hundred embedded digits, small "
        f"networks): noise multiplier {options.noise_multiplier:g}, delta {options.delta:g}, one release (whole "
        f"method: {options.steps}), {options.calls} releases of each world through the door, bounds at confidence "
        f"{options.confidence:.0%}; a row in doubt at that confidence was measured once more, one that is violated "
        "never.",
        "",
        f"| {' | '.join(_HEADER)} |",
        f"|{'---|' * len(_HEADER)}",
        *(f"| {' | '.join(row)} |" for row in sorted(rows)),
    ]
    return "\n".join(lines)


def _rows(configs: Path, *, options: TableOptions, only: str | None, done: set[tuple[str, ...]]) -> Iterator[TableRow]:
    """Yield one row for each method and mechanism that run together, under the first relation with a proof."""
    for path, run, pair, variants in table_pairs(configs, only=only, options=options):
        relation = next(one for one in _PREFERRED if one in pair.levels)
        if (method_name(path.stem, run), pair.mechanism) in done:
            continue
        _logger.info(f"{pair.module} with {pair.mechanism}, {relation} ({path.stem})")
        planned = replace(run, privacy=replace(run.privacy, neighboring_relation=relation))
        row = audit_pair(path.stem, planned, variants, level=str(pair.levels[relation]), options=options)
        if row.verdict == "inconclusive":  # each audit doubts one right row in twenty; an alarm is never repeated
            _logger.info("in doubt; once more with fresh noise")
            row = audit_pair(path.stem, planned, variants, level=str(pair.levels[relation]), options=options)
        yield row


def table_pairs(
    configs: Path, *, only: str | None, options: TableOptions
) -> "Iterator[tuple[Path, MethodRun, Pair, list[Mechanism]]]":
    """Yield every pair that the matrix allows and that claims something, with what is needed to audit it.

    Each method is planned once, small; a pair is judged, and audited, as that plan stands.

    Args:
        configs: Folder of configurations of whole runs.
        only: Only configurations whose name holds this.
        options: How they will be audited.
    """
    from lightning_dp.benchmark.matrix import judge_pair
    from lightning_dp.cli.audit import small_run
    from lightning_dp.cli.matrix import _own_mechanism, _variants
    from lightning_dp.cli.messages import subclass_names
    from lightning_dp.mechanisms.base import Mechanism

    paths = sorted(configs.glob("*.yaml"))
    known = {path: _own_mechanism(path) for path in paths}
    for path in _one_of_each(paths, only):
        run = small_run(path, "--privacy.target_delta", str(options.delta), steps=options.steps)()
        facts: Any = run.data
        for name in subclass_names(Mechanism):
            variants = list(_variants(name, known[path], iter(known.values())))
            pair = judge_pair(path.stem, run.module, facts, variants)
            if "NONPRIVATE" not in map(str, pair.levels.values()) and pair.runs:
                yield path, run, pair, variants


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

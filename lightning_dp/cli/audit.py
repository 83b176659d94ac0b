"""``lightning-dp audit``: try to break a claim, of a mechanism, of a method, or of a finished run."""

import logging
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ArgumentParser

from lightning_dp.cli.parsing import check_class_names, one_line, parse
from lightning_dp.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from lightning_dp.auditing.method import MethodRun
    from lightning_dp.auditing.result import AuditResult
    from lightning_dp.mechanisms.base import ContributionSpec, Mechanism

_KINDS = ("record", "teacher", "statistic", "joint")
_COLOURS = {"consistent": "green", "inconclusive": "yellow", "violated": "bold red"}

_NAME_WIDTH = 14  # letters of an audit's name in a line
_WORDS = {
    "consistent": "nothing that was tried contradicts the claim, which is no proof of it",
    "inconclusive": "something is unlikely under the claim, or took no part; repeat with more trials",
    "violated": "the claim does not hold; see the red lines",
}
_NO_CLAIM = "no epsilon is claimed, so no attack can contradict it"

HELP = """usage: lightning-dp audit mechanism NAME [--mechanism.OPTION VALUE ...] [options]
       lightning-dp audit method CONFIG [options] [flags of fit]
       lightning-dp audit RUN [options]
       lightning-dp audit --table [--out docs/guarantees.md]

Tries to break a claim and gives an empirical lower bound on epsilon beside it. Exit code 1 if a claim is violated.
'lightning-dp audit mechanism --help' (or method, or RUN --help) lists the options of each."""


def audit(arguments: list[str]) -> int:
    """Try to break the claim of a mechanism, of a method, or of a finished run; exit code 1 if it is violated."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0
    for name in ("pytorch_lightning", "lightning_fabric", "callbacks"):
        logging.getLogger(name).setLevel(logging.WARNING)
    kinds: dict[str, Callable[[list[str]], int]] = {"mechanism": _mechanism, "method": _method, "--table": _table}
    if arguments[0] in kinds:
        return kinds[arguments[0]](arguments[1:])
    return _run(arguments)


def _mechanism(arguments: list[str]) -> int:
    """Audit a mechanism through the real door, on rows that are as bad as they come."""
    from dp_accounting import NeighboringRelation

    from lightning_dp.accounting.events import relation_name
    from lightning_dp.auditing.door import Door
    from lightning_dp.auditing.sampling import audit_sampler
    from lightning_dp.auditing.suite import audit_mechanism
    from lightning_dp.cli import plugins  # noqa: F401  (names of mechanisms)
    from lightning_dp.gradients.poisson import PoissonSampler
    from lightning_dp.mechanisms.base import Mechanism, ReleasePlan

    parser = _parser("mechanism NAME", _mechanism.__doc__)
    parser.add_subclass_arguments(Mechanism, "mechanism", required=True, help="The mechanism and its options.")
    parser.add_argument("--rows", type=str | None, default=None, help=f"What rows are: {', '.join(_KINDS)}.")
    parser.add_argument("--relation", type=str | None, default=None, help="Neighbouring relation.")
    parser.add_argument("--noise_multiplier", type=float, default=1.0, help="Noise std / sensitivity.")
    parser.add_argument("--vector_dim", type=int, default=64, help="Length of a vector.")
    parser.add_argument("--calls", type=int, default=2000, help="Releases of each world of the two-world test.")
    parser.add_argument("--canaries", type=int, default=1000, help="Canaries of the one-run audit.")
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--mechanism", *arguments]
    check_class_names(arguments, {"mechanism": Mechanism})
    options: Any = parse(parser, arguments)
    _check(options)
    for name in ("calls", "canaries", "vector_dim"):
        if getattr(options, name) < 16:
            raise ConfigurationError(f"Expected --{name} >= 16, got {getattr(options, name)}.")
    mechanism = one_line(lambda: parser.instantiate_classes(options), {"mechanism": Mechanism}).mechanism
    if not mechanism.is_private:
        raise ConfigurationError(f"{type(mechanism).__name__} claims nothing, so there is nothing to audit.")
    spec = _spec(mechanism, options.rows, options.vector_dim)
    relation = options.relation or (
        "replace_one" if spec.kind == "teacher" else relation_name(NeighboringRelation.ADD_OR_REMOVE_ONE)
    )
    from lightning_dp.accounting.events import parse_relation

    plan = ReleasePlan(spec=spec, relation=parse_relation(relation), noise_multiplier=options.noise_multiplier)
    spec.alternatives(plan.relation)
    mechanism.check(spec)
    door = Door(mechanism=mechanism, plan=plan)
    results = audit_mechanism(
        door, calls=options.calls, canaries=options.canaries, confidence=options.confidence, delta=options.delta
    )
    if spec.kind == "record":
        results.append(audit_sampler(lambda: PoissonSampler(1000, 0.05)))
    return _finish(results, str(door), options.out)


def _method(arguments: list[str]) -> int:
    """Train a small version of a configuration in neighbouring worlds, and audit its mechanism on its own rows."""
    from lightning_dp.auditing.method import audit_method

    own, flags = _split(arguments)
    parser = _parser("method CONFIG", _method.__doc__)
    parser.add_argument("config", type=str, help="Configuration of a whole run; flags of fit may follow.")
    parser.add_argument("--steps", type=int, default=3, help="Releases of a run.")
    parser.add_argument("--whole", action="store_true", help="Leave the model as large as it is.")
    options: Any = parse(parser, own)
    _check(options)
    if options.steps < 1:
        raise ConfigurationError(f"Expected --steps >= 1, got {options.steps}.")
    make_run = small_run(Path(options.config), *flags, steps=options.steps, whole=options.whole)
    result = audit_method(make_run, steps=options.steps)
    return _finish([result], result.subject, options.out)


def small_run(config: Path, *flags: str, steps: int, whole: bool = False) -> "Callable[[], MethodRun]":
    """Return what makes a run of a configuration, small and on embedded digits.

    Args:
        config: Configuration of a whole run.
        flags: Flags over it.
        steps: Releases of a run.
        whole: Leave the model, and what its warm start fits, as large as they are.

    Raises:
        ConfigurationError: The configuration cannot be read.
    """
    from lightning_dp.auditing.method import MethodRun
    from lightning_dp.cli.planning import plan_cli
    from lightning_dp.cli.small_runs import small_data, smaller_model, smaller_warm_start

    try:
        given = yaml.safe_load(config.read_text(encoding="utf-8"))
        data, shrinking = small_data(given), () if whole else smaller_model(given)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"Expected a configuration of a whole run in {config} ({error}).") from None
    # A warm start takes a share of epsilon; else the noise is given, and no budget of the file counts.
    asked = _value_of("--warm_start", flags)
    kind = asked or (given.get("warm_start") or {}).get("class_path")
    shrunk = () if kind is None or whole else smaller_warm_start(kind)
    fixed = (
        *("--privacy.target_epsilon", "null" if kind is None else "5"),
        *("--privacy.noise_multiplier", "1" if kind is None else "null"),
        *("--trainer.max_steps", str(steps), "--trainer.accelerator", "cpu"),
    )
    all_flags = (*shrunk, *flags) if asked is None else (*flags, *shrunk)

    def make_run() -> MethodRun:
        from lightning_dp.cli import plugins  # noqa: F401  (names in configurations)

        cli = plan_cli(config, *data, *shrinking, *fixed, *all_flags)
        return MethodRun(
            module=cli.model,
            data=cli.datamodule,
            mechanism=cli.privatizer.mechanism,
            privacy=cli.privatizer.accountant.privacy,
            warm_start=cli.privatizer.warm_start,
        )

    return make_run


def _value_of(name: str, flags: Sequence[str]) -> str | None:
    """Return what a flag is given, or None."""
    for flag, following in zip(flags, [*flags, ""][1:], strict=True):
        given, equals, value = flag.partition("=")
        if given == name:
            return value if equals else following
    return None


def _run(arguments: list[str]) -> int:
    """Audit a finished run: its ledger, what it published, and membership attacks on that.

    Members are the run's training split and non-members the test split. This reads private records: the report is
    private, and no epsilon covers it.
    """
    from lightning_dp.auditing.membership import PRIVATE_NOTE
    from lightning_dp.auditing.run import attack_run, audit_ledger, audit_published
    from lightning_dp.cli.commands import _config_of, _data_of

    parser = _parser("RUN", _run.__doc__)
    parser.add_argument("run", type=str, help="Run folder.")
    parser.add_argument("--root", type=str | None, default=None, help="Data root (default: as in the run).")
    parser.add_argument("--num", type=int, default=5000, help="Samples that the attacker draws.")
    parser.add_argument("--attacks", type=bool, default=True, help="Read private records and attack; false does not.")
    options: Any = parse(parser, arguments)
    _check(options)
    run = Path(options.run)
    if not run.is_dir():
        raise DataError(
            f"Expected a run folder, 'mechanism' or 'method', got {options.run!r}. "
            "Give the folder of a run (the one that fit printed)."
        )
    if options.num < 1:
        raise ConfigurationError(f"Expected --num >= 1, got {options.num}.")
    results = [audit_ledger(run), audit_published(run)]
    note = None
    if options.attacks:
        data = _data_of(_config_of(run), options.root)
        data.setup("fit")
        results += attack_run(
            run,
            (data.train_images, data.train_labels),
            (data.test_images, data.test_labels),
            num_samples=options.num,
            confidence=options.confidence,
        )
        note = PRIVATE_NOTE
    # Beside the teachers, where other users cannot read, unless the user says otherwise.
    place = run / "private" / "audit" if options.attacks else run / "audit"
    return _finish(results, str(run.name), options.out or str(place), note=note)


def _table(arguments: list[str]) -> int:
    """Audit every pair of a method and a mechanism, and write the table of guarantees between its markers.

    Rows that are measured are kept in OUT.partial.jsonl until all are there; an interrupted command goes on from them.
    """
    from lightning_dp.cli.audit_pairs import TableOptions
    from lightning_dp.cli.audit_table import DEFAULT_FILE, write_table
    from lightning_dp.cli.matrix import DEFAULT_FOLDER

    parser = _parser("--table", _table.__doc__)
    parser.add_argument("--configs", type=str, default=DEFAULT_FOLDER, help="Folder of configurations of whole runs.")
    parser.add_argument("--calls", type=int, default=100, help="Releases of each world through the door.")
    parser.add_argument("--draws", type=int, default=4_000_000, help="Draws of each world of the noise, at most.")
    parser.add_argument("--only", type=str | None, default=None, help="Only configurations whose name holds this.")
    options: Any = parse(parser, arguments)
    _check(options)
    return write_table(
        Path(options.configs),
        Path(options.out or DEFAULT_FILE),
        options=TableOptions(
            calls=options.calls, draws=options.draws, confidence=options.confidence, delta=options.delta
        ),
        only=options.only,
    )


def _parser(name: str, description: str | None) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"lightning-dp audit {name}", exit_on_error=False, allow_abbrev=False, description=description
    )
    parser.add_argument("--delta", type=float, default=1e-5, help="Delta of the claims.")
    parser.add_argument("--confidence", type=float, default=0.95, help="Of the lower bounds.")
    parser.add_argument("--out", type=str | None, default=None, help="Where the report goes.")
    return parser


def _check(options: Any) -> None:
    if not 0 < options.delta < 1:
        raise ConfigurationError(f"Expected 0 < --delta < 1, got {options.delta}.")
    if not 0.5 <= options.confidence < 1:
        raise ConfigurationError(f"Expected 0.5 <= --confidence < 1, got {options.confidence}.")


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the audit's own arguments, and the flags of fit."""
    own: list[str] = []
    flags: list[str] = []
    names = ("--steps", "--out", "--delta", "--confidence")
    place = 0
    while place < len(arguments):
        name, equals, _ = arguments[place].partition("=")
        width = 1 if equals or not name.startswith("--") or name in ("--whole", "--help") else 2
        is_own = name in (*names, "--whole", "--help", "-h") or not name.startswith("-")
        (own if is_own else flags).extend(arguments[place : place + width])
        place += width
    return own, flags


def _spec(mechanism: "Mechanism", kind: str | None, dim: int) -> "ContributionSpec":
    """Return rows of the wanted kind, of the first that the mechanism takes if none is named."""
    from lightning_dp.mechanisms.base import ContributionSpec

    supported = [name for name in _KINDS if name in mechanism.kinds]
    kind = kind or supported[0]
    if kind not in supported:
        raise ConfigurationError(f"Expected --rows to be one of {', '.join(supported)}, got {kind!r}.")
    if kind == "record":
        quarter = dim // 4
        segments = (quarter, quarter, quarter, dim - 3 * quarter)
        return ContributionSpec.records(expected_batch_size=32, vector_dim=dim, segments=segments)
    if kind == "teacher":
        return ContributionSpec.teachers(num_teachers=40, vectors_per_row=3, vector_dim=dim)
    if kind == "statistic":
        return ContributionSpec.statistics(num_cells=4, vector_dim=dim)
    return ContributionSpec.joint(num_vectors=4, vector_dim=dim)


def _finish(results: "Sequence[AuditResult]", title: str, out: str | None, *, note: str | None = None) -> int:
    """Show the results, write the report where one is wanted, and return the exit code."""
    from rich.console import Console
    from rich.text import Text

    from lightning_dp.auditing.pages import number, write_report
    from lightning_dp.auditing.result import Verdict, worst_verdict
    from lightning_dp.cli.columns import whole_words

    rows = []
    for result in results:
        found = result.to_dict()
        bound = number(found["lower_bound"]) + (f" ({result.confidence:.0%})" if result.lower_bound is not None else "")
        verdict = Text(found["verdict"], style=_COLOURS[found["verdict"]])
        name, claimed = Text(textwrap.fill(result.audit, _NAME_WIDTH)), Text(number(found["claimed_epsilon"]))
        rows.append([name, verdict, Text(bound), claimed, Text(result.summary)])
    console = Console()
    header = ("audit", "verdict", "epsilon\nat least", "claimed", "measured")
    console.print(whole_words(header, rows, title=f"Audit: {title}", width=console.width, show_lines=True))
    if note is not None:
        console.print(Text(note, style="bold"))
    if out is not None:
        for path in write_report(Path(out), results, title=title, note=note):
            console.print(f"report: {path}", soft_wrap=True)
    worst = worst_verdict(results)
    is_claimed = any(result.claimed_epsilon is not None for result in results)
    words = _NO_CLAIM if worst is Verdict.CONSISTENT and not is_claimed else _WORDS[str(worst)]
    console.print(Text(f"verdict: {worst} ({words})", style=_COLOURS[str(worst)]))
    return 1 if worst is Verdict.VIOLATED else 0

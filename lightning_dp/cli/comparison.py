"""``lightning-dp benchmark`` and ``lightning-dp compare``: many runs at equal privacy, and run cards side by side."""

import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_dp.accounting.budget_request import DatasetBudgetSettings
from lightning_dp.cli.columns import whole_words
from lightning_dp.cli.parsing import parse
from lightning_dp.errors import ConfigurationError
from lightning_dp.wording import counted

if TYPE_CHECKING:
    from lightning_dp.benchmark.grid import Grid

_IN_REPORT_ONLY = ("precision", "recall")


def benchmark(arguments: list[str]) -> int:
    """Run a grid of methods, mechanisms, data, epsilons and seeds at one stated delta and relation, and report it.

    The same command goes on where it stopped. --only and --seeds make a part of it; the report covers what is done, in
    whatever parts, and lists the rest. Exit code 1 if a cell failed; refused cells are results too.
    """
    parser = ArgumentParser(
        prog="lightning-dp benchmark", exit_on_error=False, allow_abbrev=False, description=benchmark.__doc__
    )
    parser.add_argument("grid", type=str, help="Grid file; ready ones are in configs/benchmark/.")
    parser.add_argument(
        "--only",
        type=str,
        nargs="+",
        default=None,
        metavar="PATTERN",
        help="Run these cells alone: methods, or patterns of ids such as 'DP_SGD-*-MNIST-eps10-*'.",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="Run cells of these seeds alone.")
    parser.add_argument("--out", type=str | None, default=None, help="Folder (default: runs/benchmark/NAME).")
    parser.add_argument("--jobs", type=int | None, default=None, help="Runs at once (default: one per processor).")
    parser.add_argument("--backend", type=Literal["local", "ray"], default="local", help="Where the runs are made.")
    parser.add_argument("--address", type=str | None, default=None, help="Ray cluster; 'local' starts one here.")
    parser.add_argument(
        "--wandb",
        type=Literal["auto", "online", "offline", "disabled"] | None,
        default=None,
        help="W&B mode of every run; the comparison is their group.",
    )
    parser.add_argument("--dry_run", action="store_true", help="Plan and calibrate the cells, and stop.")
    parser.add_argument("--report_only", action="store_true", help="Run nothing; write the report of what is there.")
    parser.add_argument(
        "--publish", type=str | None, default=None, metavar="FOLDER", help="Copy report, records and cards there."
    )
    add_budget_flags(parser)
    options: Any = parse(parser, arguments)
    return _benchmark(options)


def add_budget_flags(parser: ArgumentParser) -> None:
    """Add the flags of the budget that all runs of a command share; each stands for the grid's own."""
    group = "--dataset_budget."
    parser.add_argument(
        f"{group}folder", type=str | None, default=None, help="Budget that all runs share; {data}: one a data set."
    )
    parser.add_argument(f"{group}epsilon", type=float | None, default=None, help="What opens it: its epsilon,")
    parser.add_argument(f"{group}delta", type=float | None, default=None, help="its delta (default: the grid's),")
    parser.add_argument(f"{group}rule", type=Literal["gaussian", "renyi"] | None, default=None, help="and its rule.")
    parser.add_argument(
        f"{group}allow_unproved", type=bool | None, default=None, help="Admit runs whose claim is not PROVED."
    )


def with_budget(grid: "Grid", options: Any) -> "Grid":
    """Return the grid with the flags of `add_budget_flags` over its own budget."""
    given = {name: value for name, value in vars(options.dataset_budget).items() if value is not None}
    if not given:
        return grid
    own = {} if grid.dataset_budget is None else vars(grid.dataset_budget)
    return replace(grid, dataset_budget=DatasetBudgetSettings(**{**own, **given}))


def _benchmark(options: Any) -> int:
    from lightning_dp.benchmark.backends import available_cpus, checked_jobs
    from lightning_dp.benchmark.grid_file import load_grid
    from lightning_dp.benchmark.progress import ConsoleReporter
    from lightning_dp.benchmark.publish import publish
    from lightning_dp.benchmark.report import write_report
    from lightning_dp.benchmark.runner import Comparison
    from lightning_dp.benchmark.selection import Selection
    from lightning_dp.cli import plugins  # noqa: F401  (names in configurations)
    from lightning_dp.cli.planning import plan_request

    if options.report_only and (options.dry_run or options.only or options.seeds):
        raise ConfigurationError("--report_only runs no cell; leave --dry_run, --only and --seeds out.")
    grid = with_budget(load_grid(options.grid), options)
    folder = Path(options.out) if options.out else Path("runs") / "benchmark" / grid.name
    cpus = available_cpus()
    jobs = cpus if options.jobs is None else checked_jobs(options.jobs)
    threads = max(1, cpus // jobs)
    selection = Selection(only=() if options.report_only else options.only, seeds=options.seeds)
    backend = None if options.dry_run or options.report_only else make_backend(options, jobs, threads)
    console = Console()
    reporter = ConsoleReporter(console)
    comparison = Comparison(grid, folder, planner=plan_request, wandb=options.wandb, threads=threads)
    console.print(
        Text(
            f"{grid.name}: {counted(len(grid.cells()), 'cell')} at delta {grid.delta:g}, {grid.relation}, in {folder}"
        ),
        soft_wrap=True,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"Cannot write to {folder} ({error.strerror}); choose another --out.") from None
    comparison.plan(reporter, selection)
    if options.dry_run:
        comparison.check_budget()
        return 0
    try:
        if backend is not None:
            with sigterm_interrupts():
                comparison.run(backend, reporter)
    finally:
        reporter.close()
        shared = comparison.reservations.states([one.label for one in grid.data]) if comparison.reservations else []
        cells = list(comparison.records.values())
        spent = write_report(comparison.folder, cells, name=grid.name, delta=grid.delta, budgets=shared)
    if options.publish is not None:
        publish(comparison.folder, Path(options.publish))
    _tell(console, comparison.folder, list(comparison.records.values()), [s for entry in spent for s in entry.lines()])
    return 1 if any(record.status in ("failed", "interrupted") for record in comparison.records.values()) else 0


def make_backend(options: Any, jobs: int, threads: int) -> Any:
    """Return where the runs are made, from the flags --backend, --address and --jobs."""
    from lightning_dp.benchmark.backends import LocalBackend, RayBackend

    if options.address is not None and options.backend != "ray":
        raise ConfigurationError(f"--address {options.address} belongs to --backend ray; add it, or leave it out.")
    if options.backend == "ray":
        return RayBackend(options.address, jobs=options.jobs, threads=1 if options.jobs is None else threads)
    return LocalBackend(jobs)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM end the comparison as Ctrl-C does: runs are interrupted in order, and recorded."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(console: Console, folder: Path, records: list[Any], spent: list[str]) -> None:
    """Print the result: one table from the cards, what everything spent, and where the report is."""
    from lightning_dp.benchmark.document import Strong
    from lightning_dp.benchmark.report import MARKDOWN_FILE, PAGE_FILE, STATEMENT, result_tables
    from lightning_dp.evaluation.report import read_run_card

    for title, part in result_tables(folder, records):
        is_long = part.header[-1] == STATEMENT  # on a terminal, sentences stand below their table
        # Eighty columns hold no more; the report has all.
        shown = [i for i, name in enumerate(part.header[: -1 if is_long else None]) if name not in _IN_REPORT_ONLY]
        rows = [[Text(row[i], style="bold" if isinstance(row[i], Strong) else "") for i in shown] for row in part.rows]
        console.print(whole_words([part.header[i] for i in shown], rows, title=title, width=console.width), Text())
        for row in part.rows if is_long else ():
            console.print(Text(f"{row[0]}, {row[1]}: {row[-1]}"))
    for line in spent:
        console.print(Text(line))
    for record in records:
        if record.status in ("failed", "refused", "interrupted"):
            console.print(Text(f"{record.status}: {record.cell}: {record.reason or 'go on with the same command'}"))
    done = [read_run_card(folder / record.card) for record in records if record.card is not None]
    if done:
        levels = Counter(str(card.claim["level"]) for card in done)
        judged = [card.evaluation or {} for card in done]
        extractors = sorted({str(found["fid_extractor"]) for found in judged if "fid_extractor" in found})
        claims = ", ".join(f"{count} {level}" for level, count in levels.items())
        console.print(f"claims: {claims}; delta {done[0].claim['delta']:g}, {done[0].claim['relation']}")
        console.print(f"FID in the space of: {', '.join(extractors) or 'none'}")
        total = sum(float(card.cost.get("total_time_s") or 0.0) for card in done)
        console.print(
            f"time: {total:.0f} s over {counted(len(done), 'run')}, each with its own samples.png and run_card.html"
        )
    for name in (MARKDOWN_FILE, PAGE_FILE):
        console.print(f"report: {folder / name}", soft_wrap=True)


def compare(arguments: list[str]) -> int:
    """Show what tells two or more run cards apart: claim, budget, mechanism, quality, cost, configuration."""
    from lightning_dp.benchmark.differences import card_lines
    from lightning_dp.evaluation.report import read_run_card

    parser = ArgumentParser(
        prog="lightning-dp compare", exit_on_error=False, allow_abbrev=False, description=compare.__doc__
    )
    parser.add_argument("cards", type=str, nargs="+", help="Run cards, or run folders that hold one.")
    parser.add_argument("--all", action="store_true", help="Show what is equal too.")
    options: Any = parse(parser, arguments)
    if len(options.cards) < 2:
        raise ConfigurationError(f"Expected two or more run cards to compare, got {len(options.cards)}.")
    cards = [read_run_card(path) for path in options.cards]
    shown = [line for line in card_lines(cards) if options.all or line.is_different]
    if not shown:
        print("The cards say the same.")
        return 0
    table = Table(title=Text("Differences" if not options.all else "Run cards"), title_justify="left", show_lines=False)
    table.add_column("what", style="bold", overflow="fold")
    for path, card in zip(options.cards, cards, strict=True):
        table.add_column(Text(f"{card.title}\n{path}"), overflow="fold")
    part = None
    for line in shown:
        if line.part != part:
            table.add_section()
            part = line.part
        table.add_row(Text(f"{line.part}: {line.name}"), *(Text(value) for value in line.values))
    Console().print(table)
    return 0

"""``lightning-dp select``: the best run of a grid, under a claim that pays for the choice."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser

from lightning_dp.cli.comparison import add_budget_flags, make_backend, sigterm_interrupts, with_budget
from lightning_dp.cli.parsing import parse
from lightning_dp.errors import ConfigurationError
from lightning_dp.wording import counted

if TYPE_CHECKING:
    from lightning_dp.accounting.selection import RepeatLaw


def select(arguments: list[str]) -> int:
    """Choose among the cells of a grid by a score, and charge the choice.

    --rule all runs every cell once and composes all of them. --rule random draws a random number of cells, each from
    the list, publishes the best alone and deletes the rest: cheaper than composition, as long as neither the number of
    runs nor anything of the others is told. Both are charged before the first run. Exit code 1 if nothing was chosen.
    """
    parser = ArgumentParser(
        prog="lightning-dp select", exit_on_error=False, allow_abbrev=False, description=select.__doc__
    )
    parser.add_argument("grid", type=str, help="Grid file, as for benchmark; each cell is a candidate.")
    parser.add_argument(
        "--score",
        type=str,
        required=True,
        help="fid, kid, precision, recall, accuracy/cnn, accuracy/mlp, accuracy/logistic; accuracy/test of classifiers",
    )
    parser.add_argument(
        "--score_records",
        type=Literal["held_out", "public", "training"],
        default="held_out",
        help="Whose records the split is by which runs are judged: others', nobody's, or those that are trained on.",
    )
    parser.add_argument("--rule", type=Literal["random", "all"], default="random", help="How the choice is made.")
    parser.add_argument(
        "--mean", type=float | None, default=None, help="Mean number of runs (default: one for each candidate)."
    )
    parser.add_argument(
        "--shape", type=float | None, default=None, help="Law of their number: 1 geometric (default), 0 logarithmic,"
        " inf Poisson."
    )  # fmt: skip
    parser.add_argument("--only", type=str, nargs="+", default=None, metavar="PATTERN", help="As for benchmark.")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="Candidates of these seeds alone.")
    parser.add_argument("--out", type=str | None, default=None, help="Folder (default: runs/select/NAME).")
    parser.add_argument("--jobs", type=int | None, default=None, help="Runs at once (default: one per processor).")
    parser.add_argument("--backend", type=Literal["local", "ray"], default="local", help="Where the runs are made.")
    parser.add_argument("--address", type=str | None, default=None, help="Ray cluster; 'local' starts one here.")
    parser.add_argument("--dry_run", action="store_true", help="Say what the choice will cost, and stop.")
    add_budget_flags(parser)
    return _select(parse(parser, arguments))


def _select(options: Any) -> int:
    from rich.console import Console

    from lightning_dp.benchmark.backends import available_cpus, checked_jobs
    from lightning_dp.benchmark.grid_file import load_grid
    from lightning_dp.benchmark.score import Score
    from lightning_dp.benchmark.selection import Selection
    from lightning_dp.benchmark.tuning import Tuning, delete_leftovers
    from lightning_dp.cli import plugins  # noqa: F401  (names in configurations)
    from lightning_dp.cli.planning import plan_request
    from lightning_dp.evaluation.report import JSON_NAME

    grid = with_budget(load_grid(options.grid), options)
    chosen = Selection(only=options.only, seeds=options.seeds)
    folder = Path(options.out) if options.out else Path("runs") / "select" / grid.name
    if (folder / JSON_NAME).exists():
        delete_leftovers(folder)
        raise ConfigurationError(f"{folder} holds what was selected before. Another selection needs another --out.")
    cpus = available_cpus()
    jobs = cpus if options.jobs is None else checked_jobs(options.jobs)
    threads = max(1, cpus // jobs)
    tuning = Tuning(
        grid,
        folder,
        planner=plan_request,
        score=Score(name=options.score, records=options.score_records),
        law=_law(options, sum(chosen.has(cell) for cell in grid.cells())),
        chosen=chosen,
        threads=threads,
    )
    console = Console()
    claim = tuning.plan()
    console.print(
        f"{counted(len(tuning.candidates), 'candidate')}, chosen by {options.score}. The choice is {claim.statement()}"
    )
    tuning.check_budget()
    if options.dry_run:
        return 0
    return _make(tuning, make_backend(options, jobs, threads), console, options)


def _make(tuning: Any, backend: Any, console: Any, options: Any) -> int:
    from lightning_dp.benchmark.tuning_result import publish_choice
    from lightning_dp.evaluation.report import metrics_table

    if tuning.law is not None:
        console.print("Drawing. How many runs there are, and how far they are, is secret: nothing is shown.")
    with sigterm_interrupts():
        best = tuning.run(backend)
    if best is None:
        tuning.close(keep=True)
        console.print(
            f"Nothing was chosen: no run was drawn, or none ended with {options.score}. What was charged stays so. "
            f"{tuning.private} may say more; it must not leave."
        )
        return 1
    card = publish_choice(tuning.folder, best, score=options.score)
    tuning.close(keep=False)
    for cell, value in best.scores.items():
        console.print(f"{cell}: {options.score} {value:.4g}")
    console.print(metrics_table(card))
    console.print(f"selected: {best.cell}, {options.score} {best.score:.4g}")
    console.print(card.claim_statement)
    for text in card.claim["not_covered"]:
        console.print(f"  not covered: {text}")
    console.print(f"published: {tuning.folder}", soft_wrap=True)
    return 0


def _law(options: Any, num_candidates: int) -> "RepeatLaw | None":
    from lightning_dp.accounting.selection import RepeatLaw

    if options.rule == "all":
        if options.mean is not None or options.shape is not None:
            raise ConfigurationError("--mean and --shape belong to --rule random; --rule all makes every run once.")
        return None
    mean = float(max(1, num_candidates)) if options.mean is None else options.mean
    shape = 1.0 if options.shape is None else options.shape
    if math.isnan(shape):
        raise ConfigurationError(f"Expected --shape >= 0, got {shape}.")
    return RepeatLaw(mean=mean, shape=shape)

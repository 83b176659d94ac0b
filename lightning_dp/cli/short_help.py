"""``fit --help``: the flags that runs are made of; ``--help.all`` has those of Lightning's trainer too."""

import argparse
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from jsonargparse import ArgumentParser

from lightning_dp.cli.messages import short_names, subclass_names

ALL: Final = "--help.all"

_TRAINER: Final = {
    "trainer.max_steps": "Releases; -1: as many as the budget holds.",
    "trainer.accelerator": "cpu, gpu or auto.",
    "trainer.devices": "Processes on this machine, each with a device of its own.",
    "trainer.num_nodes": "Machines.",
    "trainer.precision": "32-true or bf16-mixed.",
    "trainer.callbacks": "Callbacks of your own.",
    "trainer.max_time": "Stop after DD:HH:MM:SS; the claim is that of the whole plan.",
    "trainer.enable_progress_bar": "Show how far the run is.",
}
_OTHERS: Final = {
    "config": "Configuration of a run; several are laid over each other. Ready ones: configs/experiment/.",
    "seed_everything": "Public seed: of latents, labels and initial weights, never of the noise.",
}
_GROUPS: Final = {
    "": "The run",
    "trainer": "How long and where",
    "privacy": "Its privacy: give two of target_epsilon, noise_multiplier, trainer.max_steps",
    "evaluation": "How samples are judged against the real test split",
    "dataset_budget": "The budget that all runs on one data set share",
}
_RARE: Final = ("privacy.insecure_seed", "dataset_budget.reservation", "evaluation.training")
_COLUMN: Final = 34
_HEAD: Final = (
    "usage: lightning-dp fit --config FILE [--FLAG VALUE ...]",
    "",
    "Trains one private generator. A flag stands over the file.",
    "",
    "What runs; '--model.help NAME' lists the options of one (--model.OPTION VALUE)",
)
_MORE = f"--print_config shows the settings that result. {ALL} lists every flag, also those of Lightning's trainer."


def is_short(arguments: Sequence[str]) -> bool:
    """Tell whether the short help was asked for."""
    return "-h" in arguments or "--help" in arguments


def shorten(parser: ArgumentParser, roots: Mapping[str, type]) -> None:
    """Let a parser print the short help.

    Args:
        parser: Of `fit`, with all its flags.
        roots: Flags that name a class, and what it must be.
    """

    def text(formatter: argparse.HelpFormatter | None = None) -> str:
        return "\n".join(_lines(parser, roots)) + "\n"

    parser.format_help = text  # type: ignore[method-assign]


def _lines(parser: ArgumentParser, roots: Mapping[str, type]) -> Iterator[str]:
    width = shutil.get_terminal_size().columns
    known = {action.dest: action for action in parser._actions}
    yield from _HEAD
    for root, base in roots.items():
        yield from _entry(root, f"{', '.join([*short_names(base), *subclass_names(base)])}.", width)
    for group, title in _GROUPS.items():
        yield from ("", title)
        names = [name for name in known if name.rpartition(".")[0] == group and name not in (*roots, *_GROUPS, *_RARE)]
        for name in _TRAINER if group == "trainer" else [*names, *(["telemetry.raw"] if not group else [])]:
            said, default = _said(known[name]), known[name].default
            if said is not None:
                shown = default not in (None, argparse.SUPPRESS) and "default:" not in said
                yield from _entry(name, f"{said}{f' [{default}]' if shown else ''}", width)
    yield from ("", *textwrap.wrap(_MORE, width))


def _said(action: argparse.Action) -> str | None:
    """Return what is told of a flag; None of one that is left out."""
    if action.help == argparse.SUPPRESS or action.dest in ("help", "print_config") or action.dest.endswith(".help"):
        return None
    return {**_OTHERS, **_TRAINER}.get(action.dest, action.help)


def _entry(name: str, text: str, width: int) -> list[str]:
    first = f"  --{name}".ljust(_COLUMN)
    lines = textwrap.wrap(text, max(20, width - _COLUMN - 1))
    if len(first) > _COLUMN:
        return [first, *(" " * _COLUMN + line for line in lines)]
    return [first + lines[0], *(" " * _COLUMN + line for line in lines[1:])]

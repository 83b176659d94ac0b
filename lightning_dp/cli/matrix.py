"""``lightning-dp matrix``: the table of methods and mechanisms, generated from the code."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ArgumentParser

from lightning_dp.cli.messages import subclass_names
from lightning_dp.cli.parsing import parse
from lightning_dp.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from lightning_dp.benchmark.matrix import Pair
    from lightning_dp.mechanisms.base import Mechanism

DEFAULT_FOLDER = "configs/experiment"
_NAME_WIDTH = 15  # letters of a class name in a line

_LEGEND = (
    "Relations: A add_or_remove_one, R replace_one, Z replace_special (zero-out). Each level holds under the relations "
    "beside it, with the options of the configuration; the numbers give the reason of a refusal."
)

# Nothing is calibrated: the matrix asks what is proved, not what it costs. A warm start has no noise without a target.
_ONE_RELEASE = (
    *("--warm_start", "null"),
    *("--privacy.target_epsilon", "null", "--privacy.noise_multiplier", "1"),
    *("--trainer.max_steps", "1"),
)


def matrix(arguments: list[str]) -> int:
    """Show which mechanism runs with which method, under which relation and claim level, or why it is refused.

    Methods are the configurations of whole runs; each is planned with every mechanism, from public facts alone.
    """
    from rich.console import Console
    from rich.text import Text

    from lightning_dp.benchmark.matrix import merged_methods
    from lightning_dp.cli.columns import broken_name, whole_words

    parser = ArgumentParser(
        prog="lightning-dp matrix", exit_on_error=False, allow_abbrev=False, description=matrix.__doc__
    )
    parser.add_argument("--configs", type=str, default=DEFAULT_FOLDER, help="Folder of configurations of whole runs.")
    parser.add_argument("--markdown", action="store_true", help="Print Markdown instead of a table.")
    options: Any = parse(parser, arguments)
    methods = merged_methods(all_pairs(Path(options.configs)))
    if options.markdown:
        print(markdown(methods))
        return 0
    header, body, reasons = _table(methods)
    rows = []
    for number, (method, _, *cells) in enumerate(body, start=1):
        styled = (Text(cell, style="dim" if cell.startswith("refused") else "") for cell in cells)
        rows.append([Text(f"{number}"), Text(broken_name(method, _NAME_WIDTH)), *styled])
    # The configurations are too long for a column: they stand below.
    names = ["", *(broken_name(name, _NAME_WIDTH // 2) for name in (header[0], *header[2:]))]
    console = Console()
    console.print(whole_words(names, rows, title="Methods and mechanisms", width=console.width, show_lines=True))
    for number, (method, configurations, *_) in enumerate(body, start=1):
        console.print(Text(f"{number} {method}: {configurations}"))
    console.print(Text(_LEGEND))
    for number, reason in enumerate(reasons, start=1):
        console.print(Text(f"[{number}] {reason}"))
    return 0


def all_pairs(folder: Path) -> "list[Pair]":
    """Return every method with every mechanism.

    Args:
        folder: Folder of configurations of whole runs.

    Raises:
        ConfigurationError: A configuration cannot be planned by itself.
        DataError: The folder holds none.
    """
    from lightning_dp.benchmark.matrix import judge_pair
    from lightning_dp.cli import plugins  # noqa: F401  (names in configurations)
    from lightning_dp.cli.planning import plan_cli
    from lightning_dp.mechanisms.base import Mechanism

    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise DataError(f"Expected configurations of whole runs in {folder}, found none; give --configs FOLDER.")
    known = {path: _own_mechanism(path) for path in paths}
    pairs = []
    for path in paths:
        cli = plan_cli(path, *_ONE_RELEASE)
        for name in subclass_names(Mechanism):
            variants = list(_variants(name, known[path], known.values()))
            pairs.append(judge_pair(path.stem, cli.model, cli.datamodule, variants))
    return pairs


def _own_mechanism(path: Path) -> tuple[str, dict[str, Any]]:
    """Return class name and options of the mechanism that a configuration chooses."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))["mechanism"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigurationError(f"Expected a configuration of a whole run in {path} ({error}).") from None
    given = given if isinstance(given, Mapping) else {"class_path": given}
    return str(given["class_path"]).rpartition(".")[2], dict(given.get("init_args") or {})


def _variants(
    name: str, own: tuple[str, dict[str, Any]], others: "Iterator[tuple[str, dict[str, Any]]] | Any"
) -> "Iterator[Mechanism]":
    """Yield a mechanism with the options of the configuration itself, with none, and with those of other ones."""
    mechanism = _mechanism_class(name)
    required = [
        option.name
        for option in inspect.signature(mechanism).parameters.values()
        if option.default is option.empty and option.kind in (option.KEYWORD_ONLY, option.POSITIONAL_OR_KEYWORD)
    ]
    given = [own[1]] if own[0] == name else []
    given += [{}] if not required else []
    given += [options for other, options in others if other == name]
    seen: list[dict[str, Any]] = []
    for options in given:
        if options not in seen and all(option in options for option in required):
            seen.append(options)
            yield mechanism(**options)
    if not seen:
        raise ConfigurationError(
            f"{name} needs {', '.join(required)}; no configuration shows how. Add one that uses it to the folder."
        )


def _mechanism_class(name: str) -> "type[Mechanism]":
    from lightning_dp.mechanisms.base import Mechanism

    waiting: list[type[Mechanism]] = list(Mechanism.__subclasses__())
    while waiting:
        found = waiting.pop()
        if found.__name__ == name:
            return found
        waiting += found.__subclasses__()
    raise ConfigurationError(f"Unknown mechanism {name!r}.")


def markdown(methods: "Mapping[str, Sequence[Pair]]") -> str:
    """Return the matrix as a Markdown table, reasons of refusals numbered below."""
    header, body, reasons = _table(methods)
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(row)} |" for row in body)]
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    return "\n".join([*lines, "", _LEGEND, "", *notes])


def _table(methods: "Mapping[str, Sequence[Pair]]") -> tuple[list[str], list[list[str]], list[str]]:
    """Return header, rows, and the distinct reasons of refusals, to which the cells point by number."""
    from lightning_dp.benchmark.matrix import cell_text

    reasons: list[str] = []
    body = []
    for names, pairs in methods.items():
        body.append([pairs[0].module, names, *(cell_text(pair, reasons) for pair in pairs)])
    header = ["method", "configuration", *(pair.mechanism for pair in next(iter(methods.values()), []))]
    return header, body, reasons

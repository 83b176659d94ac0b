"""Parsing in which every mistake of the user ends as one line."""

import json
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args

import yaml
from jsonargparse import ArgumentParser

from lightning_dp.cli.messages import explain, subclass_names, unknown_class
from lightning_dp.errors import ConfigurationError

Parsed = TypeVar("Parsed")
_MAY_BE_EMPTY = ("init_args", "dict_kwargs")
_GROUPS = ("trainer", "privacy", "evaluation", "dataset_budget", "telemetry")


def spelt_out(arguments: list[str], roots: Iterable[str], names: Mapping[str, str]) -> list[str]:
    """Return arguments as the parser can read them.

    Short names become class names. Null for an option of an option, `--model.generator.window null`, becomes
    `--model.generator={"init_args": {"window": null}}`: the parser hands such values on as text, and null as "None".

    Args:
        arguments: The command line.
        roots: Flags that name a class (without dashes).
        names: Short name to class name of a warm start.
    """
    spelt, index = [], 0
    while index < len(arguments):
        flag, equals, value = arguments[index].partition("=")
        if flag.startswith("--") and not equals:
            value = next(iter(arguments[index + 1 : index + 2]), "")
        rewritten = _rewritten(flag, value, roots, names)
        spelt.append(rewritten or arguments[index])
        index += 2 if rewritten and not equals else 1
    return spelt


def _rewritten(flag: str, value: str, roots: Iterable[str], names: Mapping[str, str]) -> str | None:
    if flag in ("--warm_start", "--warm_start.help") and value in names:
        return f"{flag}={names[value]}"
    root, _, path = flag.removeprefix("--").partition(".")
    option, *inner = path.split(".")
    if root not in roots or value != "null" or not inner:
        return None
    options: Any = None
    for name in reversed(inner):
        options = {"init_args": {name: options}}
    return f"--{root}.{option}={json.dumps(options)}"


def check_class_names(arguments: list[str], roots: Mapping[str, type]) -> None:
    """Refuse unknown class names given as flags, with the list of choices, before anything is parsed.

    Args:
        arguments: The command line.
        roots: Flag (without dashes) and base class of what it may name.

    Raises:
        ConfigurationError: A name is unknown.
    """
    for flag, value in _flag_values(arguments):
        base = roots.get(flag.removesuffix(".help"))
        if base is None or not re.fullmatch(r"\w+", value):
            continue
        if value not in subclass_names(base):
            raise ConfigurationError(unknown_class(flag.removesuffix(".help"), value, base))


def check_given_once(arguments: list[str], roots: Iterable[str]) -> None:
    """Refuse two mechanisms, methods, data sets or budgets: the first would be dropped without a word.

    Args:
        arguments: The command line.
        roots: Flags that name a class (without dashes).

    Raises:
        ConfigurationError: A flag of them is given twice.
    """
    seen: dict[str, str] = {}
    for flag, value in _flag_values(arguments):
        if flag in seen and flag.partition(".")[0] in (*roots, "privacy", "dataset_budget"):
            raise ConfigurationError(f"--{flag} is given twice, as {seen[flag]} and as {value}; keep one of them.")
        seen[flag] = value


class _UniqueKeys(yaml.SafeLoader):
    """Loads YAML and refuses a key that stands twice in one mapping: the first would be dropped without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key != "<<" and key in seen:
                where = key_node.start_mark
                raise ConfigurationError(
                    f"{where.name}, line {where.line + 1}: {key!r} twice; the first would be ignored. Keep one of them."
                )
            if isinstance(value_node, yaml.MappingNode) and not value_node.value and key not in _MAY_BE_EMPTY:
                # the parser drops it, whatever its name: a misspelt one would pass
                raise ConfigurationError(f"Expected settings under {key!r}, got none ({{}}). Leave the line out.")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def check_config_files(arguments: list[str]) -> None:
    """Refuse configuration files that hold a setting twice.

    Args:
        arguments: The command line.

    Raises:
        ConfigurationError: One does. Files that cannot be read at all are left to the parser.
    """
    for flag, value in _flag_values(arguments):
        if flag == "config" and Path(value).is_file():
            try:
                with Path(value).open(encoding="utf-8") as file:
                    yaml.load(file, Loader=_UniqueKeys)
            except (yaml.YAMLError, UnicodeDecodeError, OSError):
                continue


def _flag_values(arguments: list[str]) -> Iterable[tuple[str, str]]:
    for index, argument in enumerate(arguments):
        if not argument.startswith("--") and argument != "-c":
            continue
        flag, _, value = ("config", "", "") if argument == "-c" else argument[2:].partition("=")
        if not value and index + 1 < len(arguments):
            value = arguments[index + 1]
        yield flag, value


def one_line(run: Callable[[], Parsed], roots: Mapping[str, type], parser: ArgumentParser | None = None) -> Parsed:
    """Return what `run` returns, turning parse errors into a ConfigurationError of one line.

    Args:
        run: Parses, or builds classes from what was parsed.
        roots: Flag and base class, for the choices after an unknown class name.
        parser: Whose flags are named in the nearest match.

    Raises:
        ConfigurationError: What was parsed is wrong, or a constructor refused it.
    """
    try:
        return run()
    except ConfigurationError:
        raise
    except (ArgumentError, ValueError, TypeError) as error:
        # jsonargparse chains the ConfigurationError of a constructor or dataclass below its own.
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ConfigurationError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, TypeError):
            raise  # jsonargparse reports wrong types as ArgumentError: this one is a bug of ours
        if isinstance(error, UnicodeDecodeError):
            raise ConfigurationError(f"The configuration is no text file ({error}). Give a YAML file.") from None
        message = error.message if isinstance(error, ArgumentError) else error
        raise ConfigurationError(explain(str(message), roots, _flags(parser))) from None


def check_values(parser: ArgumentParser, config: Any) -> None:
    """Refuse what the parser lets through: null for a setting that is always something, or a value for a whole group.

    Args:
        parser: The parser.
        config: What it made of the arguments.

    Raises:
        ConfigurationError: A setting has no value, or a group is none.
    """
    for action in parser._actions:
        group, dot, name = action.dest.rpartition(".")
        hint = getattr(action, "_typehint", None)
        inner = config.get(group) if dot else config
        if dot and group in _GROUPS and not hasattr(inner, "keys"):
            raise ConfigurationError(f"Expected 'key: value' lines under {group}, got {inner!r}.")
        may_be_null = hint is None or hint is Any or NoneType in get_args(hint)
        if not may_be_null and action.default is not None and config.get(action.dest, action.default) is None:
            raise ConfigurationError(
                f"Expected {action.dest} to have a value, got null; give one, or leave {name} out (it is then "
                f"{action.default!r})."
            )


def _flags(parser: ArgumentParser | None) -> list[str]:
    if parser is None:
        return []
    return [option[2:] for option in parser._option_string_actions if option.startswith("--")]


def parse(parser: ArgumentParser, arguments: list[str]) -> "object":
    """Parse the arguments of a small command; a mistake is one line.

    Args:
        parser: Made with ``exit_on_error=False``.
        arguments: The command line after the command's name.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        parser.print_help(sys.stdout)
        raise SystemExit(0)
    return one_line(lambda: parser.parse_args(arguments), {}, parser)

"""One-line parse errors: jsonargparse's messages cut down, with the choices and the nearest match added."""

import difflib
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterable
from typing import TypeVar

from jsonargparse import ArgumentParser

from lightning_dp.errors import ConfigurationError

Parsed = TypeVar("Parsed")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean X?" for the known name nearest to `name`, or nothing."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f" Did you mean {by_lower[found[0]]}?" if found else ""


def subclass_names(base: type) -> list[str]:
    """Return the names of all concrete subclasses of `base` that have been imported."""
    names = []
    for sub in base.__subclasses__():
        if not getattr(sub, "__abstractmethods__", None):
            names.append(sub.__name__)
        names += subclass_names(sub)
    return sorted(set(names))


def check_class_names(arguments: list[str], roots: dict[str, type]) -> None:
    """Refuse unknown class names given as flags, with the list of choices.

    Args:
        arguments: The command line.
        roots: Flag (without dashes) and base class of what it may name.

    Raises:
        ConfigurationError: A name is unknown.
    """
    for flag, value in _flag_values(arguments):
        base = roots.get(flag)
        if base is None or not re.fullmatch(r"\w+", value):
            continue
        known = subclass_names(base)
        if value not in known:
            raise ConfigurationError(
                f"Unknown --{flag} {value!r}; choose from {', '.join(known)}.{nearest(value, known)}"
            )


def _flag_values(arguments: list[str]) -> Iterable[tuple[str, str]]:
    for index, argument in enumerate(arguments):
        if not argument.startswith("--"):
            continue
        flag, _, value = argument[2:].partition("=")
        if not value and index + 1 < len(arguments):
            value = arguments[index + 1]
        yield flag, value


def one_line(run: Callable[[], Parsed], roots: dict[str, type]) -> Parsed:
    """Return what `run` returns, turning parse errors into a ConfigurationError of one line.

    Args:
        run: Parses and instantiates.
        roots: Flag and base class, for the choices after an unknown class name.
    """
    try:
        return run()
    except ArgumentError as error:
        # jsonargparse chains the ConfigurationError of a constructor or dataclass below its own.
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ConfigurationError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise ConfigurationError(_shorten(str(error.message), roots)) from None


def _shorten(message: str, roots: dict[str, type]) -> str:
    text = " ".join(message.split())
    unknown = re.search(r"Expected a dot import path string: (\w+)", text)
    if unknown:
        name = unknown.group(1)
        flag = next((flag for flag in roots if re.search(rf'key "?{flag}\b|--{flag}\b', text)), None)
        known = subclass_names(roots[flag]) if flag else sorted({n for b in roots.values() for n in subclass_names(b)})
        where = f"--{flag} " if flag else "class "
        return f"Unknown {where}{name!r}; choose from {', '.join(known)}.{nearest(name, known)}"
    unrecognised = re.search(r"[Uu]nrecognized arguments?: (.+)", text)
    if unrecognised:
        return f"Unknown flag {unrecognised.group(1)}; 'lightning-dp COMMAND --help' lists the flags."
    return text


def parse(parser: ArgumentParser, arguments: list[str]) -> "object":
    """Parse the arguments of a small command; a mistake is one line.

    Args:
        parser: Made with ``exit_on_error=False``.
        arguments: The command line after the command's name.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        parser.print_help(sys.stdout)
        raise SystemExit(0)
    return one_line(lambda: parser.parse_args(arguments), {})

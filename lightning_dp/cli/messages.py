"""Translates jsonargparse's messages into one line that names the choices and the way to mend the mistake."""

import difflib
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, get_args, get_origin

_TYPE_WORDS = {
    "NoneType": "null",
    "str": "text",
    "int": "a whole number",
    "float": "a finite number",
    "bool": "true or false",
    "tuple": "a list",
}
_LONGEST = 400
# What Opacus and others call a setting that is the method's own here, and so in no list of flags.
_OTHER_NAMES = {
    "gradients": "model.gradients",
    "grad_sample_mode": "model.gradients",
    "max_physical_batch": "model.chunk_size",
    "max_physical_batch_size": "model.chunk_size",
}


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """Return " Did you mean X?" for the known name nearest to `name`, or nothing."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return f" Did you mean {by_lower[found[0]]}?" if found else ""


def subclass_names(base: type) -> list[str]:
    """Return the names of all concrete subclasses of `base` that have been imported."""
    names: list[str] = []
    sub: type
    for sub in base.__subclasses__():
        is_hidden = sub.__name__.startswith("_")
        if not is_hidden and not getattr(sub, "__abstractmethods__", None) and not _has_unset_class_variable(sub):
            names.append(sub.__name__)
        names += subclass_names(sub)
    return sorted(set(names))


def unknown_class(where: str, name: str, base: type | None) -> str:
    """Return the message for a class name that nobody has defined.

    Args:
        where: The flag, without dashes.
        name: What the user wrote.
        base: What it had to be a subclass of, None where that is not known.
    """
    if base is not None and (found := _subclass(base, name)) is not None and (lacks := _lacks(found)):
        return _unfinished_line(where, name, lacks)
    known = subclass_names(base) if base is not None else []
    short = short_names(base)
    if name in short:  # a flag would have been spelt out: this stands in a file
        return f"Expected {where} to name a class, got {name!r}; in a file, write class_path: {short[name]} under it."
    choices = f"; choose from {', '.join([*short, *known])}." if known else "."
    near = nearest(name.rpartition(".")[2], [*short, *known])
    if "." in name and (problem := _import_problem(name.rpartition(".")[0])):
        return f"Cannot import --{where} {name!r} ({problem}); is its folder on PYTHONPATH? Or{choices[1:]}{near}"
    return f"Unknown --{where} {name!r}{choices}{near}"


def short_names(base: type | None) -> dict[str, str]:
    """Return the short names that a flag of this base takes, each with the name of its class."""
    from lightning_dp.cli.plugins import WARM_STARTS

    return {short: kind.__name__ for short, kind in WARM_STARTS.items() if base is not None and issubclass(kind, base)}


def explain(message: str, roots: Mapping[str, type], flags: Iterable[str] = ()) -> str:
    """Return one line for a parse error.

    Args:
        message: jsonargparse's message.
        roots: Flag (without dashes) and base class of what it may name.
        flags: All flags of the command (without dashes), for the nearest match.
    """
    text = " ".join(message.split())
    rules = (
        _required,
        _no_value,
        _unknown_option,
        _unknown_name,
        _unfinished,
        _without_hint,
        _bare_options,
        _literal,
        _wrong_type,
        _config_file,
    )
    for rule in rules:
        if (found := rule(text, roots, list(flags))) is not None:
            return found
    return _trimmed(text)


# Rules: each returns its line, or None where the message is about something else --------------------------------------


def _required(text: str, roots: Mapping[str, type], flags: list[str]) -> str | None:
    found = re.search(r"the following arguments are required: ([\w., ]+?)(?: - Expected|$)", text)
    if found is None:
        return None
    holder = _holder(text)
    prefix = f"{_key(text)}." if holder is not None else ""
    names = [prefix + name for name in found[1].split(", ")]
    lines = []
    for name in names:
        base = roots.get(name)
        lines.append(f"{name} ({', '.join(subclass_names(base))})" if base is not None else name)
    if "config" not in flags and holder is None:
        return f"Missing: {', '.join(lines)}; --help shows how the command is used."
    return f"Missing: {', '.join(lines)}. Give a configuration with --config FILE, or the flag --{names[-1]}."


def _no_value(text: str, roots: Mapping[str, type], flags: list[str]) -> str | None:
    found = re.search(r"argument (?:-c/)?(--[\w.]+)[^:]*: expected (?:one|at least one) argument", text)
    if found is None:
        return None
    return f"Expected a value after {found[1]}; one that begins with a dash is written {found[1]}=VALUE."


def _unknown_option(text: str, roots: Mapping[str, type], flags: list[str]) -> str | None:
    if found := re.search(r"[Uu]nrecognized arguments?: (.+)", text):
        word = found[1].split()[0]
        if not word.startswith("-"):
            how = ", configurations are given as --config FILE." if "config" in flags else "."
            return f"Unexpected argument {word!r}; options start with --{how}"
        return f"Unknown flag {word.partition('=')[0]}.{_nearest_flag(word, flags)}"
    if found := re.search(r"(?:Group|Subcommand) '([\w.]+)' does not accept option '([\w.]+)'", text):
        known = [flag.removeprefix(f"{found[1]}.") for flag in flags if flag.startswith(f"{found[1]}.")]
        return f"Unknown option {found[1]}.{found[2]}.{_choices(known)}{nearest(found[2], known)}"
    found = re.search(r"Option '([\w.]+)' is not accepted", text)
    if found is None:
        return None
    holder = _holder(text)
    if holder is None:
        known = sorted({flag.partition(".")[0] for flag in flags})
        return f"Unknown key {found[1]!r} in the configuration.{nearest(found[1].partition('.')[0], known)}"
    name = found[1].removeprefix("init_args.")
    known = _option_names(holder)
    short = holder.rpartition(".")[2]
    return f"Unknown option {name!r} of {short} (--{_key(text)}).{_choices(known)}{nearest(name, known)}"


def _unknown_name(text: str, roots: Mapping[str, type], flags: list[str]) -> str | None:
    found = re.search(r"Expected a dot import path string: (\S+)", text) or re.search(
        r"Problem with given class_path '([\w.]+)': (?:module|No module)", text
    )
    if found is None:
        return None
    return unknown_class(_key(text), found[1], _base_of(text, roots))


def _unfinished(text: str, roots: Mapping[str, type], flags: list[str]) -> str | None:
    if "Expected an instantiatable class, but is abstract" not in text:
        return None
    path = re.search(r"[\w.]+\.\w+", _value(text) or "")
    lacks = _lacks(_load(path[0])) if path is not None else []
    return _unfinished_line(_key(text), path[0], lacks) if path is not None and lacks else None


def _without_hint(text: str, roots: Mapping[str, type], flags: list[str]) -> str | None:
    found = re.search(r"Parameter '(\w+)' from '([\w.]+?)(?:\.__init__)?' does not specify a type", text)
    if found is None:
        return None
    return (
        f"{found[2]} cannot be used as --{_key(text)} yet: give its option {found[1]!r} a type hint, as in "
        f"'{found[1]}: float', which makes it a flag."
    )


def _bare_options(text: str, roots: Mapping[str, type], flags: list[str]) -> str | None:
    if re.search(r"Not a valid subclass of \w+", text) is None:
        return None
    base = _base_of(text, roots)
    names = f" ({', '.join(subclass_names(base))})" if base is not None else ""
    return f"Expected {_key(text)} to hold class_path{names} and init_args (its options) and nothing else."


def _literal(text: str, roots: Mapping[str, type], flags: list[str]) -> str | None:
    found = re.search(r"Expected a typing\.Literal\[(.+?)\]", text)
    value = _value(text)
    if found is None or value is None:
        return None
    known = re.findall(r"'([^']+)'", found[1])
    return f"Expected {_key(text)} to be one of {', '.join(known)}, got {value}.{nearest(value, known)}"


def _wrong_type(text: str, roots: Mapping[str, type], flags: list[str]) -> str | None:
    outer, _, innermost = text.partition("Given value type:")[0].rpartition("Parser key")
    kinds = re.findall(r"Expected a <class '(\w+)'>", innermost)
    if "Union subtypes" in outer and "Union subtypes" not in innermost:
        kinds = [kind for kind in kinds if kind != "NoneType"]  # what holds the option may be null, not the option
    value = _value(text)
    if (found := re.search(r"Expected a tuple with (\d+) elements", innermost)) and value is not None:
        return f"Expected {_key(text)} to be a list of {found[1]}, got {value}."
    if not kinds or value is None or "class_path" in value:
        return None
    words = " or ".join(dict.fromkeys(_TYPE_WORDS.get(kind, kind) for kind in kinds))
    return f"Expected {_key(text)} to be {words}, got {value}."


def _config_file(text: str, roots: Mapping[str, type], flags: list[str]) -> str | None:
    if found := re.search(r"(?:File does not exist|Path is not a file|File not readable)[^:]*: '?([^']+?)'?$", text):
        return f"Expected a configuration file, found none at {found[1]}. Ready ones are in configs/experiment/."
    if found := re.search(r"(?:Problems parsing config|Unable to parse config)[^:]*: (.+)", text):
        return f"The configuration is no valid YAML ({found[1]}). Mend that line."
    if found := re.search(r"Unexpected config: ?(.*)", text):
        return f"Expected a configuration of 'key: value' lines, got {found[1][:60] or 'an empty file'!r}."
    if found := re.search(r"Parser key \"(\w+)\": Unable to load config '([^']+)'", text):
        return f"--{found[1]} is a group; set its options one by one (--{found[1]}.NAME VALUE), not {found[2]!r}."
    return None


def _unfinished_line(where: str, name: str, lacks: list[str]) -> str:
    return f"{name} cannot be used as --{where} yet: implement {', '.join(lacks)}."


# Parts of a message --------------------------------------------------------------------------------------------------


def _key(text: str) -> str:
    """Return the dotted flag that a message is about."""
    return ".".join(dict.fromkeys(re.findall(r'Parser key "([\w.]+)"', text))) or "config"


def _holder(text: str) -> str | None:
    """Return the innermost class whose option is wrong, None at the top level."""
    found = re.findall(r"Problem with given class_path '([\w.]+)'", text)
    return found[-1] if found else None


def _value(text: str) -> str | None:
    found = re.search(r"(?:Got value|Given value): (.*?)(?: - Expected a | Given value|$)", text)
    return found[1].strip() if found else None


def _base_of(text: str, roots: Mapping[str, type]) -> type | None:
    """Return the class that the wrong name had to be a subclass of."""
    *outer, last = _key(text).split(".")
    if not outer:
        return roots.get(last)
    holders = [path for path in re.findall(r"Problem with given class_path '([\w.]+)'", text) if _load(path)]
    return _annotated_class(holders[-1], last) if holders else None


def _annotated_class(path: str, name: str) -> type | None:
    try:
        hint = typing.get_type_hints(_load(path).__init__).get(name)
    except (NameError, TypeError, AttributeError):
        return None
    kinds = get_args(hint) if get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    return next((kind for kind in kinds if isinstance(kind, type) and kind is not type(None)), None)


def _option_names(path: str) -> list[str]:
    cls = _load(path)
    if cls is None:
        return []
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, given in inspect.signature(cls).parameters.items() if given.kind in kinds]


def _load(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None


def _import_problem(module: str) -> str:
    """Return why a module cannot be imported, in a line; nothing if it can be."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _subclass(base: type, name: str) -> type | None:
    """Return the imported subclass of that name, finished or not."""
    sub: type
    for sub in base.__subclasses__():
        if sub.__name__ == name:
            return sub
        if (found := _subclass(sub, name)) is not None:
            return found
    return None


def _lacks(cls: Any) -> list[str]:
    """Return the abstract methods that a class has left open."""
    return sorted(getattr(cls, "__abstractmethods__", ()))


def _has_unset_class_variable(cls: type) -> bool:
    """Tell whether a class declares a ClassVar and leaves its value to subclasses: it cannot be used by itself."""
    declared = (n for kind in cls.__mro__ for n, hint in vars(kind).get("__annotations__", {}).items() if _is_var(hint))
    return any(not hasattr(cls, name) for name in declared)


def _is_var(hint: Any) -> bool:
    return get_origin(hint) is ClassVar or str(hint).startswith("ClassVar[")


def _choices(known: list[str]) -> str:
    return f" Choose from {', '.join(known)}." if known else ""


def _nearest_flag(word: str, flags: list[str]) -> str:
    name = word.lstrip("-").partition("=")[0]
    known_as = _OTHER_NAMES.get(name.rpartition(".")[2])
    if known_as and "model" in flags:
        return f" Did you mean --{known_as}?"
    if "." not in name:
        # Somebody who writes --epsilon means one of the flags that end so; letters alone are nearer to other flags.
        # Nobody who writes --seed means known noise, and --batch_size is the method's rather than that of judging.
        flags = [flag for flag in flags if not re.match(r"evaluation\.|privacy\.insecure|.*(\+|\.help)$", flag)]
        ends = [flag for flag in flags if name in flag.rpartition(".")[2]]
        if len(name) > 3 and 0 < len(ends) <= 3:
            return f" Did you mean {' or '.join(f'--{flag}' for flag in sorted(ends, reverse=True))}?"
    near = nearest(name, flags, cutoff=0.6).replace("Did you mean ", "Did you mean --")
    others = " 'fit --help.all' lists the flags; a method's own are --model.NAME, listed by 'fit --model.help CLASS'."
    return near or (others if "model" in flags else " 'lightning-dp COMMAND --help' lists the flags.")


def _trimmed(text: str) -> str:
    """Return an unforeseen message without jsonargparse's scaffolding."""
    text = re.sub(r"(- )?Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: - ", "", text)
    text = re.split(r" - Expected a <class 'NoneType'>| Given value type:", text)[0]
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."

"""Reads the file of a grid; a mistake in it is one line that names the choices."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_dp.accounting.accountants import checked_delta
from lightning_dp.accounting.budget_request import DatasetBudgetSettings
from lightning_dp.accounting.events import parse_relation, relation_name
from lightning_dp.benchmark.grid import Choice, Grid, Method, Preset
from lightning_dp.errors import ConfigurationError

DEFAULT_SEEDS = (1, 2, 3)
"""Three, since fewer say nothing about the spread."""

_GRID_KEYS = ("name", "privacy", "epsilons", "seeds", "data", "methods", "settings", "dataset_budget")
_PRIVACY_KEYS = ("neighboring_relation", "target_delta", "accountant")
_BUDGET_KEYS = ("folder", "epsilon", "delta", "rule", "allow_unproved")
_METHOD_KEYS = ("config", "mechanisms", "settings", "by_data", "by_epsilon")
_CHOICE_KEYS = ("class_path", "init_args", "settings")
_OWN_KEYS = {
    "privacy": "the grid states privacy once, for every cell",
    "mechanism": "list it under mechanisms",
    "data": "list it under data",
    "seed_everything": "list it under seeds",
    "name": "a cell is named after its method",
    "dataset_budget": "the grid states it once, for every cell",
    "run_dir": "the comparison chooses the run folders",
    "ckpt_path": "the comparison resumes by itself",
    "wandb_group": "the comparison is the group",
    "by_epsilon": "it belongs to a method or to one of its by_data",
}


class _Loader(yaml.SafeLoader):
    """Reads 1e-5 as a number, as the command line does, and refuses a key that stands twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    line = f"line {key.start_mark.line + 1}"
                    raise ConfigurationError(f"{line}: {key.value!r} twice; the first would be ignored. Keep one.")
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load_grid(path: Path | str) -> Grid:
    """Read a grid file.

    Args:
        path: YAML file; configurations that it names are looked up beside it.

    Raises:
        ConfigurationError: Unreadable, unknown or missing keys, or values that cannot be.
    """
    path = Path(path)
    values = _read(path, "a grid of a comparison")
    _check_keys(values, _GRID_KEYS, needed=("privacy", "epsilons", "data", "methods"), where=f"the grid {path.name}")
    privacy = _mapping(values["privacy"], "privacy")
    _check_keys(privacy, _PRIVACY_KEYS, needed=_PRIVACY_KEYS[:2], where="privacy")
    methods = _mapping(values["methods"], "methods")
    grid = Grid(
        name=str(values.get("name", path.stem)),
        relation=relation_name(parse_relation(_text(privacy["neighboring_relation"], "privacy.neighboring_relation"))),
        delta=checked_delta(_number(privacy["target_delta"], "privacy.target_delta")),
        accountant=_text(privacy.get("accountant", "auto"), "privacy.accountant"),
        epsilons=_unique([_number(value, "epsilons") for value in _listed(values["epsilons"], "epsilons")], "epsilons"),
        seeds=_unique([_seed(value) for value in _listed(values.get("seeds", list(DEFAULT_SEEDS)), "seeds")], "seeds"),
        data=_choices(values["data"], "data"),
        methods=tuple(_method(str(label), given, path.parent) for label, given in methods.items()),
        settings=_settings(values.get("settings"), "settings"),
        dataset_budget=_dataset_budget(values.get("dataset_budget")),
    )
    _check_names(grid)
    return grid


def _dataset_budget(given: Any) -> DatasetBudgetSettings | None:
    if given is None:
        return None
    values = _mapping(given, "dataset_budget")
    _check_keys(values, _BUDGET_KEYS, needed=_BUDGET_KEYS[:1], where="dataset_budget")
    for name in ("epsilon", "delta"):
        if values.get(name) is not None:
            _number(values[name], f"dataset_budget.{name}")
    if not isinstance(values.get("allow_unproved", False), bool):
        raise ConfigurationError(
            f"Expected dataset_budget.allow_unproved to be true or false, got {values['allow_unproved']!r}."
        )
    return DatasetBudgetSettings(**{**values, "folder": _text(values["folder"], "dataset_budget.folder")})


def _method(label: str, given: Any, folder: Path) -> Method:
    where = f"methods.{label}"
    values = _mapping(given, where)
    _check_keys(values, _METHOD_KEYS, needed=_METHOD_KEYS[:2], where=where)
    by_data = _mapping(values.get("by_data") or {}, f"{where}.by_data")
    return Method(
        label=label,
        config=_read_config(values["config"], where, folder),
        mechanisms=_choices(values["mechanisms"], f"{where}.mechanisms"),
        settings=_settings(values.get("settings"), f"{where}.settings"),
        by_data={str(key): _preset(value, f"{where}.by_data.{key}", folder) for key, value in by_data.items()},
        by_epsilon=_by_epsilon(values, where, folder),
    )


def _preset(given: Any, where: str, folder: Path, *, is_of_data: bool = True) -> Preset:
    """Return settings that may name another configuration and, where they are of a data set, presets per epsilon."""
    values = dict(_mapping(given or {}, where))
    config = values.pop("config", None)
    by_epsilon = _by_epsilon(values, where, folder) if is_of_data else {}
    if is_of_data:
        values.pop("by_epsilon", None)
    return Preset(
        config=None if config is None else _read_config(config, where, folder),
        settings=_settings(values, where),
        by_epsilon=by_epsilon,
    )


def _by_epsilon(values: Mapping[str, Any], where: str, folder: Path) -> dict[float, Preset]:
    where = f"{where}.by_epsilon"
    given = _mapping(values.get("by_epsilon") or {}, where)
    return {
        _number(key, where): _preset(value, f"{where}.{key}", folder, is_of_data=False) for key, value in given.items()
    }


def _read_config(given: Any, where: str, folder: Path) -> Mapping[str, Any]:
    return _read(folder / _text(given, f"{where}.config"), "a configuration of a run")


def _choices(given: Any, where: str) -> tuple[Choice, ...]:
    """Return choices from a list of names, or from a mapping of labels to what they mean."""
    if isinstance(given, Mapping):
        entries = dict(given)
    else:
        entries = dict.fromkeys(_unique([_text(name, where) for name in _listed(given, where)], where))
    if not entries:
        raise ConfigurationError(f"Expected at least one entry in {where}, got none.")
    return tuple(_choice(_text(label, where), value, f"{where}.{label}") for label, value in entries.items())


def _choice(label: str, given: Any, where: str) -> Choice:
    values = _mapping(given or {}, where)
    _check_keys(values, _CHOICE_KEYS, where=where)
    return Choice(
        label=label,
        class_path=_text(values.get("class_path", label), f"{where}.class_path"),
        init_args=_mapping(values.get("init_args") or {}, f"{where}.init_args"),
        settings=_settings(values.get("settings"), f"{where}.settings"),
    )


def _settings(given: Any, where: str) -> Mapping[str, Any]:
    """Return settings of a run, checked to leave alone what the comparison states itself."""
    values = _mapping(given or {}, where)
    for key, reason in _OWN_KEYS.items():
        if key in values:
            raise ConfigurationError(f"Expected no {key!r} in {where}: {reason}.")
    return values


def _check_names(grid: Grid) -> None:
    """Refuse per-data and per-epsilon settings of nothing, and cells that would share a folder."""
    if not grid.methods:
        raise ConfigurationError("Expected at least one entry in methods, got none.")
    labels = [choice.label for choice in grid.data]
    for method in grid.methods:
        for name in method.by_data:
            if name not in labels:
                raise ConfigurationError(f"Expected by_data of {method.label} among {labels}, got {name!r}.")
        for epsilon in (*method.by_epsilon, *(e for preset in method.by_data.values() for e in preset.by_epsilon)):
            if epsilon not in grid.epsilons:
                known = ", ".join(f"{value:g}" for value in grid.epsilons)
                raise ConfigurationError(f"Expected by_epsilon of {method.label} among {known}, got {epsilon:g}.")
    ids = [cell.id for cell in grid.cells()]
    if doubled := sorted({name for name in ids if ids.count(name) > 1}):
        raise ConfigurationError(f"Expected labels that differ as file names, got twice: {doubled[0]}. Rename one.")


def _read(path: Path, what: str) -> Mapping[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigurationError(f"Expected {what} at {path}, got: {error.strerror}.") from None
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}, {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is no valid YAML ({' '.join(str(error).split())}). Mend that line.") from None
    return _mapping(values, str(path))


def _check_keys(values: Mapping[str, Any], known: Iterable[str], *, needed: Iterable[str] = (), where: str) -> None:
    known = list(known)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigurationError(f"Unknown key {key!r} in {where}; choose from {', '.join(known)}.{hint}")
    if missing := [key for key in needed if key not in values]:
        raise ConfigurationError(f"Missing in {where}: {', '.join(missing)}.")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"Expected 'key: value' lines in {where}, got {value!r}.")
    return value


def _listed(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigurationError(f"Expected a list with at least one entry in {where}, got {value!r}.")
    return value


def _unique(values: list[Any], where: str) -> tuple[Any, ...]:
    if len(set(values)) != len(values):
        raise ConfigurationError(f"Expected every entry of {where} once, got {values}.")
    return tuple(values)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigurationError(f"Expected a name in {where}, got {value!r}.")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ConfigurationError(f"Expected a finite number > 0 in {where}, got {value!r}.")
    return float(value)


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigurationError(f"Expected whole numbers >= 0 in seeds, got {value!r}.")
    return value

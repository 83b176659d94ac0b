"""The grid of a comparison: methods x mechanisms x data x epsilon x seed under one stated delta and relation."""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_dp.accounting.budget_request import DatasetBudgetSettings


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One mechanism or one data set of a grid.

    Attributes:
        label: Its name in the grid and the tables.
        class_path: Class; the label unless stated.
        init_args: Options; they are laid over the method's own where the class is the same.
        settings: Further settings of the cells that make this choice.
    """

    label: str
    class_path: str
    init_args: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a method uses for one data set, one target epsilon, or one of both.

    Attributes:
        config: Configuration of a whole run instead of the method's own; None keeps that.
        settings: Further settings.
        by_epsilon: For a preset of a data set: what it uses there per target epsilon.
    """

    config: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    by_epsilon: Mapping[float, "Preset"] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method of a grid.

    Attributes:
        label: Its name in the tables.
        config: Configuration of a whole run, as `fit` takes it.
        mechanisms: What turns its rows into releases.
        settings: Settings over the configuration.
        by_data: Presets per data label.
        by_epsilon: Presets per target epsilon; one of the data set goes before.
    """

    label: str
    config: Mapping[str, Any]
    mechanisms: tuple[Choice, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    by_data: Mapping[str, Preset] = field(default_factory=dict)
    by_epsilon: Mapping[float, Preset] = field(default_factory=dict)

    def presets(self, data: str, epsilon: float) -> tuple[Preset, ...]:
        """Return what holds for a data label and a target epsilon, the nearest last."""
        of_data = self.by_data.get(data, Preset())
        return self.by_epsilon.get(epsilon, Preset()), of_data, of_data.by_epsilon.get(epsilon, Preset())


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a comparison.

    Attributes:
        method: Label of the method.
        mechanism: Label of the mechanism.
        data: Label of the data set.
        epsilon: Target epsilon; None for a run without privacy, which has none.
        seed: Public seed.
        config: The whole request, as `fit --config` takes it.
    """

    method: str
    mechanism: str
    data: str
    epsilon: float | None
    seed: int
    config: Mapping[str, Any]

    @property
    def id(self) -> str:
        """A name that is unique in the grid and good as a file name."""
        privacy = "nonprivate" if self.epsilon is None else f"eps{self.epsilon:g}"
        return "-".join(_slug(part) for part in (self.method, self.mechanism, self.data, privacy, f"seed{self.seed}"))

    def without_epsilon(self) -> "Cell":
        """Return the cell of a run without privacy: the same one for every target epsilon."""
        return replace(self, epsilon=None)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A comparison, read and checked.

    Attributes:
        name: Name of the comparison, and its W&B group.
        relation: Name of the neighbouring relation of every cell.
        delta: Delta of every cell.
        accountant: Accountant of every cell.
        epsilons: Target epsilons.
        seeds: Public seeds.
        data: Data sets.
        methods: Methods.
        settings: Settings of every cell.
        dataset_budget: The budget that all cells share; null leaves them out of any.
    """

    name: str
    relation: str
    delta: float
    accountant: str
    epsilons: tuple[float, ...]
    seeds: tuple[int, ...]
    data: tuple[Choice, ...]
    methods: tuple[Method, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    dataset_budget: DatasetBudgetSettings | None = None

    def cells(self) -> tuple[Cell, ...]:
        """Return every combination, seeds outermost, so that one run of everything comes before the second."""
        return tuple(
            self._cell(method, mechanism, data, epsilon, seed)
            for seed in self.seeds
            for data in self.data
            for epsilon in self.epsilons
            for method in self.methods
            for mechanism in method.mechanisms
        )

    def _cell(self, method: Method, mechanism: Choice, data: Choice, epsilon: float, seed: int) -> Cell:
        presets = method.presets(data.label, epsilon)
        whole = [method.config, *(preset.config for preset in presets if preset.config is not None)]
        config: dict[str, Any] = copy.deepcopy(dict(whole[-1]))
        layers = (self.settings, data.settings, method.settings, *(preset.settings for preset in presets))
        for layer in (*layers, mechanism.settings):
            config = merge(config, layer)
        if self.dataset_budget is not None:
            config.pop("dataset_budget", None)  # of a configuration that is also run by itself
        is_plain = mechanism.label == _class_name(mechanism.class_path)
        privacy = {
            "neighboring_relation": self.relation,
            "target_epsilon": epsilon,
            "target_delta": self.delta,
            "accountant": self.accountant,
            "noise_multiplier": None,  # calibrated to the target, whatever the method's own configuration says
        }
        own = {
            "name": method.label if is_plain else f"{method.label} ({mechanism.label})",
            "seed_everything": seed,
            "data": _chosen(config.get("data"), data),
            "mechanism": _chosen(config.get("mechanism"), mechanism),
            "privacy": merge(config.get("privacy") or {}, privacy),
            "wandb_group": self.name,
        }
        return Cell(
            method=method.label,
            mechanism=mechanism.label,
            data=data.label,
            epsilon=epsilon,
            seed=seed,
            config={**config, **own},
        )


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` laid on top, mappings merged at any depth.

    Options of a class do not outlive it: where `over` names another class_path, its mapping replaces the whole one.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and not _is_other_class(old, value):
            merged[key] = merge(old, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _is_other_class(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    named = "class_path" in old and "class_path" in new
    return named and _class_name(old["class_path"]) != _class_name(new["class_path"])


def _chosen(base: Any, choice: Choice) -> dict[str, Any]:
    """Return class and options of a choice, over the method's own where it is the same class."""
    given = {"class_path": choice.class_path, "init_args": dict(choice.init_args)}
    old = {"class_path": base} if isinstance(base, str) else base
    if not isinstance(old, Mapping) or "class_path" not in old or _is_other_class(old, given):
        return given
    return merge(old, given)


def _class_name(path: Any) -> str:
    return str(path).rpartition(".")[2]


def _slug(text: str) -> str:
    return re.sub(r"[^\w.]+", "_", text).strip("_")

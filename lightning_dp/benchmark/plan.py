"""What is known of a cell before it runs: its resolved request, its noise, and its length."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

RESERVATIONS_FILE = "reservations.json"
"""Holds the names under which a comparison's runs have reserved."""

_NOT_THE_RESULT = (
    *("name", "run_dir", "ckpt_path", "checkpoint_every"),
    *("wandb", "wandb_project", "wandb_group"),
    "dataset_budget",
)
"""Settings that change where a run is kept and shown, not what it computes."""

_WITHOUT_EFFECT: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "teachers": {"state": ("auto", "device", "host")},
    "generator": {"texture": (0.0,), "sharpness": (0.0,), "slant": (0.0,)},
    "warm_start": {"slant": (0.0,)},
}
"""Options of parts that came later, with the values that change no result: runs from before are the same."""

_NOT_THE_TRAINING = ("enable_progress_bar", "default_root_dir", "logger", "log_every_n_steps")


@dataclass(frozen=True, kw_only=True)
class CellPlan:
    """A cell whose settings fit together, planned from public facts alone.

    Attributes:
        resolved: The request with every default filled in.
        is_private: Whether its mechanism bounds anything.
        noise_multiplier: Calibrated noise std / L2 sensitivity; None without privacy.
        num_releases: Planned releases.
        header: Public facts of the run, as the header of its ledger will hold them; what a budget asks for.
    """

    resolved: Mapping[str, Any]
    is_private: bool
    noise_multiplier: float | None
    num_releases: int
    header: Mapping[str, Any] = field(default_factory=dict)


Planner: TypeAlias = Callable[[Path], CellPlan]
"""From the file of a request to its plan; raises ConfigurationError with the reason where there is none."""


def request_key(resolved: Mapping[str, Any]) -> str:
    """Return ten hex digits over everything in a resolved request that decides what the run computes.

    A run whose card was made from an equal request is the run that the request asks for.

    Args:
        resolved: The configuration with every default filled in, from a parser or from a run card.
    """
    kept = {key: value for key, value in resolved.items() if key not in _NOT_THE_RESULT}
    if isinstance(trainer := kept.get("trainer"), Mapping):
        kept["trainer"] = {key: value for key, value in trainer.items() if key not in _NOT_THE_TRAINING}
    kept["model"] = _parts_that_decide(kept.get("model"))
    if "warm_start" in kept:
        kept["warm_start"] = _deciding(kept["warm_start"], "warm_start")
    text = json.dumps(_as_in_a_card(kept), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _parts_that_decide(model: Any) -> Any:
    """Return a model's settings without those of its own parts that have no effect."""
    if not (isinstance(model, Mapping) and isinstance(parts := model.get("init_args"), Mapping)):
        return model
    return {**model, "init_args": {name: _deciding(part, name) for name, part in parts.items()}}


def _deciding(part: Any, name: str) -> Any:
    """Return the settings of a part without those that have no effect."""
    idle = _WITHOUT_EFFECT.get(name)
    if idle is None or not (isinstance(part, Mapping) and isinstance(options := part.get("init_args"), Mapping)):
        return part
    return {**part, "init_args": {key: value for key, value in options.items() if value not in idle.get(key, ())}}


def _as_in_a_card(value: Any) -> Any:
    """Return the value as a run card writes it, so that both have one key."""
    if isinstance(value, Mapping):
        return {str(key): _as_in_a_card(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_in_a_card(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

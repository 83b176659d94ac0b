"""The release checkpoint: the network that is safe to publish, its constructor options and its claim; nothing else.

Loading executes no stored code: weights are safetensors, the rest is JSON, and the class is looked up by name among the
networks that the project (or the caller's own imports) has defined.
"""

import difflib
import importlib
import json
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakMethod

from safetensors.torch import load_file, save

import lightning_dp.networks
from lightning_dp.errors import ConfigurationError, DataError
from lightning_dp.networks.classifier import Classifier
from lightning_dp.networks.generator import Generator
from lightning_dp.networks.releasable import ReleasableNetwork

Network = TypeVar("Network", bound=ReleasableNetwork)
_FORMAT = 1
_asked: WeakKeyDictionary[ReleasableNetwork, WeakMethod[Callable[[], None]]] = WeakKeyDictionary()


def ask_before_saving(network: ReleasableNetwork, check: Callable[[], None]) -> None:
    """Have a method asked before its network is written, by whoever writes it.

    Args:
        network: What is published.
        check: A method of an object; raises if the network is not what guarded steps left. Not kept alive.
    """
    _asked[network] = WeakMethod(check)


def save_released(folder: Path, network: ReleasableNetwork, claim: dict[str, Any]) -> Path:
    """Write the release checkpoint: KIND.safetensors and KIND.json, KIND being generator or classifier.

    Args:
        folder: Where to write; made if missing.
        network: The released network. Parameters are written; a buffer that is not a public constant is refused.
        claim: The claim under which it was trained, JSON-ready.

    Returns:
        The weights file.

    Raises:
        PrivacyProtocolError: It was trained by a method here, and is not what its guarded steps left.
        ConfigurationError: The network has a persistent buffer, which could carry statistics of private data.
    """
    if network in _asked and (check := _asked[network]()) is not None:
        check()
    buffers = set(network.state_dict()) - {name for name, _ in network.named_parameters()}
    if buffers:
        raise ConfigurationError(
            f"{type(network).__name__} keeps buffers {sorted(buffers)} in its state; a released network holds "
            "parameters only (register public constants with persistent=False)."
        )
    folder.mkdir(parents=True, exist_ok=True)
    facts_file, weights_file = _files(folder, type(network))
    weights = {name: value.detach().cpu().contiguous() for name, value in network.named_parameters()}
    facts = {"format": _FORMAT, "class": type(network).__name__, "options": network.options(), "claim": claim}
    facts_file.write_text(json.dumps(facts, indent=2) + "\n")
    weights_file.write_bytes(save(weights))  # save_file would shut the public file to other users
    return weights_file


def load_generator(folder: Path) -> tuple[Generator, dict[str, Any]]:
    """Return the generator of a release checkpoint and its claim; see `load_released`."""
    return load_released(folder, Generator)  # type: ignore[type-abstract]


def load_classifier(folder: Path) -> tuple[Classifier, dict[str, Any]]:
    """Return the classifier of a release checkpoint and its claim; see `load_released`."""
    return load_released(folder, Classifier)  # type: ignore[type-abstract]


def load_released(folder: Path, base: type[Network]) -> tuple[Network, dict[str, Any]]:
    """Return the network of a release checkpoint and its claim.

    Args:
        folder: Folder of the checkpoint, or the run folder above it.
        base: What the network must be: Generator or Classifier.

    Raises:
        DataError: A file is missing or does not hold what it should.
        ConfigurationError: The network's class is unknown here.
    """
    folder = folder if _files(folder, base)[0].exists() else folder / "release"
    facts_file, weights_file = _files(folder, base)
    for file in (facts_file, weights_file):
        if not file.exists():
            others = sorted(found.stem for found in folder.glob("*.safetensors") if found.stem != base.kind)
            hint = f"It released a {others[0]}." if others else "Give the folder of a run that has ended."
            raise DataError(f"Expected {file}, found nothing. {hint}")
    try:
        facts = json.loads(facts_file.read_text())
        name, options, claim = facts["class"], facts["options"], facts["claim"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise DataError(f"{facts_file} is not a release record ({error}). Copy it again from the run.") from None
    network = _network_class(name, base)(**{key: _as_tuple(value) for key, value in options.items()})
    try:
        network.load_state_dict(load_file(weights_file))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{weights_file} does not hold a {name} ({reason}). Copy it again.") from None
    return network.eval(), claim


def _files(folder: Path, kind: type[ReleasableNetwork]) -> tuple[Path, Path]:
    return folder / f"{kind.kind}.json", folder / f"{kind.kind}.safetensors"


def _network_class(name: str, base: type[Network]) -> type[Network]:
    for module in pkgutil.iter_modules(lightning_dp.networks.__path__):
        importlib.import_module(f"lightning_dp.networks.{module.name}")
    known = {cls.__name__: cls for cls in _subclasses(base)}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigurationError(f"Unknown {base.kind} {name!r}; known: {', '.join(sorted(known))}.{hint}")
    return known[name]


def _subclasses(cls: type[Network]) -> list[type[Network]]:
    found: list[type[Network]] = []
    for sub in cls.__subclasses__():
        found += [sub, *_subclasses(sub)]
    return found


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

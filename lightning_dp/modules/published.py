"""The release checkpoint: the generator that is safe to publish, its constructor options and its claim; nothing else.

Loading executes no stored code: weights are safetensors, the rest is JSON, and the class is looked up by name among the
generators that the project (or the caller's own imports) has defined.
"""

import difflib
import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

import lightning_dp.networks
from lightning_dp.errors import ConfigurationError, DataError
from lightning_dp.networks.generator import Generator

WEIGHTS_FILE = "generator.safetensors"
FACTS_FILE = "generator.json"
_FORMAT = 1


def save_generator(folder: Path, generator: Generator, claim: dict[str, Any]) -> Path:
    """Write the release checkpoint.

    Args:
        folder: Where to write; made if missing.
        generator: The released generator. Parameters are written; a buffer that is not a public constant is refused.
        claim: The claim under which it was trained, JSON-ready.

    Returns:
        The weights file.

    Raises:
        ConfigurationError: The generator has a persistent buffer, which could carry statistics of private data.
    """
    buffers = set(generator.state_dict()) - {name for name, _ in generator.named_parameters()}
    if buffers:
        raise ConfigurationError(
            f"{type(generator).__name__} keeps buffers {sorted(buffers)} in its state; a released network holds "
            "parameters only (register public constants with persistent=False)."
        )
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in generator.named_parameters()}
    facts = {"format": _FORMAT, "class": type(generator).__name__, "options": generator.options(), "claim": claim}
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n")
    save_file(weights, folder / WEIGHTS_FILE)
    return folder / WEIGHTS_FILE


def load_generator(folder: Path) -> tuple[Generator, dict[str, Any]]:
    """Return the generator of a release checkpoint and its claim.

    Args:
        folder: Folder of the checkpoint, or the run folder above it.

    Raises:
        DataError: A file is missing or does not hold what it should.
        ConfigurationError: The generator's class is unknown here.
    """
    folder = folder if (folder / FACTS_FILE).exists() else folder / "release"
    for name in (FACTS_FILE, WEIGHTS_FILE):
        if not (folder / name).exists():
            raise DataError(f"Expected {folder / name}, found nothing. Give the folder of a run that has ended.")
    try:
        facts = json.loads((folder / FACTS_FILE).read_text())
        name, options, claim = facts["class"], facts["options"], facts["claim"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{folder / FACTS_FILE} is not a release record ({error}). Copy it again from the run."
        ) from None
    generator = _generator_class(name)(**{key: _as_tuple(value) for key, value in options.items()})
    try:
        generator.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{folder / WEIGHTS_FILE} does not hold a {name} ({reason}). Copy it again.") from None
    return generator.eval(), claim


def _generator_class(name: str) -> type[Generator]:
    for module in pkgutil.iter_modules(lightning_dp.networks.__path__):
        importlib.import_module(f"lightning_dp.networks.{module.name}")
    known = {cls.__name__: cls for cls in _subclasses(Generator)}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigurationError(f"Unknown generator {name!r}; known: {', '.join(sorted(known))}.{hint}")
    return known[name]


def _subclasses(cls: type[Generator]) -> list[type[Generator]]:
    found = []
    for sub in cls.__subclasses__():
        found += [sub, *_subclasses(sub)]
    return found


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

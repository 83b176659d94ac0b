"""The lines of a ledger file: canonical JSON that ends in a SHA-256 chained to the line before."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lightning_dp.accounting.events import ReleaseEvent, Sampling, event_from_dict

FORMAT = 1
"""Version of the file and of the checkpoint state."""

_SEAL = re.compile(rb'(.*),"sha256":"([0-9a-f]{64})"\}', re.DOTALL)
_ENTRY = re.compile(
    r'\{"event":(?P<event>\{[^\n]*\}),"number":(?P<number>[0-9]+),"sampling":(?P<sampling>\{[^\n]*\}),'
    r'"writer":"(?P<writer>[0-9a-f]+)"\}'
)


@dataclass(frozen=True)
class Line:
    """One release as a line holds it.

    Attributes:
        number: Its place in the ledger, from 1.
        writer: Random name of the process that appended it, hexadecimal.
        event: What the release cost.
        sampling: How records entered it.
    """

    number: int
    writer: str
    event: ReleaseEvent
    sampling: Sampling


def canonical_json(value: Any) -> str:
    """Return JSON in one spelling: sorted names, no spaces, ASCII, no NaN.

    Args:
        value: A JSON-able value.

    Returns:
        The text, without line breaks.

    Raises:
        ValueError: NaN or infinity inside.
        TypeError: Not JSON-able.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(previous: str, text: str) -> str:
    """Return the SHA-256 of a text chained to the digest before it.

    Args:
        previous: Digest of the line before, empty for the first.
        text: What is sealed.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256(f"{previous}\n{text}".encode()).hexdigest()


def seal(previous: str, text: str) -> tuple[bytes, str]:
    """Return a JSON object as a sealed line, and the digest the next line continues from.

    Args:
        previous: Digest of the line before, empty for the header.
        text: A JSON object from `canonical_json`.

    Returns:
        The line without its line break, and its digest.
    """
    seal_digest = digest(previous, text)
    return f'{text[:-1]},"sha256":"{seal_digest}"}}'.encode(), seal_digest


def unseal(previous: str, line: bytes) -> tuple[str, str] | None:
    """Return the JSON object of a sealed line and its digest, or None if one bit differs from what was sealed.

    Args:
        previous: Digest of the line before, empty for the header.
        line: The line without its line break.

    Returns:
        Text and digest, or None.
    """
    match = _SEAL.fullmatch(line)
    if match is None:
        return None
    try:
        text, sealed = match[1].decode("ascii") + "}", match[2].decode("ascii")
    except UnicodeDecodeError:
        return None
    return (text, sealed) if digest(previous, text) == sealed else None


def entry_text(line: Line) -> str:
    """Return the JSON object of a release.

    Args:
        line: The release.

    Returns:
        Canonical JSON, the same as `canonical_json` of its fields.
    """
    event, sampling = _event_json(line.event), _sampling_json(line.sampling)
    return f'{{"event":{event},"number":{line.number},"sampling":{sampling},"writer":"{line.writer}"}}'


def parse_entry(text: str) -> Line:
    """Return the release of a JSON object.

    Args:
        text: What `entry_text` returned.

    Returns:
        The release.

    Raises:
        ValueError: Not such an object, or its event is unknown or invalid (a ConfigurationError then).
    """
    match = _ENTRY.fullmatch(text)
    if match is None:
        raise ValueError("not a release")
    return Line(int(match["number"]), match["writer"], _parse_event(match["event"]), _parse_sampling(match["sampling"]))


@lru_cache(maxsize=256)
def _event_json(event: ReleaseEvent) -> str:
    return canonical_json(event.to_dict())


@lru_cache(maxsize=256)
def _sampling_json(sampling: Sampling) -> str:
    return canonical_json(sampling.to_dict())


@lru_cache(maxsize=256)
def _parse_event(text: str) -> ReleaseEvent:
    return event_from_dict(json.loads(text))


@lru_cache(maxsize=256)
def _parse_sampling(text: str) -> Sampling:
    return Sampling.from_dict(json.loads(text))

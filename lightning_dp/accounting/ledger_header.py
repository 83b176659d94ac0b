"""The header of a ledger: what is common to all its releases, and when two ledgers are about the same."""

import json
from collections.abc import Mapping
from typing import Any

from lightning_dp.accounting.events import parse_relation, relation_name
from lightning_dp.accounting.ledger_lines import FORMAT, canonical_json
from lightning_dp.errors import ConfigurationError, LedgerError

_SAME_DATA = ("relation", "unit", "dataset", "fingerprint", "num_records")
"""Header fields in which two ledgers must agree to be about the same privacy of the same records."""

_SAME_CLAIM: dict[str, Any] = {
    "mechanism": None,
    "target_delta": None,
    "accountant": "auto",
    "conditional_on": [],
    "unverified": [],
    "warnings": [],
    "not_covered": None,
    "plan": None,
    "planned": None,
}
"""Header fields on which a claim rests, and what a missing one says: releases keep them wherever they are carried."""


def checked_header(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return a header with its format, the relation by name, and everything else as JSON keeps it.

    Args:
        header: "relation" and "unit", and any other JSON values.

    Raises:
        ConfigurationError: Relation or unit are missing, or a value is not JSON or of the wrong type.
    """
    if not isinstance(header, Mapping) or not isinstance(header.get("unit"), str) or not header["unit"]:
        raise ConfigurationError(
            f"Expected a ledger header with 'relation' and 'unit' (the privacy unit in words), got header={header!r}."
        )
    if header.get("format", FORMAT) != FORMAT:
        raise ConfigurationError(f"Expected a ledger of format {FORMAT}, got format={header['format']!r}.")
    _check_types(header)
    named = dict(header) | {"format": FORMAT, "relation": relation_name(parse_relation(header.get("relation", "")))}
    try:
        plain = json.loads(canonical_json(named))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"Expected a ledger header of JSON values, got header={header!r}: {error}.") from error
    checked: dict[str, Any] = plain
    return checked


def _check_types(header: Mapping[str, Any]) -> None:
    """Refuse fields of a run's header that nothing could be computed with, whoever wrote and sealed them."""
    for name, is_right, expected in (
        ("num_records", lambda value: type(value) is int and value > 0, "a whole number >= 1"),
        ("target_delta", lambda value: isinstance(value, float | int) and 0 < value < 1, "a number in (0, 1)"),
        ("mechanism", lambda value: isinstance(value, str), "a name"),
        ("accountant", lambda value: isinstance(value, str), "a name"),
        *(
            (name, _is_texts, "a list of sentences")
            for name in ("conditional_on", "unverified", "warnings", "not_covered")
        ),
    ):
        if (value := header.get(name)) is not None and not is_right(value):
            raise ConfigurationError(f"Expected {name} in a ledger's header to be {expected}, got {name}={value!r}.")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def check_same_data(own: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Refuse another ledger's header: its releases would be about other records or have another sensitivity.

    Args:
        own: A ledger's header.
        other: The header of what is to be continued or merged.

    Raises:
        LedgerError: They are not about the same records under the same relation.
    """
    for name in _SAME_DATA:
        ours, theirs = own.get(name), other.get(name)
        if ours != theirs and (name in ("relation", "unit") or None not in (ours, theirs)):
            raise LedgerError(
                f"Expected a ledger with {name}={ours!r}, got {name}={theirs!r}. "
                "Only ledgers of the same records under the same relation can be continued or merged."
            )


def check_same_claim(own: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Refuse releases whose conditions this header does not state: here they would count as unconditional.

    Args:
        own: A ledger's header.
        other: The header of what is to be merged.

    Raises:
        LedgerError: Their claims rest on different things.
    """
    for name, missing in _SAME_CLAIM.items():
        ours, theirs = own.get(name, missing), other.get(name, missing)
        if ours != theirs:
            expected, got = _in_words(name, ours), _in_words(name, theirs)
            raise LedgerError(
                f"Expected a ledger with {name}={expected}, got {name}={got}. Resume with the settings under "
                "which its releases were made, or start a new run without that checkpoint."
            )


def _in_words(name: str, value: Any) -> str:
    """Return a field for a message; a plan as "30 x gaussian (l2_sensitivity 50.6, noise_std 138.5)"."""
    if name != "planned" or not isinstance(value, list):
        return repr(value)
    try:
        return ", ".join(f"{part['count']} x {_event_in_words(part['event'])}" for part in value)
    except (KeyError, TypeError, AttributeError):  # another's header may hold anything
        return repr(value)


def _event_in_words(event: Mapping[str, Any]) -> str:
    numbers = (f"{key} {value:.4g}" for key, value in event.items() if isinstance(value, int | float))
    return f"{event['kind']} ({', '.join(numbers)})"

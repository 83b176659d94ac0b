"""Checks of the fields of events: values that an accountant would silently misread are refused."""

import math
from collections.abc import Mapping
from dataclasses import fields
from operator import index
from typing import Any, SupportsIndex

from lightning_dp.errors import ConfigurationError


def positive_float(owner: str, name: str, value: Any) -> float:
    """Return value as a Python float, refusing whatever an accountant would silently misread.

    The cast matters: dp-accounting drops events whose noise multiplier is an int or a numpy scalar inside a sampled
    composition, and its RDP accountant answers 0 for NaN noise.

    Args:
        owner: The event, for the error.
        name: Its field, for the error.
        value: What was given.

    Raises:
        ConfigurationError: It is no finite number > 0.
    """
    try:
        number = float(value) if not isinstance(value, (bool, str, bytes)) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number > 0.0):
        raise ConfigurationError(
            f"Expected a finite {owner}.{name} > 0, got {name}={value!r}. "
            "A release without noise is NonPrivateRelease(); nothing released is no event."
        )
    return number


def whole_number(owner: str, name: str, value: SupportsIndex, minimum: int) -> int:
    """Return value as an int of at least minimum; floats and booleans are refused.

    Args:
        owner: The event, for the error.
        name: Its field, for the error.
        value: What was given.
        minimum: The least number allowed.

    Raises:
        ConfigurationError: It is no such number.
    """
    try:
        number = index(value) if not isinstance(value, bool) else minimum - 1
    except TypeError:
        number = minimum - 1
    if number < minimum:
        raise ConfigurationError(f"Expected {owner}.{name} to be an integer >= {minimum}, got {name}={value!r}.")
    return number


def checked_fields(what: str, cls: type[Any], data: Any) -> dict[str, Any]:
    """Return data as keyword arguments of a dataclass if it has exactly its fields.

    Args:
        what: What the data should be, for the error.
        cls: The dataclass.
        data: A mapping, read from a file.

    Raises:
        ConfigurationError: Fields are missing, or unknown.
    """
    names = [field.name for field in fields(cls)]
    if not isinstance(data, Mapping) or sorted(map(str, data)) != sorted(names):
        given = sorted(map(str, data)) if isinstance(data, Mapping) else data
        raise ConfigurationError(f"Expected the {what} to have exactly the fields {names}, got {given!r}.")
    return {str(name): value for name, value in data.items()}


def plain(value: Any) -> Any:
    """Return nested tuples as lists, so that a dictionary equals its own JSON round trip."""
    return [plain(item) for item in value] if isinstance(value, tuple) else value

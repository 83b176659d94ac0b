"""The base of privacy events: to dictionaries and back, by the kind of the event."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from lightning_dp.accounting.fields import checked_fields, plain
from lightning_dp.errors import ConfigurationError

_KINDS: dict[str, "type[Release]"] = {}  # filled as the classes are made, in their order


@dataclass(frozen=True, kw_only=True)
class Release:
    """Base of the events: turns them into JSON-able dictionaries and back, refusing what it does not know."""

    kind: ClassVar[str] = ""
    is_exact: ClassVar[bool] = False  # whether noise is drawn in whole numbers, from exactly the law that is charged

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:  # those without are bases
            _KINDS[cls.kind] = cls

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary: the `kind` tag and every field.

        Returns:
            The dictionary; `event_from_dict` inverts it exactly (floats keep every bit through JSON).
        """
        return {"kind": self.kind} | {field.name: plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild an event of this class.

        Args:
            data: What `to_dict` returned.

        Returns:
            The event.

        Raises:
            ConfigurationError: Unknown kind, another class's kind, an unknown or missing field, or an invalid value.
        """
        event = event_from_dict(data)
        if not isinstance(event, cls):
            raise ConfigurationError(f"Expected an event of kind {cls.kind!r}, got kind={event.kind!r}.")
        return event


def event_from_dict(data: Mapping[str, Any]) -> Any:
    """Rebuild any event from its dictionary.

    Args:
        data: What an event's `to_dict` returned, possibly through JSON.

    Returns:
        The event, equal to the original.

    Raises:
        ConfigurationError: No mapping, unknown kind, unknown or missing field, or an invalid value.

    Example:
        >>> from lightning_dp.accounting.events import ZCDPRelease
        >>> event_from_dict(ZCDPRelease(rho=0.5).to_dict())
        ZCDPRelease(rho=0.5)
    """
    kind = data.get("kind") if isinstance(data, Mapping) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ConfigurationError(f"Expected an event whose kind is one of {', '.join(_KINDS)}, got kind={kind!r}.")
    cls = _KINDS[kind]
    values = {name: value for name, value in data.items() if name != "kind"}
    return cls(**checked_fields(f"event of kind {kind!r}", cls, values))

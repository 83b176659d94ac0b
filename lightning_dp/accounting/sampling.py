"""How records enter a release."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, TypeAlias, get_args

from lightning_dp.accounting.fields import checked_fields, positive_float
from lightning_dp.errors import ConfigurationError

SamplingScheme: TypeAlias = Literal["full", "poisson"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How records enter a release.

    Args:
        scheme: "full" (every record, every time) or "poisson" (each record by its own coin).
        rate: Probability that a record takes part, 0 < rate <= 1; 1 for "full".
        executed: False when Poisson sampling is only assumed (a shuffled loader, say); the claim is then UNVERIFIED.

    Raises:
        ConfigurationError: Unknown scheme, rate outside (0, 1], or a setting that "full" would ignore.
    """

    scheme: SamplingScheme
    rate: float = 1.0
    executed: bool = True

    def __post_init__(self) -> None:
        if self.scheme not in get_args(SamplingScheme):
            raise ConfigurationError(
                f"Expected Sampling.scheme to be one of {', '.join(get_args(SamplingScheme))}, "
                f"got scheme={self.scheme!r}."
            )
        rate = positive_float("Sampling", "rate", self.rate)
        if rate > 1.0:
            raise ConfigurationError(
                f"Expected 0 < Sampling.rate <= 1, got rate={rate!r}. Set the expected batch size below num_records."
            )
        object.__setattr__(self, "rate", rate)
        if not isinstance(self.executed, bool):
            raise ConfigurationError(f"Expected Sampling.executed to be true or false, got executed={self.executed!r}.")
        if self.scheme == "full" and (rate != 1.0 or not self.executed):
            raise ConfigurationError(
                f"Expected rate=1.0 and executed=True with scheme='full', got rate={rate!r}, "
                f"executed={self.executed!r}. Use scheme='poisson' if records are sampled."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary of the three fields.

        Returns:
            The dictionary; `from_dict` inverts it.
        """
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a sampling from `to_dict`.

        Args:
            data: The dictionary.

        Returns:
            The sampling.

        Raises:
            ConfigurationError: Unknown or missing field, or an invalid value.
        """
        return cls(**checked_fields("sampling", cls, data))

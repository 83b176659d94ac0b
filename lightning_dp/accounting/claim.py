"""A claim: what is said of a run's privacy, in one line, and what is not."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import ROUND_CEILING, Decimal
from enum import StrEnum
from typing import Any, Self

from lightning_dp.accounting.accountants import checked_delta
from lightning_dp.accounting.coverage import DEFAULT_NOT_COVERED
from lightning_dp.accounting.events import parse_relation, relation_name
from lightning_dp.errors import ConfigurationError

_RELATION_LABELS = {
    "add_or_remove_one": "add-or-remove-one",
    "replace_one": "replace-one",
    "replace_special": "zero-out (one record becomes empty and contributes nothing; their number stays)",
}
_ACCOUNTANT_LABELS = {"gaussian": "exact Gaussian", "pld": "PLD", "rdp": "RDP", "none": "no"}


class ClaimLevel(StrEnum):
    """How much of a claim is proved; an epsilon is shown for PROVED only."""

    PROVED = "PROVED"
    CONDITIONAL = "CONDITIONAL"
    UNVERIFIED = "UNVERIFIED"
    NONPRIVATE = "NONPRIVATE"


@dataclass(frozen=True, kw_only=True)
class PrivacyClaim:
    """A statement about the privacy of everything released, with its conditions.

    Attributes:
        level: How much is proved.
        epsilon: The bound; None unless the level is PROVED, so that no other number can be ranked or quoted.
        delta: The delta of the statement.
        relation: Name of the neighbouring relation.
        unit: The privacy unit in words.
        accountant: "gaussian", "pld", "rdp" or "none".
        sampler: How records entered the releases, and whether the sampling was executed or assumed.
        num_releases: Number of releases made.
        mechanism: Name of the mechanism.
        assumptions: What the claim rests on beyond a proof: components without a bound, steps not checked.
        not_covered: What the epsilon does not speak of.
        warnings: What a reader should weigh (a delta too large, an accountant's fallback).
        planned_releases: Number of releases fixed before the first; None where no plan is known. Where fewer were made,
            epsilon is that of the plan.

    Raises:
        ConfigurationError: An epsilon with a level other than PROVED, or PROVED without a finite one.
    """

    level: ClaimLevel
    epsilon: float | None
    delta: float
    relation: str
    unit: str
    accountant: str
    sampler: str
    num_releases: int
    mechanism: str
    assumptions: tuple[str, ...] = ()
    not_covered: tuple[str, ...] = DEFAULT_NOT_COVERED
    warnings: tuple[str, ...] = ()
    planned_releases: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "level", ClaimLevel(self.level))
        relation_name(parse_relation(self.relation))
        checked_delta(self.delta)
        is_finite = self.epsilon is not None and math.isfinite(self.epsilon) and self.epsilon >= 0.0
        if (self.level is ClaimLevel.PROVED) != (self.epsilon is not None) or (
            self.epsilon is not None and not is_finite
        ):
            raise ConfigurationError(
                f"Expected a finite epsilon >= 0 with level PROVED and none with any other, got level={self.level}, "
                f"epsilon={self.epsilon!r}."
            )
        for name in ("assumptions", "not_covered", "warnings"):
            object.__setattr__(self, name, tuple(str(text) for text in getattr(self, name)))

    def statement(self) -> str:
        """Return the claim in one line; epsilon is rounded up and shown only when PROVED.

        Returns:
            For example "(epsilon=0.998, delta=1e-05)-DP per record, replace-one, exact Gaussian accountant, 400
            releases of TopAgg: PROVED".
        """
        plural = "release" if self.num_releases == 1 else "releases"
        planned = self.planned_releases
        is_early = self.level is ClaimLevel.PROVED and planned is not None and 0 < self.num_releases < planned
        made = f"{self.num_releases} of {planned} planned {plural}" if is_early else f"{self.num_releases} {plural}"
        releases = f"{made} of {self.mechanism}{', all charged' * is_early}"
        scope = f"per {self.unit}, {_RELATION_LABELS[self.relation]}"
        if self.level is ClaimLevel.PROVED and self.epsilon is not None:
            shown = f"(epsilon={epsilon_text(self.epsilon)}, delta={self.delta!r})-DP {scope}"
            line = f"{shown}, {_ACCOUNTANT_LABELS.get(self.accountant, self.accountant)} accountant, {releases}: PROVED"
        elif self.level is ClaimLevel.NONPRIVATE:
            line = f"No differential privacy {scope}: {releases} hold no bound on any record: NONPRIVATE"
        else:
            held = "conditional on" if self.level is ClaimLevel.CONDITIONAL else "assumed, not checked"
            reasons = "; ".join(self.assumptions)
            line = f"No epsilon is stated {scope}, {releases}; {held}: {reasons}: {self.level}"
        return " ".join(line.split())

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary of every field and the statement.

        Returns:
            The dictionary; `from_dict` inverts it.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return plain | {"level": str(self.level), "statement": self.statement()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a claim.

        Args:
            data: What `to_dict` returned.

        Returns:
            The claim.

        Raises:
            ConfigurationError: Unknown or missing fields, an invalid value, or a statement that is not the claim's own.
        """
        names = {field.name for field in fields(cls)}
        if isinstance(data, Mapping):
            data = {"planned_releases": None, **data}  # claims from before plans were kept
        if not isinstance(data, Mapping) or set(data) - {"statement"} != names:
            raise ConfigurationError(f"Expected a claim with exactly the fields {sorted(names)}, got {data!r}.")
        try:
            claim = cls(**{name: data[name] for name in names})
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"Expected a valid claim: {error}") from error
        if data.get("statement", claim.statement()) != claim.statement():
            raise ConfigurationError(
                f"Expected the claim's own statement {claim.statement()!r}, got statement={data['statement']!r}."
            )
        return claim


def epsilon_text(epsilon: float) -> str:
    """Return epsilon with three decimals, never below it: a claim must not promise more than was proved.

    Args:
        epsilon: A finite bound.
    """
    return str(Decimal(repr(epsilon)).quantize(Decimal("0.001"), rounding=ROUND_CEILING))

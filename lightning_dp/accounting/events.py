"""What one release costs, as plain frozen numbers.

An event describes the worst case over all data: it holds no tensor and depends on no record, so it may be computed,
written to the ledger and published before the noise is drawn.

Symbols: ``noise_std`` is the absolute standard deviation of the noise, ``l2_sensitivity`` the largest L2 move of the
noiseless value between two neighbours *under the stated neighbouring relation*; their quotient is the
``noise_multiplier``, and ``mu = 1 / noise_multiplier`` is the parameter of Gaussian differential privacy.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from dp_accounting import NeighboringRelation

from lightning_dp.accounting.fields import positive_float, whole_number
from lightning_dp.accounting.release import Release, event_from_dict
from lightning_dp.accounting.sampling import Sampling
from lightning_dp.accounting.selection_release import SelectionRelease
from lightning_dp.errors import ConfigurationError

__all__ = [
    "RELATION_NAMES",
    "AdditiveRelease",
    "DiscreteGaussianRelease",
    "GaussianRelease",
    "NonPrivateRelease",
    "Release",
    "ReleaseEvent",
    "RoundedGaussianRelease",
    "RoundedTernaryRelease",
    "Sampling",
    "SelectionRelease",
    "TernaryRelease",
    "VonMisesFisherRelease",
    "ZCDPRelease",
    "event_from_dict",
    "parse_relation",
    "relation_name",
]

RELATION_NAMES: tuple[str, ...] = ("add_or_remove_one", "replace_one", "replace_special")
"""The neighbouring relations, in the spelling of configuration files; `replace_special` is a record made null."""


def parse_relation(relation: str | NeighboringRelation) -> NeighboringRelation:
    """Return dp_accounting's enum member for a relation given by name or already as the enum.

    Args:
        relation: One of `RELATION_NAMES`, or a member of ``dp_accounting.NeighboringRelation``.

    Returns:
        The enum member.

    Raises:
        ConfigurationError: The name is unknown; the message lists the choices.
    """
    if isinstance(relation, NeighboringRelation):
        return relation
    if isinstance(relation, str) and relation in RELATION_NAMES:
        return NeighboringRelation[relation.upper()]
    raise ConfigurationError(
        f"Expected neighboring_relation to be one of {', '.join(RELATION_NAMES)}, "
        f"got neighboring_relation={relation!r}."
    )


def relation_name(relation: NeighboringRelation) -> str:
    """Return the name of a relation as `parse_relation` reads it.

    Args:
        relation: A member of ``dp_accounting.NeighboringRelation``.

    Returns:
        One of `RELATION_NAMES`.
    """
    return str(relation.name).lower()


@dataclass(frozen=True, kw_only=True)
class AdditiveRelease(Release):
    """Independent noise of one scale on every coordinate of a value of bounded L2 sensitivity.

    Args:
        noise_std: Scale of the noise per coordinate, > 0, in units of the value.
        l2_sensitivity: L2 sensitivity, > 0, same units, already for the stated relation (2C for a sum of rows clipped
            to C under replace-one).

    Raises:
        ConfigurationError: A value is NaN, infinite, zero, negative or not a number.
    """

    noise_std: float
    l2_sensitivity: float

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for name in ("noise_std", "l2_sensitivity"):
            object.__setattr__(self, name, positive_float(owner, name, getattr(self, name)))
        # the quotient of two valid floats can still overflow or vanish
        positive_float(owner, "noise_multiplier", self.noise_std / self.l2_sensitivity)
        positive_float(owner, "mu", self.l2_sensitivity / self.noise_std)

    @property
    def noise_multiplier(self) -> float:
        """Noise standard deviation over L2 sensitivity, dimensionless."""
        return self.noise_std / self.l2_sensitivity

    @property
    def mu(self) -> float:
        """Parameter of Gaussian differential privacy of one unsampled release, where the noise is Gaussian."""
        return self.l2_sensitivity / self.noise_std


@dataclass(frozen=True, kw_only=True)
class GaussianRelease(AdditiveRelease):
    """Gaussian noise of a fixed standard deviation on a value of bounded L2 sensitivity.

    Guarantee: exactly mu-GDP with mu = l2_sensitivity / noise_std when every record takes part.

    Args:
        noise_std: Standard deviation of the noise, as in `AdditiveRelease`.
        l2_sensitivity: As in `AdditiveRelease`.

    Example:
        >>> GaussianRelease(noise_std=2, l2_sensitivity=1).noise_multiplier
        2.0
    """

    kind: ClassVar[str] = "gaussian"


@dataclass(frozen=True, kw_only=True)
class RoundedGaussianRelease(GaussianRelease):
    """Gaussian noise rounded to whole steps, on a value of whole steps, drawn exactly.

    Guarantee: that of the Gaussian, sampled or not, because a whole number plus rounded noise is the rounded sum of
    number and noise: post-processing. No floating-point number enters the law of what is released.

    Args:
        noise_std: Standard deviation before rounding, in units of the value.
        l2_sensitivity: As in `AdditiveRelease`.
    """

    kind: ClassVar[str] = "rounded_gaussian"
    is_exact: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class DiscreteGaussianRelease(AdditiveRelease):
    """Discrete Gaussian noise, mass proportional to exp(-k^2 / 2 s^2) at k whole steps, on a value of whole steps.

    Guarantee: mu^2 / 2-zCDP with mu = l2_sensitivity / noise_std, for any number of coordinates that move together,
    and the gain of Poisson sampling that `lightning_dp.accounting.sampled_curve` proves. No exact curve is known for
    several coordinates: the one-dimensional privacy loss distribution does not bound them.

    Args:
        noise_std: The parameter s, in units of the value (the standard deviation is a little smaller).
        l2_sensitivity: As in `AdditiveRelease`.

    References:
        Canonne, Kamath and Steinke (2020), "The Discrete Gaussian for Differential Privacy", Theorem 4.
    """

    kind: ClassVar[str] = "discrete_gaussian"
    is_exact: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class TernaryRelease(GaussianRelease):
    """Noisy integer votes of which only above, between or below two thresholds leaves.

    Guarantee: post-processing of the Gaussian with the same noise and sensitivity, and strictly better in Renyi
    divergence: per coordinate the released symbol is a three-outcome channel of the vote. Valid only if nothing but
    the ternary vector leaves the aggregator (no noisy vote, no raw statistic).

    Args:
        noise_std: Standard deviation of the noise on each vote, > 0, in votes.
        l2_sensitivity: L2 sensitivity of the vote vector for the stated relation, in votes.
        threshold: Distance of both thresholds from zero, >= 0, in votes (beta * num_teachers).
        max_abs_vote: Largest possible absolute vote of a coordinate, >= 1 (the number of teachers).
        changes: Alternatives of what a neighbour can do at most: (coordinates moved by 2, coordinates moved by 1).
            For k signs per teacher: ``((k, 0), (0, 2 * k))``; mixtures lie between and need not be listed.

    Raises:
        ConfigurationError: A value is not finite or out of range, a change exceeds the possible votes, or
            `l2_sensitivity` is not the largest L2 norm of the listed changes.

    References:
        Wang et al. (2021) "DataLens", Algorithm 2 (thresholded aggregation).
    """

    kind: ClassVar[str] = "ternary"
    threshold: float
    max_abs_vote: int
    changes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold != 0 or isinstance(self.threshold, bool):
            object.__setattr__(self, "threshold", positive_float("TernaryRelease", "threshold", self.threshold))
        else:
            object.__setattr__(self, "threshold", 0.0)
        object.__setattr__(self, "max_abs_vote", whole_number("TernaryRelease", "max_abs_vote", self.max_abs_vote, 1))
        object.__setattr__(self, "changes", _parse_changes(self.changes))
        implied = math.sqrt(max(4 * by_two + by_one for by_two, by_one in self.changes))
        # Changes that explain less than the declared sensitivity would make the Renyi curve too small.
        if not math.isclose(implied, self.l2_sensitivity, rel_tol=1e-6):
            raise ConfigurationError(
                f"Expected TernaryRelease.l2_sensitivity to be the largest L2 norm of changes={self.changes}, which is "
                f"{implied!r}, got l2_sensitivity={self.l2_sensitivity!r}. State both for the same relation, in votes."
            )


def _parse_changes(changes: Any) -> tuple[tuple[int, int], ...]:
    """Return the alternatives as a tuple of integer pairs, none of them empty."""
    try:
        pairs = tuple(
            (whole_number("TernaryRelease", "changes", two, 0), whole_number("TernaryRelease", "changes", one, 0))
            for two, one in changes
        )
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        pairs = ()
    if not pairs or any(pair == (0, 0) for pair in pairs):
        raise ConfigurationError(
            "Expected TernaryRelease.changes to be pairs (coordinates moved by 2, coordinates moved by 1), at least "
            f"one pair and none of them (0, 0), got changes={changes!r}."
        )
    return pairs


@dataclass(frozen=True, kw_only=True)
class RoundedTernaryRelease(TernaryRelease):
    """Thresholded votes with Gaussian noise that was rounded to whole votes, drawn exactly.

    Guarantee: as `TernaryRelease`. A vote with rounded noise is above a whole t where the vote with noise is above
    t + 1/2, which is the threshold to state.
    """

    kind: ClassVar[str] = "rounded_ternary"
    is_exact: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class ZCDPRelease(Release):
    """A release known only by its zero-concentrated bound: Renyi divergence of order a at most a * rho.

    Guarantee: rho-zCDP for the stated relation (von Mises-Fisher noise, discrete Gaussian).

    Args:
        rho: Concentration parameter, > 0, dimensionless, for the stated relation.

    Raises:
        ConfigurationError: rho is NaN, infinite, zero or negative.
    """

    kind: ClassVar[str] = "zcdp"
    rho: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "rho", positive_float("ZCDPRelease", "rho", self.rho))


@dataclass(frozen=True, kw_only=True)
class VonMisesFisherRelease(Release):
    """Directions with density proportional to exp(<eta, y>) on the unit sphere, eta computed from the records.

    Guarantee: zero-concentrated with `rho`, pure with `pure_epsilon`, and with the Renyi curve of
    `lightning_dp.accounting.von_mises_fisher`, which is below both.

    Args:
        distance: Largest Euclidean distance between the natural parameters of neighbours for one draw, > 0, already for
            the stated relation (concentration times L2 sensitivity).
        dim: Dimension of the space around the sphere, >= 2.
        num_draws: Independent draws whose parameters one neighbouring step moves, >= 1.
        is_centred: Every natural parameter lies within distance / 2 of zero (each draw hides one bounded row); the
            worst pair is then opposite, and known exactly.

    Raises:
        ConfigurationError: A value is not finite or out of range.

    References:
        Weggenmann and Kerschbaum (2021); the bounds are derived in `lightning_dp.accounting.von_mises_fisher`.
    """

    kind: ClassVar[str] = "von_mises_fisher"
    distance: float
    dim: int
    num_draws: int = 1
    is_centred: bool = False

    def __post_init__(self) -> None:
        owner = type(self).__name__
        object.__setattr__(self, "distance", positive_float(owner, "distance", self.distance))
        object.__setattr__(self, "dim", whole_number(owner, "dim", self.dim, 2))
        object.__setattr__(self, "num_draws", whole_number(owner, "num_draws", self.num_draws, 1))
        if not isinstance(self.is_centred, bool):
            raise ConfigurationError(f"Expected {owner}.is_centred to be true or false, got {self.is_centred!r}.")

    @property
    def rho(self) -> float:
        """Concentration parameter of the zCDP bound."""
        return self.num_draws * self.distance * self.distance / (2 * self.dim)

    @property
    def pure_epsilon(self) -> float:
        """Bound on the log-likelihood ratio of one release.

        <eta - eta', y> is at most the distance, and so is the change of the log-normaliser, which drops out between
        the opposite points of a ball.
        """
        return self.num_draws * self.distance * (1 if self.is_centred else 2)


@dataclass(frozen=True, kw_only=True)
class NonPrivateRelease(Release):
    """A release without any guarantee: from the first one on, epsilon is infinite."""

    kind: ClassVar[str] = "non_private"


ReleaseEvent: TypeAlias = (
    GaussianRelease
    | RoundedGaussianRelease
    | DiscreteGaussianRelease
    | TernaryRelease
    | RoundedTernaryRelease
    | ZCDPRelease
    | VonMisesFisherRelease
    | SelectionRelease
    | NonPrivateRelease
)

"""The contract of every mechanism: encode each row within a proven bound, sum, perturb and release once.

A method describes its rows to the mechanism by a `ContributionSpec`, which holds public facts only. The sensitivity is
computed in one place (`Mechanism.l2_sensitivity`) from the mechanism's bounds on a row and the spec's list of what one
neighbouring step may do to the rows; nothing else in the project restates it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from typing import Any, ClassVar, Final, Literal, TypeAlias, final, get_args

import torch
from dp_accounting import NeighboringRelation
from torch import Tensor

from lightning_dp.accounting.events import (
    DiscreteGaussianRelease,
    GaussianRelease,
    NonPrivateRelease,
    ReleaseEvent,
    RoundedGaussianRelease,
)
from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.contributions import ContributionKind, ContributionSpec, RowChange
from lightning_dp.mechanisms.grid import whole_steps
from lightning_dp.mechanisms.noise import NoiseSource
from lightning_dp.mechanisms.plan import EncodeContext, ReleasePlan
from lightning_dp.mechanisms.rows import RowScaling, zero_non_finite

NoiseLaw: TypeAlias = Literal["gaussian", "rounded_gaussian", "discrete_gaussian"]

_LONG: Final = 2**18

_EVENTS: Final[dict[NoiseLaw, type[GaussianRelease | DiscreteGaussianRelease]]] = {
    "gaussian": GaussianRelease,
    "rounded_gaussian": RoundedGaussianRelease,
    "discrete_gaussian": DiscreteGaussianRelease,
}

__all__ = [
    "ContributionKind",
    "ContributionSpec",
    "EncodeContext",
    "Mechanism",
    "NoiseLaw",
    "ReleasePlan",
    "RowChange",
    "RowScaling",
    "zero_non_finite",
]


class Mechanism(ABC):
    """Turns rows of private contributions into one safe release.

    The value of a release goes through ``encode`` (each row by itself, within a bound), ``perturb_rows`` (local noise,
    none by default), a plain sum, ``measure`` (a deterministic map of the sum, the identity by default), ``perturb``
    (Gaussian noise on every coordinate by default) and ``decode`` (post-processing). Subclasses are final, one per
    file, and hold constructor options only, no tensors; what ``adapt`` sets is a function of perturbed values. One that
    draws other noise states another event.

    Class attributes:
        kinds: The kinds of contribution for which the mechanism has a proof.
        total_dtype: Accumulator of the sum over rows; exact for integers.
    """

    kinds: ClassVar[frozenset[ContributionKind]]
    total_dtype: ClassVar[torch.dtype] = torch.float64
    is_private: ClassVar[bool] = True
    noise: NoiseLaw = "gaussian"  # what `perturb` draws; a constructor option where encoded rows can lie on a grid

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a class that leaves open what it has a proof for."""
        super().__init_subclass__(**options)
        if not hasattr(cls, "kinds"):
            raise TypeError(
                f"Expected {cls.__name__}.kinds, a frozenset out of {', '.join(get_args(ContributionKind))}: the "
                "contributions for which the mechanism has a proof. Got none."
            )

    # What a mechanism states -----------------------------------------------------------------------------------------

    @abstractmethod
    def row_bound(self, spec: ContributionSpec) -> float:
        """Return how far in L2 norm the measured value moves at most when one row appears or disappears.

        Where nothing but the sum is measured, it is the joint norm, over all vectors that a row sends, which no encoded
        row exceeds.
        """

    def row_diameter(self, spec: ContributionSpec) -> float:
        """Return how far the measured value moves at most when one row changes arbitrarily.

        Twice the bound; less where no two encoded rows can be opposite.
        """
        return 2 * self.row_bound(spec)

    def encoded_dim(self, spec: ContributionSpec) -> int:
        """Return the numbers that one vector becomes when it is encoded."""
        return spec.vector_dim

    def public_basis(self, spec: ContributionSpec, *, release_number: int, public_seed: int) -> Tensor | None:
        """Return the orthonormal basis, (vector_dim, vector_dim), in which `encode` wants its rows; None for their own.

        A rotation of every vector, drawn from public numbers: bounds and sensitivities stay what they are. `decode`
        rotates back.

        Args:
            spec: Public facts about the rows.
            release_number: Number of the release in the ledger.
            public_seed: Seed of public randomness.
        """
        return None

    def grid_step(self, spec: ContributionSpec) -> float:
        """Return the step of which every measured value is a whole multiple; where `noise` is drawn in whole numbers.

        Raises:
            ConfigurationError: Measured values lie on no grid.
        """
        raise ConfigurationError(
            f"--mechanism {type(self).__name__} measures no whole numbers; mechanism.noise has to be gaussian."
        )

    # What a mechanism does -------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, rows: Tensor, spec: ContributionSpec, context: EncodeContext) -> Tensor:
        """Return rows within the bound.

        Args:
            rows: Private contributions, (num_rows, num_vectors, vector_dim), floating point. A vector with a
                non-finite entry must come out as zero.
            spec: Public facts about the rows.
            context: Public randomness and coins.

        Returns:
            Encoded rows, (num_rows, num_vectors, encoded_dim), of a dtype that sums exactly into `total_dtype`. Not
            safe to release.
        """

    def row_scaling(self, norms: Tensor, spec: ContributionSpec) -> RowScaling | None:
        """Return what `encode` does to rows of one vector with these norms; None if it looks at more than norms.

        Then rows need not exist: their norms and their weighted sum do. The guarantee is that of `encode` for norms
        that no row exceeds: a bound a little above the norm is as good. A mechanism with a scaling leaves
        `perturb_rows` and `public_basis` as they are.

        Args:
            norms: (num_rows,), float64; not finite where a row is not.
            spec: Public facts about the rows.
        """
        return None

    def perturb_rows(self, encoded: Tensor, plan: ReleasePlan, context: EncodeContext) -> Tensor:
        """Return the rows with local noise, each row's own; none by default.

        Called for private rows only, after the ledger was charged: public rows that pass the same encoding must not
        meet the same draws.

        Args:
            encoded: What `encode` returned, (num_rows, num_vectors, encoded_dim); may be overwritten.
            plan: The plan that the ledger was charged for.
            context: The secret source and the ids of the rows, by which draws are keyed.
        """
        return encoded

    def measure(self, total: Tensor, spec: ContributionSpec) -> Tensor:
        """Return the value that is perturbed, a function of the sum; `row_bound` and `row_diameter` speak of it.

        Args:
            total: Sum of the encoded rows, (num_vectors, encoded_dim), float64.
            spec: Public facts about the rows.
        """
        return total

    def perturb(self, measured: Tensor, plan: ReleasePlan, noise: NoiseSource, *, release_number: int) -> Tensor:
        """Return the measured value, which may be overwritten, with noise of `noise_std` on every coordinate.

        A mechanism that perturbs in another way states another event (`step_event`) and an equal `mean`.

        Args:
            measured: What `measure` returned, float64. Private.
            plan: The plan that the ledger was charged for.
            noise: The secret source.
            release_number: The number under which the ledger already holds this release.

        Returns:
            The shape of `measured`, float64; safe.
        """
        if self.noise != "gaussian":
            step, std = self.grid_step(plan.spec), self.noise_std(plan)
            whole = whole_steps(measured, step)
            whole += noise.whole(
                self.noise, tuple(whole.shape), scale=Fraction(std) / Fraction(step), release_number=release_number
            ).to(whole.device)
            return whole.to(torch.float64).mul_(step)
        std = self.noise_std(plan)
        if measured.numel() >= _LONG:  # longer than a batch is large: no second vector
            return noise.add_gaussian(measured, std=std, release_number=release_number)
        drawn = noise.gaussian(tuple(measured.shape), std=std, release_number=release_number)
        return drawn.to(measured.device).add_(measured)

    def mean(self, measured: Tensor, plan: ReleasePlan) -> Tensor:
        """Return the mean of what `decode` would be handed; for values computed from public rows only.

        Args:
            measured: What `measure` returned for public rows, float64.
            plan: The plan of the private rows.
        """
        return measured

    @abstractmethod
    def decode(self, noisy: Tensor, plan: ReleasePlan, release_number: int, public_seed: int) -> Tensor:
        """Return the usable direction from the perturbed value: post-processing with public quantities only.

        Args:
            noisy: What `perturb` returned, float64; may be overwritten.
            plan: The plan, whose `spec.rows_per_vector` divides a sum.
            release_number: Number of the release in the ledger, for public randomness.
            public_seed: Seed of public randomness.

        Returns:
            (num_vectors, vector_dim), floating point.
        """

    # What the project may ask of it ----------------------------------------------------------------------------------

    def adapt(self, noisy: Tensor, plan: ReleasePlan) -> None:
        """Set what the next release uses, from this one's perturbed value: post-processing. Nothing by default.

        Args:
            noisy: What `perturb` returned; `decode` may have overwritten it.
            plan: The plan of the run.
        """
        return

    def as_released(self) -> AbstractContextManager[None]:
        """Encode and decode as in the release made last, for public rows that are compared with it; nothing to do."""
        return nullcontext()

    def forget(self) -> None:
        """Drop what `adapt` has set: another run's ledger holds no release from which it was computed."""
        return

    def state_dict(self) -> dict[str, float]:
        """Return what `adapt` has set, for checkpoints; empty for a mechanism that does not adapt."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ConfigurationError: The state is that of another mechanism.
        """
        if state:
            raise ConfigurationError(
                f"The checkpoint holds {', '.join(state)} of an adaptive mechanism, but --mechanism "
                f"{type(self).__name__} does not adapt. Resume with the mechanism of the run."
            )

    @final
    def l2_sensitivity(self, spec: ContributionSpec, relation: NeighboringRelation) -> float:
        """Return how far the measured value can move between neighbours under `relation`.

        Args:
            spec: Public facts about the rows.
            relation: The neighbouring relation.

        Raises:
            ConfigurationError: The method has no proof under this relation.
        """
        bound, diameter = self.row_bound(spec), self.row_diameter(spec)
        return max(change.distance(bound=bound, diameter=diameter) for change in spec.alternatives(relation))

    @final
    def noise_std(self, plan: ReleasePlan) -> float:
        """Return the absolute noise std of a release under `plan`; zero for a mechanism without privacy."""
        if not self.is_private:
            return 0.0
        return plan.noise_multiplier * self.l2_sensitivity(plan.spec, plan.relation)

    @final
    def release(
        self,
        total: Tensor,
        plan: ReleasePlan,
        noise: NoiseSource,
        *,
        release_number: int,
        public_seed: int,
        may_overwrite: bool = False,
    ) -> Tensor:
        """Perturb what is measured of the summed rows, once, and decode.

        Args:
            total: Sum of the encoded rows over chunks and ranks, (num_vectors, encoded_dim), `total_dtype`.
            plan: The plan that the ledger was charged for.
            noise: The secret noise source.
            release_number: The number under which the ledger already holds this release.
            public_seed: Seed of public randomness.
            may_overwrite: Whether the caller is done with the total; spares a copy of it.

        Returns:
            The released direction, (num_vectors, vector_dim), float32; safe.
        """
        value = self.measure(total.to(torch.float64, copy=not may_overwrite), plan.spec)
        if self.is_private:
            value = self.perturb(value, plan, noise, release_number=release_number)
        released = self.decode(value, plan, release_number, public_seed).to(torch.float32)
        self.adapt(value, plan)
        return released

    @final
    def reference(self, total: Tensor, plan: ReleasePlan, *, release_number: int, public_seed: int) -> Tensor:
        """Return the mean of a release, or what comes nearest to it, for a sum of *public* rows.

        Args:
            total: Sum of encoded public rows, (num_vectors, encoded_dim), scaled to the number of private rows.
            plan: The plan of the private rows.
            release_number: The release whose public randomness is used.
            public_seed: Seed of public randomness.

        Returns:
            (num_vectors, vector_dim), float32; public.
        """
        value = self.mean(self.measure(total.to(torch.float64), plan.spec), plan)
        return self.decode(value, plan, release_number, public_seed).to(torch.float32)

    def step_event(self, plan: ReleasePlan) -> ReleaseEvent:
        """Return the event of one release; takes no tensor, so the price cannot depend on data."""
        if not self.is_private:
            return NonPrivateRelease()
        return _EVENTS[self.noise](
            noise_std=self.noise_std(plan), l2_sensitivity=self.l2_sensitivity(plan.spec, plan.relation)
        )

    def check(self, spec: ContributionSpec) -> None:
        """Refuse contributions for which this mechanism has no proof.

        Raises:
            ConfigurationError: The kind is not supported, or the options do not fit the vectors.
        """
        if spec.kind not in self.kinds:
            raise ConfigurationError(
                f"--mechanism {type(self).__name__} has no proof for {spec.kind} contributions; "
                f"it supports: {', '.join(sorted(self.kinds))}."
            )
        if self.noise != "gaussian":
            self.grid_step(spec)

    def other_statements(self, plan: ReleasePlan) -> tuple[str, ...]:
        """Return what else can be said of one release, in words: never an (epsilon, delta), which is the ledger's."""
        return ()

    def describe(self) -> dict[str, Any]:
        """Return the constructor options, JSON-ready, for the run card."""
        options = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        return {"mechanism": type(self).__name__, **options}

"""The contract of every mechanism: encode each row within a proven bound, sum, release once.

A method describes its rows to the mechanism by a `ContributionSpec`, which holds public facts only. The sensitivity is
computed in one place (`Mechanism.l2_sensitivity`) from the mechanism's bound on a row and the spec's list of what one
neighbouring step may do to the rows; nothing else in the project restates it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from dp_accounting import NeighboringRelation
from torch import Tensor

from lightning_dp.accounting.events import GaussianRelease, NonPrivateRelease, ReleaseEvent, relation_name
from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.noise import NoiseSource

ContributionKind = Literal["record", "teacher", "joint"]

_ADD_REMOVE = NeighboringRelation.ADD_OR_REMOVE_ONE
_REPLACE = NeighboringRelation.REPLACE_ONE
_ZERO_OUT = NeighboringRelation.REPLACE_SPECIAL


@dataclass(frozen=True, kw_only=True)
class RowChange:
    """One way in which a neighbouring data set can differ in the rows of a release.

    Attributes:
        num_replaced: Rows that move between two arbitrary values inside the bound: distance up to twice the bound.
        num_toggled: Rows that appear or disappear (an absent row contributes zero): distance up to the bound.
    """

    num_replaced: int = 0
    num_toggled: int = 0

    def distance(self, row_bound: float) -> float:
        """Return the L2 distance that the sum of rows can move, for rows within `row_bound`.

        The squares add, and not the distances, because the rows of one change send their vectors to disjoint parts of
        the release (`ContributionSpec.changes` demands it).
        """
        return math.sqrt(4 * self.num_replaced + self.num_toggled) * row_bound


@dataclass(frozen=True, kw_only=True)
class ContributionSpec:
    """Public facts about the rows of one release; holds no tensor and nothing computed from private records.

    Attributes:
        kind: Where the rows come from.
        unit: The privacy unit in words, as the claim prints it.
        vectors_per_row: How many vectors one row sends in one release (fake images it judges), >= 1.
        vector_dim: Length of one such vector.
        rows_per_vector: Public (nominal) number of rows that judge one vector: the divisor of the released sum.
        max_rows_per_vector: No more rows than this can judge one vector, whatever the data; None where unbounded.
        changes: For each relation with a proof, the alternatives of what one neighbouring step does to the rows.
            The rows of one alternative must send their vectors to disjoint parts of the release.
        sampling_note: How the rows reach the release, for the claim.
    """

    kind: ContributionKind
    unit: str
    vectors_per_row: int
    vector_dim: int
    rows_per_vector: float
    max_rows_per_vector: int | None
    changes: Mapping[NeighboringRelation, tuple[RowChange, ...]]
    sampling_note: str = "every row takes part in every release"

    @classmethod
    def teachers(
        cls, *, num_teachers: int, vectors_per_row: int, vector_dim: int, partition: Literal["permutation", "hash"]
    ) -> "ContributionSpec":
        """Describe teachers that all judge all fake images; each record sits with exactly one teacher.

        A record reaches one teacher, which still votes when the record is gone, so every supported relation moves one
        row arbitrarily: 2 sqrt(k) per image for votes (teacher_gans, adjacency table). A fixed permutation of slots
        proves replace-one and replace-special (the record becomes empty); a keyed hash of record ids, in which no
        other record moves when one leaves, proves add-or-remove-one too.
        """
        one = (RowChange(num_replaced=1),)
        changes = {_REPLACE: one, _ZERO_OUT: one}
        if partition == "hash":
            changes[_ADD_REMOVE] = one
        return cls(
            kind="teacher",
            unit="record (through the one teacher that holds it)",
            vectors_per_row=vectors_per_row,
            vector_dim=vector_dim,
            rows_per_vector=float(num_teachers),
            max_rows_per_vector=num_teachers,
            changes=changes,
        )

    @classmethod
    def class_wise_teachers(
        cls,
        *,
        num_teachers: int,
        num_classes: int,
        images_per_class: int,
        vector_dim: int,
        single_record: bool,
        partition: Literal["permutation", "hash"],
    ) -> "ContributionSpec":
        """Describe a separate stateless teacher per (shard, label) that judges only the images of its own label.

        It abstains when it holds no record of its label. Replacing a record by one of the same label moves one row
        arbitrarily; by one of another label, two rows, which judge disjoint images. With exactly one record per shard
        the second case is one row falling silent and one starting to speak.

        Args:
            num_teachers: Shards.
            num_classes: Labels, public.
            images_per_class: Fixed public number of fake images of each label in a release.
            vector_dim: Length of the vector judged per image.
            single_record: Every shard holds exactly one record.
            partition: How records were dealt to shards.
        """
        if single_record:
            replace = (RowChange(num_replaced=1), RowChange(num_toggled=2))
            leave = (RowChange(num_toggled=1),)
        else:
            replace = (RowChange(num_replaced=1), RowChange(num_replaced=2))
            leave = (RowChange(num_replaced=1),)
        changes = {_REPLACE: replace, _ZERO_OUT: leave}
        if partition == "hash":
            changes[_ADD_REMOVE] = leave
        return cls(
            kind="teacher",
            unit="record (through the one teacher that holds it)",
            vectors_per_row=images_per_class,
            vector_dim=vector_dim,
            rows_per_vector=num_teachers / num_classes if single_record else float(num_teachers),
            max_rows_per_vector=num_teachers,
            changes=changes,
        )

    @classmethod
    def records(cls, *, expected_batch_size: float, vector_dim: int) -> "ContributionSpec":
        """Describe per-record gradients: an absent record contributes zero."""
        toggled = (RowChange(num_toggled=1),)
        return cls(
            kind="record",
            unit="record",
            vectors_per_row=1,
            vector_dim=vector_dim,
            rows_per_vector=expected_batch_size,
            max_rows_per_vector=None,
            changes={_ADD_REMOVE: toggled, _ZERO_OUT: toggled, _REPLACE: (RowChange(num_replaced=1),)},
        )

    @classmethod
    def joint(cls, *, num_vectors: int, vector_dim: int) -> "ContributionSpec":
        """Describe one gradient that couples all records: any change moves it anywhere in the ball.

        Replace-one is left out: under Poisson sampling, accountants take half of its sensitivity as the distance that a
        record's absence makes, and a joint gradient moves by the whole 2C when a record is absent.
        """
        moved = (RowChange(num_replaced=1),)
        return cls(
            kind="joint",
            unit="record",
            vectors_per_row=num_vectors,
            vector_dim=vector_dim,
            rows_per_vector=1.0,
            max_rows_per_vector=1,
            changes={_ADD_REMOVE: moved, _ZERO_OUT: moved},
        )

    def alternatives(self, relation: NeighboringRelation) -> tuple[RowChange, ...]:
        """Return what one neighbouring step may do under `relation`.

        Raises:
            ConfigurationError: The method has no proof under this relation.
        """
        if relation not in self.changes:
            known = ", ".join(sorted(relation_name(r) for r in self.changes))
            raise ConfigurationError(
                f"privacy.neighboring_relation={relation_name(relation)} has no proof for these contributions; "
                f"choose one of: {known}. (add_or_remove_one needs --model.partition hash for teachers.)"
            )
        return self.changes[relation]


@dataclass(frozen=True, kw_only=True)
class ReleasePlan:
    """What is fixed before the first release: the rows, the relation and the noise.

    Attributes:
        spec: Public facts about the rows.
        relation: The neighbouring relation of the claim.
        noise_multiplier: Noise std / L2 sensitivity under `relation`, dimensionless.
    """

    spec: ContributionSpec
    relation: NeighboringRelation
    noise_multiplier: float

    def __post_init__(self) -> None:
        value = float(self.noise_multiplier)
        if not (math.isfinite(value) and value > 0):
            raise ConfigurationError(
                f"Expected a finite privacy.noise_multiplier > 0, got {self.noise_multiplier}. "
                "Use --mechanism NoPrivacy for a run without noise."
            )
        object.__setattr__(self, "noise_multiplier", value)


@dataclass(frozen=True, kw_only=True)
class EncodeContext:
    """What `Mechanism.encode` may use besides the rows: public randomness, and coins that no observer knows.

    Attributes:
        release_number: Number of the release in the ledger.
        public_seed: Seed of public randomness (projections, rotations); reproducible and data-independent.
        noise: The secret source, for coins.
        row_ids: Stable id of each row (teacher number), so that coins do not depend on chunking.
        first_vector: Index, in the whole release, of the first vector that these rows judge.
    """

    release_number: int
    public_seed: int
    noise: NoiseSource
    row_ids: Tensor
    first_vector: int = 0


class Mechanism(ABC):
    """Turns rows of private contributions into one safe release.

    Subclasses are final, one per file, and hold constructor options only: no state, no tensors.

    Class attributes:
        needs: What phase 1 consumes: per-row tensors, only their norms, or one sum.
        kinds: The kinds of contribution for which the mechanism has a proof.
        total_dtype: Accumulator of the sum over rows; exact for integers.
    """

    needs: ClassVar[Literal["norms", "rows", "sum"]] = "rows"
    kinds: ClassVar[frozenset[ContributionKind]]
    total_dtype: ClassVar[torch.dtype] = torch.float64
    is_private: ClassVar[bool] = True

    @abstractmethod
    def row_bound(self, spec: ContributionSpec) -> float:
        """Return the joint L2 norm that one encoded row cannot exceed, over all vectors it sends."""

    @abstractmethod
    def encode(self, rows: Tensor, spec: ContributionSpec, context: EncodeContext) -> Tensor:
        """Return rows within the bound.

        Args:
            rows: Private contributions, (num_rows, num_vectors, vector_dim), floating point. A vector with a
                non-finite entry must come out as zero.
            spec: Public facts about the rows.
            context: Public randomness and coins.

        Returns:
            Encoded rows, same shape, of a dtype that sums exactly into `total_dtype`. Not safe to release.
        """

    @abstractmethod
    def decode(self, noisy_total: Tensor, plan: ReleasePlan, release_number: int, public_seed: int) -> Tensor:
        """Return the usable direction from the noisy sum: post-processing with public quantities only."""

    @final
    def l2_sensitivity(self, spec: ContributionSpec, relation: NeighboringRelation) -> float:
        """Return how far the clean sum can move between neighbours under `relation`."""
        bound = self.row_bound(spec)
        return max(change.distance(bound) for change in spec.alternatives(relation))

    @final
    def noise_std(self, plan: ReleasePlan) -> float:
        """Return the absolute noise std of a release under `plan`; zero for a mechanism without privacy."""
        if not self.is_private:
            return 0.0
        return plan.noise_multiplier * self.l2_sensitivity(plan.spec, plan.relation)

    @final
    def release(
        self, total: Tensor, plan: ReleasePlan, noise: NoiseSource, *, release_number: int, public_seed: int
    ) -> Tensor:
        """Add noise once to every coordinate of the summed rows and decode.

        Args:
            total: Sum of the encoded rows over chunks and ranks, (num_vectors, vector_dim), `total_dtype`.
            plan: The plan that the ledger was charged for.
            noise: The secret noise source.
            release_number: The number under which the ledger already holds this release.
            public_seed: Seed of public randomness.

        Returns:
            The released direction, float32, shape of `total`; safe.
        """
        noisy = total.to(torch.float64)
        if self.is_private:
            drawn = noise.gaussian(tuple(total.shape), std=self.noise_std(plan), release_number=release_number)
            noisy = noisy + drawn.to(total.device)
        return self.decode(noisy, plan, release_number, public_seed).to(torch.float32)

    def step_event(self, plan: ReleasePlan) -> ReleaseEvent:
        """Return the event of one release; takes no tensor, so the price cannot depend on data."""
        if not self.is_private:
            return NonPrivateRelease()
        return GaussianRelease(
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

    def describe(self) -> dict[str, Any]:
        """Return the constructor options, JSON-ready, for the run card."""
        options = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        return {"mechanism": type(self).__name__, **options}


def zero_non_finite(rows: Tensor) -> Tensor:
    """Return `rows` with every vector that holds a NaN or an infinity replaced by zeros.

    A factor of zero would not do (0 * NaN is NaN), so the values are selected, not multiplied.
    """
    if bool(torch.isfinite(rows.sum())):  # one pass: a NaN or an infinity anywhere makes the sum one
        return rows
    finite = torch.isfinite(rows).all(dim=-1, keepdim=True)
    return torch.where(finite, rows, torch.zeros((), dtype=rows.dtype, device=rows.device))

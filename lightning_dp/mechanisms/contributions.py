"""What a method says of the rows it contributes: public facts, from which every sensitivity follows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dp_accounting import NeighboringRelation

from lightning_dp.accounting.events import relation_name
from lightning_dp.errors import ConfigurationError

ContributionKind = Literal["record", "teacher", "joint", "statistic"]

_ADD_REMOVE = NeighboringRelation.ADD_OR_REMOVE_ONE
_REPLACE = NeighboringRelation.REPLACE_ONE
_ZERO_OUT = NeighboringRelation.REPLACE_SPECIAL


@dataclass(frozen=True, kw_only=True)
class RowChange:
    """One way in which a neighbouring data set can differ in the rows of a release.

    Attributes:
        num_replaced: Rows that move between two arbitrary values inside the bound: distance up to the diameter.
        num_toggled: Rows that appear or disappear (an absent row contributes zero): distance up to the bound.
    """

    num_replaced: int = 0
    num_toggled: int = 0

    def distance(self, *, bound: float, diameter: float) -> float:
        """Return the L2 distance that a release can move.

        The squares add, and not the distances, because the rows of one change send their vectors to disjoint parts of
        the release (`ContributionSpec.changes` demands it).

        Args:
            bound: How far one row moves it that appears or disappears.
            diameter: How far one row moves it that changes arbitrarily.
        """
        return math.hypot(*[diameter] * self.num_replaced, *[bound] * self.num_toggled)


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
        num_vectors: How many vectors a release holds, over all rows.
        has_fixed_rows: Whether the same rows take part whatever the data: one without anything to say sends zeros.
        segments: Lengths of the layers that a vector joins end to end; None where it has no layers.
        rows_never_oppose: Whether no two rows can hold vectors with a negative inner product in the same place. A row
            that changes then moves a sum no further than two that appear, by sqrt 2 bounds instead of two; for
            mechanisms that scale vectors and do nothing else to them.
        is_undercharged: Whether rows send more vectors than `vectors_per_row`, as published accountings have it; no
            claim may rest on such a charge.
    """

    kind: ContributionKind
    unit: str
    vectors_per_row: int
    vector_dim: int
    rows_per_vector: float
    max_rows_per_vector: int | None
    changes: Mapping[NeighboringRelation, tuple[RowChange, ...]]
    num_vectors: int
    has_fixed_rows: bool = True
    segments: tuple[int, ...] | None = None
    rows_never_oppose: bool = False
    is_undercharged: bool = False

    @classmethod
    def teachers(cls, *, num_teachers: int, vectors_per_row: int, vector_dim: int) -> "ContributionSpec":
        """Describe teachers that all judge all fake images; each record sits with exactly one teacher.

        A record reaches one teacher, which still votes when the record is gone, so every supported relation moves one
        row arbitrarily: 2 sqrt(k) per image for votes (teacher_gans, adjacency table). Both partitions prove
        replace-one and replace-special (the record becomes empty), under which the number of records N stays.

        Add-or-remove-one has no proof, not even under a keyed hash: ids are positions in the file, so the records
        behind one that leaves would change their teachers, and the batch of every trained teacher follows N. Wanted
        are stable record ids and a batch size that does not depend on N.

        Args:
            num_teachers: Teachers, public.
            vectors_per_row: Fake images of a release.
            vector_dim: Length of the vector judged per image.
        """
        one = (RowChange(num_replaced=1),)
        return cls(
            kind="teacher",
            unit="record (through the one teacher that holds it)",
            vectors_per_row=vectors_per_row,
            vector_dim=vector_dim,
            rows_per_vector=float(num_teachers),
            max_rows_per_vector=num_teachers,
            changes={_REPLACE: one, _ZERO_OUT: one},
            num_vectors=vectors_per_row,
        )

    @classmethod
    def sampled_teachers(
        cls, *, num_teachers: int, expected_judges: float, vectors_per_row: int, vector_dim: int
    ) -> "ContributionSpec":
        """Describe teachers of which each judges a release by a secret coin of its own (Poisson sampling of teachers).

        A teacher's state must be a function of its records, of public draws and of what was released: given those, the
        coins of a release are fresh, and the record's teacher joins with probability q = expected_judges /
        num_teachers. One draw serves all images of the release, so they are one vector of `vectors_per_row` images;
        charging each image as if its judges had been drawn for it alone is not sound (generators, section 3.2).

        Replace-one only, and no smaller than twice the distance that the teacher's absence makes: accountants of
        sampled replace-one take half of the sensitivity for that distance. Twice a bound is what four rows make that
        are switched on; for mechanisms whose rows are less than two bounds apart it is the larger number. Under
        zero-out the teacher still votes, and no accountant at hand knows that pair.

        Args:
            num_teachers: Teachers, public.
            expected_judges: Mean number of them that judge, public: the divisor of the sum.
            vectors_per_row: Images of a release.
            vector_dim: Length of the vector judged per image.
        """
        return cls(
            kind="teacher",
            unit="record (through the one teacher that holds it)",
            vectors_per_row=vectors_per_row,
            vector_dim=vector_dim,
            rows_per_vector=expected_judges,
            max_rows_per_vector=num_teachers,
            changes={_REPLACE: (RowChange(num_replaced=1), RowChange(num_toggled=4))},
            num_vectors=vectors_per_row,
            has_fixed_rows=False,  # the coins decide who speaks
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
    ) -> "ContributionSpec":
        """Describe a separate stateless teacher per (shard, label) that judges only the images of its own label.

        It abstains when it holds no record of its label. Replacing a record by one of the same label moves one row
        arbitrarily; by one of another label, two rows, which judge disjoint images. With exactly one record per shard
        the second case is one row falling silent and one starting to speak. Add-or-remove-one has no proof, for the
        reasons given in `teachers`.

        Args:
            num_teachers: Shards.
            num_classes: Labels, public.
            images_per_class: Fixed public number of fake images of each label in a release.
            vector_dim: Length of the vector judged per image.
            single_record: Every shard holds exactly one record.
        """
        if single_record:
            replace = (RowChange(num_replaced=1), RowChange(num_toggled=2))
            leave = (RowChange(num_toggled=1),)
        else:
            replace = (RowChange(num_replaced=1), RowChange(num_replaced=2))
            leave = (RowChange(num_replaced=1),)
        return cls(
            kind="teacher",
            unit="record (through the one teacher that holds it)",
            vectors_per_row=images_per_class,
            vector_dim=vector_dim,
            rows_per_vector=num_teachers / num_classes if single_record else float(num_teachers),
            max_rows_per_vector=num_teachers,
            changes={_REPLACE: replace, _ZERO_OUT: leave},
            num_vectors=images_per_class * num_classes,
            has_fixed_rows=False,  # who holds a record of a label decides who speaks
        )

    @classmethod
    def records(
        cls, *, expected_batch_size: float, vector_dim: int, segments: tuple[int, ...] | None = None
    ) -> "ContributionSpec":
        """Describe per-record gradients: an absent record contributes zero.

        Args:
            expected_batch_size: Mean number of records of a step, public: the divisor of the sum.
            vector_dim: Entries of a gradient.
            segments: Lengths of its layers, end to end; None where it has none.
        """
        toggled = (RowChange(num_toggled=1),)
        return cls(
            kind="record",
            unit="record",
            vectors_per_row=1,
            vector_dim=vector_dim,
            rows_per_vector=expected_batch_size,
            max_rows_per_vector=None,
            changes={_ADD_REMOVE: toggled, _ZERO_OUT: toggled, _REPLACE: (RowChange(num_replaced=1),)},
            num_vectors=1,
            segments=segments,
        )

    @classmethod
    def joint(cls, *, num_vectors: int, vector_dim: int) -> "ContributionSpec":
        """Describe one gradient that couples all records: any change moves it anywhere in the ball.

        Replace-one is left out: under Poisson sampling, accountants take half of its sensitivity as the distance that a
        record's absence makes, and a joint gradient moves by the whole 2C when a record is absent.

        Args:
            num_vectors: Parts that the mechanism bounds by themselves.
            vector_dim: Length of a part.
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
            num_vectors=num_vectors,
        )

    @classmethod
    def statistics(cls, *, num_cells: int, vector_dim: int, rows_never_oppose: bool = False) -> "ContributionSpec":
        """Describe a table of sums over records: each record sends one vector to one cell of its own choice.

        Nothing but the record itself decides cell and vector, and a release is the plain sum, whatever the number of
        records. A record that leaves takes its vector with it; one that changes moves its vector within its cell, or
        from one cell to another.

        Args:
            num_cells: Cells of the table, public.
            vector_dim: Length of a vector.
            rows_never_oppose: Whether vectors of one cell never have a negative inner product.
        """
        toggled = (RowChange(num_toggled=1),)
        replaced = (RowChange(num_replaced=1), RowChange(num_toggled=2))
        return cls(
            kind="statistic",
            unit="record",
            vectors_per_row=1,
            vector_dim=vector_dim,
            rows_per_vector=1.0,
            max_rows_per_vector=None,
            changes={_ADD_REMOVE: toggled, _ZERO_OUT: toggled, _REPLACE: replaced},
            num_vectors=num_cells,
            has_fixed_rows=False,
            rows_never_oppose=rows_never_oppose,
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
                f"choose one of: {known}."
                + " (For teachers, add_or_remove_one lacks stable record ids and a batch size that does not follow the "
                "number of records.)" * (self.kind == "teacher")
            )
        return self.changes[relation]

"""Teachers without parameters: each (shard, label) pulls the fakes of its label towards its own records."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.ranks import ALONE, Ranks
from lightning_dp.gradients.teachers import Encoder, FakeSource, RowChunk, RowStructure, TeacherEnsemble, TeacherShards
from lightning_dp.losses.energy import unit_directions


class PublicShapes:
    """Targets and points of one release, whole, and the same in another basis, computed once.

    A matrix product rounds a row in a way that depends on how many rows there are. Here that is the public number of
    records, whatever their labels. Cut by class first, and a record that changes its label moves the last bits of
    other records, whose signs may follow. So: rotate all, then select.

    Args:
        targets: (N, d), in record order. Private where they are records.
        points: (B, d), public.
    """

    def __init__(self, targets: Tensor, points: Tensor) -> None:
        self._own = (targets, points)
        self._basis: Tensor | None = None
        self._rotated = self._own

    def within(self, basis: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return targets and points in a basis, (d, d); in their own if it is None."""
        if basis is None:
            return self._own
        if self._basis is not basis:
            targets, points = self._own
            rotation = basis.to(targets)
            self._basis, self._rotated = basis, (targets @ rotation, points @ rotation)
        return self._rotated


class DirectionChunk(RowChunk):
    """Unit vectors from some points to some targets, computed when they are asked for; means over each teacher's own.

    Args:
        teacher_ids: Teacher of each target, int64, (n,), sorted.
        queries: The points that are judged.
        shapes: All targets and points of the release.
        selected: Positions of the n targets among all, (n,).
        is_mean: Whether a teacher's targets make one row (their mean direction) instead of a row each.
    """

    _owners: Tensor
    _shapes: PublicShapes
    _selected: Tensor
    _is_mean: bool

    def __init__(
        self, teacher_ids: Tensor, queries: slice, *, shapes: PublicShapes, selected: Tensor, is_mean: bool
    ) -> None:
        # The base class is frozen; `values` is computed instead of being kept.
        ids = torch.unique_consecutive(teacher_ids) if is_mean else teacher_ids
        fields = {"teacher_ids": ids, "queries": queries, "_owners": teacher_ids, "_shapes": shapes}
        for name, value in {**fields, "_selected": selected, "_is_mean": is_mean}.items():
            object.__setattr__(self, name, value)

    @property
    def values(self) -> Tensor:
        """The rows, (n, q, d)."""
        return self._rows(None)

    @override
    def in_basis(self, basis: Tensor) -> Tensor:
        return self._rows(basis)

    def _rows(self, basis: Tensor | None) -> Tensor:
        targets, points = self._shapes.within(basis)
        rows = unit_directions(targets[self._selected], points[self.queries])
        if not self._is_mean:
            return rows
        _, index, counts = torch.unique_consecutive(self._owners, return_inverse=True, return_counts=True)
        sums = torch.zeros(len(counts), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
        return sums.index_add_(0, index, rows) / counts[:, None, None]


class EnergyTeachers(TeacherEnsemble):
    """Critics of the energy distance, one per shard and label, without state.

    The row of a teacher for a fake x of its label is the mean unit vector from x to its records: the private half of
    the energy distance's gradient (`lightning_dp.losses.energy`). A teacher without a record of the label abstains.
    Nothing is trained, so nothing can leak between teachers.

    Args:
        num_teachers: Number of shards; null gives every record a teacher of its own, which halves the squared
            sensitivity under replace-one (a record that changes its label silences one row and starts another).
        chunk_size: Rows handled at a time, >= 1; bounds memory and changes nothing else.

    Raises:
        ConfigurationError: A number is out of range.
    """

    def __init__(self, *, num_teachers: int | None = None, chunk_size: int = 512) -> None:
        for name, value in (("num_teachers", num_teachers), ("chunk_size", chunk_size)):
            if value is not None and value < 1:
                raise ConfigurationError(f"Expected teachers.{name} >= 1, got {name}={value}.")
        self.is_single_record = num_teachers is None
        self.num_teachers = num_teachers or 0
        self.chunk_size = chunk_size
        self._records = torch.empty(0)
        self._positions: list[Tensor] = []
        self._owners: list[Tensor] = []

    @override
    def bind(
        self,
        shards: TeacherShards,
        *,
        num_classes: int,
        image_shape: tuple[int, int, int],
        device: torch.device | str,
        seed: int,
        encode: Encoder | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        if self.is_single_record and not (shards.is_single_record and shards.num_teachers == shards.num_records):
            raise ConfigurationError(
                f"Expected one record per teacher, got {shards.num_records} records, {shards.num_teachers} teachers; "
                "set teachers.num_teachers for larger shards."
            )
        self.num_teachers = shards.num_teachers
        owned = ranks.owned(self.num_teachers)
        shards = shards.part(owned).to(device)
        # In parts of a public size, in record order (see PublicShapes).
        self._records = torch.cat([_encode(part, encode) for part in shards.images.split(4096)]).to(device)  # (N, d)
        labels, owners = shards.labels.to(device), owned.start + owned.step * shards.assignment.to(device)
        self._positions, self._owners = [], []
        for label in range(num_classes):
            (mine,) = torch.nonzero(labels == label, as_tuple=True)
            order = mine[torch.argsort(owners[mine], stable=True)]
            self._positions.append(order)
            self._owners.append(owners[order].contiguous())

    @override
    def row_bytes(self, num_images: int, vector_dim: int, *, num_records: int, num_classes: int) -> int:
        at_once = min(self.chunk_size, max(1, num_records // num_classes))  # some label has as many records
        return at_once * super().row_bytes(num_images // num_classes, vector_dim, num_records=0, num_classes=0)

    @override
    def train(self, make_fakes: FakeSource, *, step: int) -> None:
        """Do nothing: the teachers have no parameters."""

    @override
    def row_chunks(self, fakes: Tensor, labels: Tensor, judges: Tensor | None = None) -> Iterator[RowChunk]:
        if judges is not None:
            raise ConfigurationError("EnergyTeachers all speak in every release; leave model.expected_judges out.")
        shapes = PublicShapes(self._records, fakes.flatten(1))
        for label, (positions, owners) in enumerate(zip(self._positions, self._owners, strict=True)):
            queries = _block_of(labels, label)
            if queries is None:
                continue
            for part in self._parts(owners):
                yield DirectionChunk(
                    owners[part],
                    queries,
                    shapes=shapes,
                    selected=positions[part],
                    is_mean=not self.is_single_record,
                )

    def _parts(self, owners: Tensor) -> Iterator[slice]:
        """Cut records, sorted by teacher, into chunks that never split a teacher."""
        start = 0
        while start < len(owners):
            stop = min(start + self.chunk_size, len(owners))
            while stop < len(owners) and owners[stop] == owners[stop - 1]:
                stop += 1
            yield slice(start, stop)
            start = stop

    @override
    def row_structure(self, num_images: int) -> RowStructure:
        return RowStructure(images_per_row=num_images, class_wise=True, single_record=self.is_single_record)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: the teachers have no state."""


def _encode(images: Tensor, encode: Encoder | None) -> Tensor:
    pixels = images.float() / 255
    return (pixels if encode is None else encode(pixels)).flatten(1)


def _block_of(labels: Tensor, label: int) -> slice | None:
    """Return where the fakes of one label stand; class-wise batches are sorted by label."""
    (where,) = torch.nonzero(labels == label, as_tuple=True)
    if len(where) == 0:
        return None
    first, last = int(where[0]), int(where[-1])
    if last - first + 1 != len(where):
        raise ConfigurationError("Expected the labels of a class-wise batch to be sorted; got fakes of a label apart.")
    return slice(first, last + 1)

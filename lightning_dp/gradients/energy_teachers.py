"""Teachers without parameters: each (shard, label) pulls the fakes of its label towards its own records."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.teachers import Encoder, FakeSource, RowChunk, RowStructure, TeacherEnsemble, TeacherShards
from lightning_dp.losses.energy import unit_directions


class DirectionChunk(RowChunk):
    """Rows that are unit vectors from points to targets, computed when they are asked for. Private.

    A change of basis is applied to targets and points, which are far fewer than their pairs.

    Args:
        teacher_ids: int64, (n,).
        queries: The images that the points stand for.
        targets: (n, d). Private where they are records.
        points: (q, d).
    """

    _targets: Tensor
    _points: Tensor

    def __init__(self, teacher_ids: Tensor, queries: slice, *, targets: Tensor, points: Tensor) -> None:
        # The base class is frozen; `values` is computed here instead of being kept.
        for name, value in (("teacher_ids", teacher_ids), ("queries", queries)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_targets", targets)
        object.__setattr__(self, "_points", points)

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """The rows, (n, q, d)."""
        return unit_directions(self._targets, self._points)

    @override
    def in_basis(self, basis: Tensor) -> Tensor:
        rotation = basis.to(self._targets)
        return unit_directions(self._targets @ rotation, self._points @ rotation)


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
        self._records: list[Tensor] = []
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
    ) -> None:
        if self.is_single_record and not (shards.is_single_record and shards.num_teachers == shards.num_records):
            raise ConfigurationError(
                f"Expected one record per teacher, got {shards.num_records} records, {shards.num_teachers} teachers; "
                "set teachers.num_teachers for larger shards."
            )
        self.num_teachers = shards.num_teachers
        native = torch.cat([_encode(part, encode) for part in shards.images.split(4096)]).to(device)  # (N, d)
        labels, owners = shards.labels.to(device), shards.assignment.to(device)
        self._records, self._owners = [], []
        for label in range(num_classes):
            (mine,) = torch.nonzero(labels == label, as_tuple=True)
            order = mine[torch.argsort(owners[mine], stable=True)]
            self._records.append(native[order].contiguous())
            self._owners.append(owners[order].contiguous())

    @override
    def train(self, make_fakes: FakeSource, *, step: int) -> None:
        """Do nothing: the teachers have no parameters."""

    @override
    def row_chunks(self, fakes: Tensor, labels: Tensor) -> Iterator[RowChunk]:
        flat = fakes.flatten(1)
        for label, (records, owners) in enumerate(zip(self._records, self._owners, strict=True)):
            queries = _block_of(labels, label)
            if queries is None or len(records) == 0:
                continue
            for part in self._parts(owners):
                chunk = DirectionChunk(owners[part], queries, targets=records[part], points=flat[queries])
                yield chunk if self.is_single_record else _mean_per_teacher(chunk.values, owners[part], queries)

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


def _mean_per_teacher(rows: Tensor, owners: Tensor, queries: slice) -> RowChunk:
    teachers, index, counts = torch.unique(owners, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(teachers), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    sums.index_add_(0, index, rows)
    return RowChunk(teacher_ids=teachers, values=sums / counts[:, None, None], queries=queries)

"""Teacher ensembles: who holds which record, and how teachers hand out rows in chunks.

Shapes: N records, T teachers, n teachers of one chunk, B fake images, d numbers of one native output.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_dp.errors import ConfigurationError, DataError
from lightning_dp.gradients.ranks import ALONE, Ranks

FakeSource = Callable[[Tensor], Tensor]
"""Public labels (n,) in, what teachers judge of the generator's images out, detached: (n, *judged_shape)."""

Encoder = Callable[[Tensor], Tensor]
"""Public map of images in [0, 1], (n, C, H, W), to what teachers judge, (n, *judged_shape), each image by itself."""


@dataclass(frozen=True, eq=False)
class TeacherShards:
    """Private records and the public map that gives each of them to one teacher.

    Only `assignment`, which is a function of record positions, decides who holds what; pixels and labels never do.
    A teacher may hold no record at all (a hash partition can leave one empty).

    Attributes:
        images: uint8, (N, C, H, W). Private.
        labels: int64, (N,). Private.
        assignment: int64, (N,), the teacher of each record. Public.
        num_teachers: T; every entry of `assignment` is in [0, T).
        order: int64, (N,), record positions grouped by teacher, in file order within a teacher. Public.
        sizes: int64, (T,), records of each teacher. Public.
        offsets: int64, (T,), where each teacher starts in `order`. Public.

    Raises:
        DataError: Shapes, types or teacher numbers do not fit together.
    """

    images: Tensor
    labels: Tensor
    assignment: Tensor
    num_teachers: int
    order: Tensor = field(init=False, repr=False)
    sizes: Tensor = field(init=False, repr=False)
    offsets: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._validate()
        assignment = self.assignment.to(torch.int64)
        sizes = torch.bincount(assignment, minlength=self.num_teachers)
        object.__setattr__(self, "order", torch.argsort(assignment, stable=True))
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "offsets", torch.cumsum(sizes, 0) - sizes)

    def _validate(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8 or self.images.shape[0] == 0:
            raise DataError(
                f"Expected images of shape (N, C, H, W), N >= 1, type uint8, got shape={tuple(self.images.shape)}, "
                f"dtype={self.images.dtype}. Pass the datamodule's train_images."
            )
        for name, tensor in (("labels", self.labels), ("assignment", self.assignment)):
            if tensor.shape != (self.num_records,) or tensor.is_floating_point() or tensor.is_complex():
                raise DataError(
                    f"Expected one whole number per record in {name}, shape ({self.num_records},), got "
                    f"shape={tuple(tensor.shape)}, dtype={tensor.dtype}. Pass labels and partition of the same records."
                )
        if not (int(self.assignment.min()) >= 0 and int(self.assignment.max()) < self.num_teachers):
            raise DataError(
                f"Expected teachers in [0, {self.num_teachers}), got assignment from {int(self.assignment.min())} to "
                f"{int(self.assignment.max())}. Make the partition with the same num_teachers as the ensemble."
            )

    @property
    def num_records(self) -> int:
        """Number of records N."""
        return self.images.shape[0]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def is_single_record(self) -> bool:
        """Whether no teacher holds more than one record."""
        return int(self.sizes.max()) <= 1

    def check_fit(self, *, num_teachers: int, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        """Refuse an ensemble, or a statement on the data, that these shards do not fit.

        Args:
            num_teachers: Of the ensemble.
            num_classes: Of the data.
            image_shape: (C, H, W) of the data.

        Raises:
            ConfigurationError: Teachers, shape or labels differ.
        """
        if self.num_teachers != num_teachers:
            raise ConfigurationError(
                f"Expected shards for num_teachers={num_teachers}, got shards.num_teachers={self.num_teachers}. "
                "Make the partition with the same number."
            )
        if self.image_shape != tuple(image_shape):
            raise ConfigurationError(
                f"Expected images of shape {self.image_shape}, got image_shape={image_shape}. "
                "Pass the datamodule's image_shape."
            )
        if int(self.labels.min()) < 0 or int(self.labels.max()) >= num_classes:
            raise ConfigurationError(
                f"Expected labels in [0, {num_classes}), got others for num_classes={num_classes}. "
                "Pass the datamodule's num_classes."
            )

    def common_batch(self, batch_size: int) -> int:
        """Return the batch that every teacher uses: min(batch_size, N // T), at least 1.

        It follows from N and T alone. The size of the smallest shard would do for balanced shards, but with unequal
        ones it lets the shard of one record set the batch of every other teacher.
        """
        return max(1, min(batch_size, self.num_records // self.num_teachers))

    def positions(self, teachers: slice, batch: int, step: int) -> Tensor:
        """Return record positions (n, batch) of a range of teachers for one round.

        Rounds walk through each shard in order and wrap within it, so a shard of another size moves nobody else.
        Empty shards point at record 0; the caller must use `sizes` to let these teachers abstain.

        Args:
            teachers: Places of the teachers.
            batch: Records of each in a round.
            step: Number of the round, from 0.
        """
        sizes = self.sizes[teachers].clamp(min=1)
        walk = step * batch + torch.arange(batch, device=sizes.device)
        within = walk.unsqueeze(0) % sizes.unsqueeze(1)  # (n, batch)
        index = (self.offsets[teachers].unsqueeze(1) + within).clamp(max=self.num_records - 1)
        positions = self.order[index]
        return torch.where(self.sizes[teachers].unsqueeze(1) > 0, positions, torch.zeros_like(positions))

    def part(self, owned: range) -> "TeacherShards":
        """Return some teachers with their records, numbered from 0; a function of the assignment alone.

        Args:
            owned: The teachers, in rising order.

        Raises:
            ConfigurationError: They hold no record, or there are none.
        """
        if len(owned) == self.num_teachers:
            return self
        teachers = torch.tensor(owned, dtype=torch.int64, device=self.assignment.device)
        places = torch.full((self.num_teachers,), -1, dtype=torch.int64, device=self.assignment.device)
        places[teachers] = torch.arange(len(owned), device=places.device)
        found = places[self.assignment]
        (mine,) = torch.nonzero(found >= 0, as_tuple=True)
        if len(mine) == 0:
            raise ConfigurationError(
                f"Expected every process to hold a record, got one whose share of the {self.num_teachers} teachers has "
                "none. Use fewer processes (trainer.devices, trainer.num_nodes), or more teachers."
            )
        return TeacherShards(self.images[mine], self.labels[mine], found[mine], len(owned))

    def to(self, device: torch.device | str) -> "TeacherShards":
        """Return the same shards with every tensor on `device`."""
        return TeacherShards(
            self.images.to(device), self.labels.to(device), self.assignment.to(device), self.num_teachers
        )


@dataclass(frozen=True, eq=False)
class RowChunk:
    """Rows of some teachers: what a mechanism encodes and sums before it sees the next chunk. Private.

    Attributes:
        teacher_ids: int64, (n,).
        values: float, (n, q, d): descent direction of each teacher for each image of `queries`, flattened per image.
            A row may hold NaN or infinity; the mechanism makes such a row abstain.
        queries: The images of the batch that the rows speak about, a slice with start and stop (stop - start = q).
    """

    teacher_ids: Tensor
    values: Tensor
    queries: slice

    def in_basis(self, basis: Tensor) -> Tensor:
        """Return the rows in another orthonormal basis.

        Args:
            basis: (d, d), one basis vector a column.

        Returns:
            (n, q, d).
        """
        return self.values @ basis.to(self.values)


@dataclass(frozen=True, kw_only=True)
class RowStructure:
    """Public facts on how one record reaches the rows of one release; sensitivity is computed from these.

    Attributes:
        images_per_row: Most images of the batch on which one teacher speaks (non-zero rows of one teacher).
        class_wise: Whether teachers are separate per (shard, label), so that replacing one record may change two
            teachers, each of them on the images of its own label only.
        single_record: Whether a teacher is one record and abstains without it, so that removing the record replaces its
            rows by zero instead of by other rows.
    """

    images_per_row: int
    class_wise: bool
    single_record: bool


class TeacherEnsemble(ABC):
    """Models of disjoint shards that say, per fake image, in which direction it should move.

    Nothing of one teacher (records, parameters, optimizer state, batch statistics) may reach another: then one record
    reaches the rows of one teacher only, which is what the sensitivity of every vote rests on.

    Attributes:
        num_teachers: T.
    """

    num_teachers: int

    def row_bytes(self, num_images: int, vector_dim: int, *, num_records: int, num_classes: int) -> int:
        """Return the memory that rows take at a time, at least: those of one teacher, and two working copies.

        Args:
            num_images: Fake images of a release.
            vector_dim: Length of the vector judged per image.
            num_records: Records of all teachers.
            num_classes: Number of labels.
        """
        return 3 * 4 * num_images * vector_dim

    def state_bytes(self, sample_shape: tuple[int, ...], *, num_classes: int, device: torch.device) -> int:
        """Return the memory that the state of all teachers takes where they work, for as long as a run goes on.

        Args:
            sample_shape: Shape of what a teacher judges.
            num_classes: Number of labels.
            device: Where they work.
        """
        return 0

    @abstractmethod
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
        """Take the records and build the teachers that this process owns.

        Args:
            shards: Records and who holds them.
            num_classes: Number of labels.
            image_shape: (C, H, W) of the images.
            device: Where teachers live and work.
            seed: Public seed of the teachers' initial parameters.
            encode: Public map of images to what teachers judge; None when they judge images.
            ranks: The processes of the run. A teacher, its records and its state live on the one that owns it, and
                only there; ids of teachers are those among all.

        Raises:
            ConfigurationError: Shards do not fit the ensemble.
        """

    @abstractmethod
    def train(self, make_fakes: FakeSource, *, step: int) -> None:
        """Run one round of teacher training; the first one of a run is the pretraining.

        Args:
            make_fakes: Called with *public* labels only: a generator that saw private labels could carry them from one
                teacher to another (through batch statistics). Called once per round.
            step: Number of the round, from 0; decides which records of a shard are used.
        """

    @abstractmethod
    def row_chunks(self, fakes: Tensor, labels: Tensor, judges: Tensor | None = None) -> Iterator[RowChunk]:
        """Yield rows of the owned teachers for a batch of fakes, a few teachers at a time, each once per query.

        Args:
            fakes: What teachers judge of the fake images, (B, *judged_shape), detached.
            labels: Public labels of the fakes, int64, (B,).
            judges: Which of them speak, distinct, int64, (m,), m may be 0; None lets all of them. Private where they
                were drawn by secret coins: no teacher's training may depend on it.
        """

    @abstractmethod
    def row_structure(self, num_images: int) -> RowStructure:
        """Return how one record reaches the rows when the batch has `num_images` fakes. Looks at no data."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to resume, on any number of processes. Private: it belongs into no released file.

        All processes call it; the first one gets the state of all teachers, the others may get a part.
        """

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; `bind` comes first."""

"""The data module that every method trains from: verified uint8 images, public sizes, public step ticks."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from torch import Tensor

from datamodules.catalogue import DatasetFacts
from datamodules.partition import PartitionMethod, TeacherPartition
from lightning_dp.errors import ConfigurationError, DataError


@dataclass(frozen=True, kw_only=True)
class ImageSplits:
    """The records of a data set in memory.

    Attributes:
        train_images: uint8, (N, C, H, W). Private.
        train_labels: int64, (N,). Private.
        test_images: uint8, (M, C, H, W). Held out, for evaluation only.
        test_labels: int64, (M,).
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class StepTicks:
    """A loader of public step numbers 0 .. num_steps - 1, one int per step and epoch.

    Not a `DataLoader`: there is nothing to collate, no worker to start, and no distributed sampler that would deal
    different steps to different ranks. It is stateful, so that a run resumed in mid-epoch goes on at the right step.

    Args:
        num_steps: Number of ticks per epoch, >= 1.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self._start = 0
        self._next = 0

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[int]:
        # The body runs at the first next(), so a state loaded after iter() still counts.
        start, self._start = self._start, 0
        for step in range(start, self.num_steps):
            self._next = step + 1
            yield step

    def state_dict(self) -> dict[str, int]:
        """Return the position after the last tick handed out."""
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next epoch start where the saved one stood (at 0 when that one was complete)."""
        self._next = state["next"]
        self._start = self._next if self._next < self.num_steps else 0


class ImageDataModule(pl.LightningDataModule, ABC):
    """Images and labels in memory, as uint8, once; the training loader yields step numbers only.

    Private records never pass through a loader. A method binds them in its own set-up (teachers to their shards, or a
    Poisson sampler to indices), and the Trainer counts public ticks.

    A subclass sets `facts` and implements `read`. Sizes come from `facts`, so they are known (and refused, when they
    do not fit the plan) before a file is opened; `setup` checks that the records agree with them.

    Args:
        num_train: Use only the first `num_train` training records (public choice); all of them when null.
        steps_per_epoch: Number of steps that Lightning calls one epoch.

    Raises:
        ConfigurationError: An argument is out of range.
    """

    facts: DatasetFacts

    def __init__(self, num_train: int | None = None, steps_per_epoch: int = 100) -> None:
        super().__init__()
        if num_train is not None and not 1 <= num_train <= self.facts.num_train:
            raise ConfigurationError(
                f"Expected 1 <= num_train <= {self.facts.num_train} (records in {self.facts.name}), "
                f"got num_train={num_train}. Set data.num_train in that range, or leave it out to use all."
            )
        if steps_per_epoch < 1:
            raise ConfigurationError(
                f"Expected steps_per_epoch >= 1, got steps_per_epoch={steps_per_epoch}. Set data.steps_per_epoch."
            )
        self.num_train = num_train
        self.steps_per_epoch = steps_per_epoch
        self.name = self.facts.name
        self._splits: ImageSplits | None = None

    @abstractmethod
    def read(self) -> ImageSplits:
        """Read all records (before `num_train` cuts them).

        Raises:
            DataError: A file is missing or is not what its publisher states.
        """

    def setup(self, stage: str | None = None) -> None:
        """Read and check the records once; later calls, for any stage, do nothing.

        Raises:
            DataError: See `read`; or the records do not agree with the public facts.
        """
        if self._splits is not None:
            return
        splits = self.read()
        check_splits(splits, self.facts)
        if self.num_train is not None and self.num_train < self.facts.num_train:
            # clone: a slice would keep all the records alive.
            splits = ImageSplits(
                train_images=splits.train_images[: self.num_train].clone(),
                train_labels=splits.train_labels[: self.num_train].clone(),
                test_images=splits.test_images,
                test_labels=splits.test_labels,
            )
        self._splits = splits

    @property
    def splits(self) -> ImageSplits:
        """The records.

        Raises:
            RuntimeError: `setup` was not called.
        """
        if self._splits is None:
            raise RuntimeError(f"Expected {type(self).__name__}.setup() before its records are used. Call setup().")
        return self._splits

    @property
    def train_images(self) -> Tensor:
        """Private training images, uint8, (N, C, H, W)."""
        return self.splits.train_images

    @property
    def train_labels(self) -> Tensor:
        """Private training labels, int64, (N,)."""
        return self.splits.train_labels

    @property
    def test_images(self) -> Tensor:
        """Held-out images, uint8, (M, C, H, W)."""
        return self.splits.test_images

    @property
    def test_labels(self) -> Tensor:
        """Held-out labels, int64, (M,)."""
        return self.splits.test_labels

    @property
    def num_records(self) -> int:
        """Number of training records in use: public configuration, known before `setup`."""
        return self.facts.num_train if self.num_train is None else self.num_train

    @property
    def num_classes(self) -> int:
        """Number of labels, known before `setup`."""
        return self.facts.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W), known before `setup`."""
        return self.facts.image_shape

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what is public about the records in use: name, sizes, published checksums, `num_train`.

        Known before `setup`. It ties ledgers of the same data set together and is never computed from records: a hash
        of private records in a run card would let anyone who knows all but one of them test guesses of that one.
        """
        facts = (self.facts, self.published_checksums, self.num_records)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    @property
    def origin(self) -> str:
        """Name of the collection that the records are of: two data sets of one origin may share records."""
        return self.facts.name

    @property
    def published_checksums(self) -> tuple[str, ...]:
        """Checksums that the publisher states, and that `read` verifies; none for unpublished records."""
        return ()

    def teacher_partition(
        self, num_teachers: int, *, method: PartitionMethod = "permutation", key: int = 0
    ) -> TeacherPartition:
        """Return who holds which record; known before `setup`, since neither pixels nor labels decide.

        Args:
            num_teachers: Number of teachers, at most the number of records.
            method: permutation or hash (see `TeacherPartition`).
            key: Public key of the partition.

        Raises:
            ConfigurationError: More teachers than records.
        """
        return TeacherPartition(self.num_records, num_teachers, method=method, key=key)

    def train_dataloader(self) -> StepTicks:
        """Return the loader of public step ticks; it yields ints, never records."""
        return StepTicks(self.steps_per_epoch)


def check_splits(splits: ImageSplits, facts: DatasetFacts) -> None:
    """Check types, shapes and label range of the records against the public facts.

    Raises:
        DataError: The first difference found.
    """
    for part, images, labels, count in (
        ("train", splits.train_images, splits.train_labels, facts.num_train),
        ("test", splits.test_images, splits.test_labels, facts.num_test),
    ):
        where = f"the {part} split of {facts.name}"
        mend = "Mend read() or the facts of the data module."
        expected = (count, *facts.image_shape)
        if images.dtype != torch.uint8 or tuple(images.shape) != expected:
            got = f"{images.dtype} shape={tuple(images.shape)}"
            raise DataError(f"Expected uint8 images of shape={expected} in {where}, got {got}. {mend}")
        if labels.dtype != torch.int64 or tuple(labels.shape) != (count,):
            got = f"{labels.dtype} shape={tuple(labels.shape)}"
            raise DataError(f"Expected int64 labels of shape={(count,)} in {where}, got {got}. {mend}")
        if count and not 0 <= int(labels.min()) <= int(labels.max()) < facts.num_classes:
            # Which labels they are is the records' own business: the message may end in a log.
            raise DataError(f"Expected labels 0..{facts.num_classes - 1} in {where}, got others. {mend}")

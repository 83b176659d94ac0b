"""What is different in the second of two neighbouring worlds, played out on a data module and on a method's draws.

A record leaves at the end of its file, and at the front, where all others move up. What is keyed by an id, which is a
position, then changes for all of them. Secret draws have the same law wherever a record stands, so worlds may be
coupled: coins of sampling, coins of the mechanism and what is drawn by `record_seed` go along with the records. Public
draws stay with the positions. Where records are drawn, one that left is drawn no more, and in its place in the file
stands another image under another label: whoever looks into the file past the draws sees a difference.
"""

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from typing_extensions import override

from datamodules import ImageDataModule
from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.record_gradients import RecordChunk, SummableRows
from lightning_dp.mechanisms.base import ReleasePlan
from lightning_dp.mechanisms.keyed import seed_for_moved
from lightning_dp.modules.base import PrivateModule
from lightning_dp.modules.records import PoissonModule


@dataclass(frozen=True)
class RecordChange:
    """What is different in the second world.

    Attributes:
        name: In words.
        record: Which record.
        apply: Changes the records of a data module that has been set up.
        is_absent: The record takes part in no release.
        moves_up: It was the first, and all others stand one place further up.
    """

    name: str
    record: int
    apply: Callable[[ImageDataModule, int], None]
    is_absent: bool = False
    moves_up: bool = False


class Played(pl.Callback):
    """Makes the records that may change take part in every release of a world, or not if they are gone.

    Args:
        change: What is different.
        present: The records that change in some world.
    """

    def __init__(self, change: RecordChange, present: tuple[int, ...]) -> None:
        self.change, self.present = change, present

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        record = self.change.record
        if hasattr(pl_module, "draw_records"):
            _shadow(pl_module, "draw_records", self._taking_part)
        if self.change.moves_up and isinstance(pl_module, PrivateModule):
            _let_secrets_follow(pl_module)
        if getattr(pl_module, "expected_judges", None) is not None:
            teachers: Any = pl_module
            partition = trainer.datamodule.teacher_partition(  # type: ignore[attr-defined]
                teachers._num_teachers, method=teachers.partition, key=teachers.partition_key
            )
            teacher = int(partition.assignment[record])
            _shadow(pl_module, "draw_judges", lambda drawn: _with(drawn, teacher))

    def _taking_part(self, drawn: Tensor) -> Tensor:
        """Return the positions, in this world, of the records that were drawn in the first."""
        for record in self.present:
            drawn = _with(drawn, record)
        if self.change.is_absent:
            drawn = drawn[drawn != self.change.record]
        return drawn - 1 if self.change.moves_up else drawn


def _let_secrets_follow(module: PrivateModule) -> None:
    """Name rows at the door, and key secret draws, as where all records stand one place further down."""
    release = module.release
    if module.contribution_spec().kind != "joint":  # its one row is no record's
        vars(module)["release"] = lambda chunks, shape: release(_named_before(chunks), shape)
    if isinstance(module, PoissonModule):
        real = module.record_seed
        if _is_secret(module):
            vars(module)["record_seed"] = lambda purpose: seed_for_moved(real(purpose), 1)


def _is_secret(module: PoissonModule) -> bool:
    """Tell whether what is drawn for a record follows the secret key."""
    key, before = module._record_key, module.record_seed(0)
    module._record_key = bytes(byte ^ 1 for byte in key)
    after = module.record_seed(0)
    module._record_key = key
    return before != after


def _named_before(chunks: Iterable[RecordChunk]) -> Iterator[RecordChunk]:
    for chunk in chunks:
        if isinstance(chunk, SummableRows):
            named = copy(chunk)
            named.ids = chunk.ids + 1
            yield named
        else:
            yield replace(chunk, teacher_ids=chunk.teacher_ids + 1)


def _shadow(module: pl.LightningModule, name: str, change: Callable[[Tensor], Tensor]) -> None:
    real = getattr(module, name)
    vars(module)[name] = lambda: change(real())


def _with(drawn: Tensor, index: int) -> Tensor:
    """Return the indices with one of them certainly there."""
    return torch.cat([drawn[drawn != index], torch.tensor([index])]).sort().values


def unchanged(record: int) -> RecordChange:
    """Return the change of nothing."""
    return RecordChange("as it is", record, lambda data, index: None)


def record_changes(plan: ReleasePlan, record: int) -> list[RecordChange]:
    """Return what the relation lets one record do.

    Args:
        plan: Rows and relation.
        record: Which record.

    Raises:
        ConfigurationError: The relation cannot be played out on such rows.
    """
    relation, kind = plan.relation.name, plan.spec.kind
    if relation == "REPLACE_ONE":
        return [
            RecordChange("another image of another label", record, _inverted_and_relabelled),
            RecordChange("another image of the same label", record, _inverted),
        ]
    if kind == "teacher":
        raise ConfigurationError(
            "Under replace_special a teacher's record becomes empty, which no image is; audit teachers under "
            "privacy.neighboring_relation=replace_one."
        )
    first = "the first record gone, all others moved up"
    if kind == "statistic":
        return [RecordChange("the record gone", record, _removed), RecordChange(first, 0, _removed, moves_up=True)]
    return [
        RecordChange("the record gone", record, _inverted_and_relabelled, is_absent=True),
        RecordChange(first, 0, _moved_up, is_absent=True, moves_up=True),
    ]


def _inverted(data: ImageDataModule, record: int) -> None:
    images = data.splits.train_images.clone()
    images[record] = 255 - images[record]
    data._splits = replace(data.splits, train_images=images)


def _inverted_and_relabelled(data: ImageDataModule, record: int) -> None:
    _inverted(data, record)
    labels = data.splits.train_labels.clone()
    labels[record] = (labels[record] + 1) % data.num_classes
    data._splits = replace(data.splits, train_labels=labels)


def _removed(data: ImageDataModule, record: int) -> None:
    """Take the record out; the number of records stays the public one, as the claim has it."""
    kept = torch.arange(len(data.train_labels)) != record
    data._splits = replace(data.splits, train_images=data.train_images[kept], train_labels=data.train_labels[kept])


def _moved_up(data: ImageDataModule, record: int) -> None:
    """Move all records one place up; another one, which takes part in nothing, fills the last place."""
    images, labels = data.train_images.roll(-1, 0), data.train_labels.roll(-1, 0)
    data._splits = replace(data.splits, train_images=images, train_labels=labels)
    _inverted_and_relabelled(data, len(labels) - 1)

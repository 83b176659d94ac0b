"""What is different in the second of two neighbouring worlds, played out on a data module and on a method's draws."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from typing_extensions import override

from datamodules import ImageDataModule
from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.base import ReleasePlan


@dataclass(frozen=True)
class RecordChange:
    """What is different in the second world.

    Attributes:
        name: In words.
        record: Which record.
        apply: Changes the records of a data module that has been set up.
        is_absent: The record takes part in no release.
    """

    name: str
    record: int
    apply: Callable[[ImageDataModule, int], None]
    is_absent: bool = False


class Played(pl.Callback):
    """Makes the record that changes take part in every release of both worlds, or in none of the second's.

    Args:
        change: What is different.
    """

    def __init__(self, change: RecordChange) -> None:
        self.change = change

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        record, is_absent = self.change.record, self.change.is_absent
        if hasattr(pl_module, "draw_records"):
            _shadow(pl_module, "draw_records", lambda drawn: _with(drawn, record, absent=is_absent))
        if getattr(pl_module, "expected_judges", None) is not None:
            teachers: Any = pl_module
            partition = trainer.datamodule.teacher_partition(  # type: ignore[attr-defined]
                teachers._num_teachers, method=teachers.partition, key=teachers.partition_key
            )
            teacher = int(partition.assignment[record])
            _shadow(pl_module, "draw_judges", lambda drawn: _with(drawn, teacher, absent=False))


def _shadow(module: pl.LightningModule, name: str, change: Callable[[Tensor], Tensor]) -> None:
    real = getattr(module, name)
    vars(module)[name] = lambda: change(real())


def _with(drawn: Tensor, index: int, *, absent: bool) -> Tensor:
    """Return the indices with one of them certainly there, or certainly not."""
    others = drawn[drawn != index]
    return others if absent else torch.cat([others, torch.tensor([index])]).sort().values


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
    if kind == "statistic":
        return [RecordChange("the record gone", record, _removed)]
    return [RecordChange("the record gone", record, lambda data, index: None, is_absent=True)]


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

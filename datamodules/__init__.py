"""Data modules: verified files, teacher partitions, fetching.

The names below are imported on first use: fetching and partitioning need no Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.base import ImageDataModule, ImageSplits, StepTicks
    from datamodules.embedded import EmbeddedDigits
    from datamodules.mnist import MNIST, FashionMNIST
    from datamodules.own import ImageFolder, NpzImages
    from datamodules.partition import TeacherPartition

__all__ = [
    "MNIST",
    "EmbeddedDigits",
    "FashionMNIST",
    "ImageDataModule",
    "ImageFolder",
    "ImageSplits",
    "NpzImages",
    "StepTicks",
    "TeacherPartition",
]

_HOMES = {
    "MNIST": "mnist",
    "EmbeddedDigits": "embedded",
    "FashionMNIST": "mnist",
    "ImageDataModule": "base",
    "ImageFolder": "own",
    "ImageSplits": "base",
    "NpzImages": "own",
    "StepTicks": "base",
    "TeacherPartition": "partition",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

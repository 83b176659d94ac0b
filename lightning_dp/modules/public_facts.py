"""What a method may know of its data before a record is read."""

from collections.abc import Iterable
from typing import Any, Literal, Protocol, runtime_checkable

from torch import nn

from lightning_dp.errors import ConfigurationError


@runtime_checkable
class PublicFacts(Protocol):
    """What a data module says of its records before it reads them; configuration, not a release."""

    @property
    def name(self) -> str:
        """Name of the data set."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identity of the data set, from published facts only: a hash of private records would be a release."""
        ...

    @property
    def num_records(self) -> int:
        """Number of training records."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        ...

    def teacher_partition(self, num_teachers: int, *, method: Literal["permutation", "hash"], key: int) -> Any:
        """Return who holds which record; refuses more teachers than records."""
        ...


def check_facts(data: Any) -> None:
    """Refuse data that say nothing of themselves, such as a data module with loaders of its own.

    Raises:
        ConfigurationError: They lack a public fact.
    """
    if not isinstance(data, PublicFacts):
        raise ConfigurationError(
            f"Expected a datamodules.ImageDataModule (ImageFolder and NpzImages read files of your own), got "
            f"{type(data).__name__}. Batches of a loader are not the Poisson samples that a claim is about, so methods "
            "draw records themselves: derive the data from ImageDataModule."
        )


def check_sizes(parts: Iterable[tuple[str, nn.Module]], data: PublicFacts) -> None:
    """Refuse parts of a model that are for other images or labels than the data have.

    Args:
        parts: Their names among the model's options, and they themselves.
        data: The public facts.

    Raises:
        ConfigurationError: Names them, and the flags that mend it.
    """
    other, flags = [], []
    for name, part in parts:
        shape, classes = getattr(part, "image_shape", None), getattr(part, "num_classes", data.num_classes)
        shape = None if shape is None else tuple(shape)  # a list, where a class of one's own gives no hint
        if shape is None or (shape, classes) == (data.image_shape, data.num_classes):
            continue
        other.append(f"model.{name} is for images {shape} of {classes} classes")
        if shape != data.image_shape:
            flags.append(f"--model.{name}.image_shape '{list(data.image_shape)}'")
        if classes != data.num_classes:
            flags.append(f"--model.{name}.num_classes {data.num_classes}")
    if other:
        raise ConfigurationError(
            f"{', '.join(other)}, but the data are {data.image_shape} of {data.num_classes}; set {' '.join(flags)}"
            ", or choose other data."
        )

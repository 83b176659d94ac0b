"""What a method may know of its data before a record is read."""

from typing import Any, Literal, Protocol

from lightning_dp.errors import ConfigurationError

_NAMES = ("name", "fingerprint", "num_records", "num_classes", "image_shape", "teacher_partition")


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
    if any(not hasattr(data, name) for name in _NAMES):
        raise ConfigurationError(
            f"Expected a datamodules.ImageDataModule (ImageFolder and NpzImages read files of your own), got "
            f"{type(data).__name__}. Batches of a loader are not the Poisson samples that a claim is about, so methods "
            "draw records themselves: derive the data from ImageDataModule."
        )

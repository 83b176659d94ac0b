"""What a method may know of its data before a record is read."""

from typing import Any, Literal, Protocol


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

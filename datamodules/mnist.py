"""MNIST and Fashion-MNIST from IDX files under a root, verified by checksum."""

import os
import shlex
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from datamodules.base import ImageDataModule, ImageSplits
from datamodules.catalogue import FASHION_MNIST_FILES, MNIST_FILES, IdxDataset, IdxFile
from datamodules.idx import find_idx, read_verified
from lightning_dp.errors import DataError

ROOT_VARIABLE = "LIGHTNING_DP_DATA"
DEFAULT_ROOT = Path("data")
SYSTEM_ROOT = Path("/usr/share/datasets")


class IdxDataModule(ImageDataModule):
    """A data set of four IDX files; a subclass names them in `files`.

    Args:
        root: Folder that holds the data sets; searched alone when given. When null: the folder in the environment
            variable LIGHTNING_DP_DATA, ./data, /usr/share/datasets, the first that holds any file of the data set.
        num_train: Use only the first `num_train` training records (public choice); all of them when null.
        steps_per_epoch: Number of steps that Lightning calls one epoch.

    Raises:
        ConfigurationError: An argument is out of range.
    """

    files: ClassVar[IdxDataset]

    def __init__(self, root: str | None = None, num_train: int | None = None, steps_per_epoch: int = 100) -> None:
        super().__init__(num_train=num_train, steps_per_epoch=steps_per_epoch)
        self.root = root

    @property
    def published_checksums(self) -> tuple[str, ...]:
        """SHA-256 of the uncompressed training files."""
        return (self.files.train_images.sha256, self.files.train_labels.sha256)

    def read(self) -> ImageSplits:
        """Read and verify the four files.

        Raises:
            DataError: A file is missing, truncated, corrupt, of the wrong shape, or holds a wrong label.
        """
        folder, mend = locate(self.files, self.root)
        train_images, train_labels = self._read_split(folder, self.files.train_images, self.files.train_labels, mend)
        test_images, test_labels = self._read_split(folder, self.files.test_images, self.files.test_labels, mend)
        return ImageSplits(
            train_images=train_images, train_labels=train_labels, test_images=test_images, test_labels=test_labels
        )

    def _read_split(self, folder: Path, images: IdxFile, labels: IdxFile, mend: str) -> tuple[Tensor, Tensor]:
        """Return the images, (N, C, H, W) uint8, and labels, (N,) int64, of one split."""
        pixels = read_verified(_require(folder, images.name, mend), images, mend=mend)
        classes = read_verified(
            _require(folder, labels.name, mend), labels, max_value=self.facts.num_classes - 1, mend=mend
        )
        return pixels.reshape(len(pixels), *self.facts.image_shape), classes.long()


class MNIST(IdxDataModule):
    """MNIST: 60,000 training and 10,000 test digits, 28x28 gray (LeCun, Cortes, Burges; CC BY-SA 3.0).

    Args:
        root: Folder that holds MNIST/raw; searched alone when given. When null: the folder in the environment
            variable LIGHTNING_DP_DATA, ./data, /usr/share/datasets, the first that holds any file of the data set.
        num_train: Use only the first `num_train` training records (public choice); all of them when null.
        steps_per_epoch: Number of steps that Lightning calls one epoch.

    Raises:
        ConfigurationError: An argument is out of range.
    """

    files = MNIST_FILES
    facts = MNIST_FILES.facts


class FashionMNIST(IdxDataModule):
    """Fashion-MNIST: 60,000 training and 10,000 test pictures of clothes, 28x28 gray (Zalando Research; MIT).

    Args:
        root: Folder that holds FashionMNIST/raw or Debian's fashion-mnist; searched alone when given. When null: the
            folder in the environment variable LIGHTNING_DP_DATA, ./data, /usr/share/datasets, the first that holds any
            file of the data set.
        num_train: Use only the first `num_train` training records (public choice); all of them when null.
        steps_per_epoch: Number of steps that Lightning calls one epoch.

    Raises:
        ConfigurationError: An argument is out of range.
    """

    files = FASHION_MNIST_FILES
    facts = FASHION_MNIST_FILES.facts


def search_roots(root: str | None) -> list[Path]:
    """Return the roots to search, in order: `root` alone when given, else the environment's, ./data, the system's."""
    if root is not None:
        return [Path(root).expanduser()]
    variable = os.environ.get(ROOT_VARIABLE, "")
    return [*([Path(variable).expanduser()] if variable else []), DEFAULT_ROOT, SYSTEM_ROOT]


def locate(files: IdxDataset, root: str | None) -> tuple[Path, str]:
    """Find the folder of a data set.

    A folder that holds any of its files is taken, so that a half-filled one is reported and never silently passed over
    in favour of another copy.

    Args:
        files: The data set.
        root: Root given by the user, or None to search.

    Returns: The folder, and the sentence that says which command mends a broken file in it.

    Raises:
        DataError: None of the roots holds a file of the data set.
    """
    roots = search_roots(root)
    for candidate in roots:
        for folder in (candidate / name for name in files.folders):
            if any(find_idx(folder, file.name) for file in files.files):
                return folder, mend_sentence(files, candidate)
    first, *others = (str(path / folder / files.train_images.name) for path in roots for folder in files.folders)
    searched = f" (searched also: {', '.join(others)})" if others else ""
    mend = mend_sentence(files, roots[0] if root is not None else DEFAULT_ROOT)
    raise DataError(f"Expected {files.facts.name} in {first}[.gz]{searched}, got no such file. {mend}")


def mend_sentence(files: IdxDataset, root: Path) -> str:
    """Return the command that fills `root` with a data set; ./data is the command's default.

    A broken system copy is mended by ./data too, which is searched before it and needs no rights.
    """
    where = "" if root in (DEFAULT_ROOT, SYSTEM_ROOT) else f" --root {shlex.quote(str(root))}"
    return f"Run: lightning-dp data fetch {files.fetch_name}{where}"


def _require(folder: Path, name: str, mend: str) -> Path:
    """Return the path of a file of the data set, or say that it is missing."""
    path = find_idx(folder, name)
    if path is None:
        raise DataError(f"Expected {folder / name} or {name}.gz beside the data set's other files, got none. {mend}")
    return path

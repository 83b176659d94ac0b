"""Small IDX data sets of the right layout, and the checksum table that goes with them."""

import gzip
import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from datamodules.catalogue import MNIST_FILES, IdxDataset
from datamodules.mnist import MNIST

NUM_TRAIN, NUM_TEST = 40, 20


def idx_bytes(array: np.ndarray, element_type: int = 0x08) -> bytes:
    header = bytes([0, 0, element_type, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


@pytest.fixture
def contents() -> dict[str, bytes]:
    """Uncompressed contents by file name: 40 training and 20 test records."""
    rng = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": idx_bytes(rng.integers(0, 256, (NUM_TRAIN, 28, 28), dtype=np.uint8)),
        "train-labels-idx1-ubyte": idx_bytes((np.arange(NUM_TRAIN) % 10).astype(np.uint8)),
        "t10k-images-idx3-ubyte": idx_bytes(rng.integers(0, 256, (NUM_TEST, 28, 28), dtype=np.uint8)),
        "t10k-labels-idx1-ubyte": idx_bytes((np.arange(NUM_TEST) % 10).astype(np.uint8)),
    }


@pytest.fixture
def small_files(contents: dict[str, bytes]) -> IdxDataset:
    """MNIST's table with the sizes and checksums of `contents`, and no source to fetch from."""

    def shrink(file, num):
        digest = hashlib.sha256(contents[file.name]).hexdigest()
        return replace(file, shape=(num, *file.shape[1:]), sha256=digest)

    return replace(
        MNIST_FILES,
        facts=replace(MNIST_FILES.facts, num_train=NUM_TRAIN, num_test=NUM_TEST),
        train_images=shrink(MNIST_FILES.train_images, NUM_TRAIN),
        train_labels=shrink(MNIST_FILES.train_labels, NUM_TRAIN),
        test_images=shrink(MNIST_FILES.test_images, NUM_TEST),
        test_labels=shrink(MNIST_FILES.test_labels, NUM_TEST),
        mirrors=(),
        npm_package=None,
        debian_package=None,
    )


@pytest.fixture
def small_mnist(monkeypatch: pytest.MonkeyPatch, small_files: IdxDataset) -> type[MNIST]:
    """The class MNIST, expecting the small files."""
    monkeypatch.setattr(MNIST, "files", small_files)
    monkeypatch.setattr(MNIST, "facts", small_files.facts)
    return MNIST


@pytest.fixture
def empty_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working folder, no environment variable, no system data."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv("LIGHTNING_DP_DATA", raising=False)
    monkeypatch.setattr("datamodules.mnist.SYSTEM_ROOT", tmp_path / "system")
    return work


@pytest.fixture
def write_files(contents: dict[str, bytes]):
    """Function that writes the four files (gz or plain) under root/folder."""

    def write(root: Path, folder: str = "MNIST/raw", *, compress: bool = True) -> Path:
        place = root / folder
        place.mkdir(parents=True)
        for name, data in contents.items():
            path = place / (f"{name}.gz" if compress else name)
            path.write_bytes(gzip.compress(data) if compress else data)
        return place

    return write

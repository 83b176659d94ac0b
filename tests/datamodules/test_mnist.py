"""Search order of the roots, and one clear line for every way in which a file can be wrong."""

import gzip
import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from datamodules.catalogue import FASHION_MNIST_FILES, MNIST_FILES
from datamodules.mnist import MNIST, FashionMNIST, search_roots
from lightning_dp.errors import ConfigurationError, DataError
from tests.datamodules.conftest import NUM_TRAIN, idx_bytes

pytestmark = pytest.mark.usefixtures("empty_places")

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def refusal(module) -> str:
    """Return the one line that setup() refuses with."""
    with pytest.raises(DataError) as caught:
        module.setup("fit")
    message = str(caught.value)
    assert "\n" not in message
    assert "Run: lightning-dp data fetch mnist" in message
    return message


@pytest.mark.parametrize("compress", [True, False])
def test_reads_what_was_written(small_mnist, write_files, contents, tmp_path, compress):
    write_files(tmp_path / "root", compress=compress)
    module = small_mnist(root=str(tmp_path / "root"))
    module.setup()
    pixels = np.frombuffer(contents[TRAIN_IMAGES], np.uint8, offset=16).reshape(-1, 1, 28, 28)
    assert torch.equal(module.train_images, torch.from_numpy(pixels.copy()))
    assert module.train_images.dtype == torch.uint8
    assert module.train_labels.tolist() == [i % 10 for i in range(NUM_TRAIN)]
    assert module.train_labels.dtype == torch.int64
    assert tuple(module.test_images.shape) == (20, 1, 28, 28)
    assert module.test_labels.tolist() == [i % 10 for i in range(20)]


def test_roots_are_searched_in_order(monkeypatch, small_mnist, write_files, empty_places, tmp_path):
    system, data, environment, given = (
        tmp_path / "system",
        empty_places / "data",
        tmp_path / "env",
        tmp_path / "given",
    )
    opened = []
    real = small_mnist._read_split
    monkeypatch.setattr(
        small_mnist, "_read_split", lambda self, folder, *rest: opened.append(folder) or real(self, folder, *rest)
    )
    monkeypatch.setenv("LIGHTNING_DP_DATA", str(environment))  # set, and empty at first: the search goes on
    for root in (system, data, environment):
        write_files(root)
        small_mnist().setup()
        assert opened[-1].resolve() == (root / "MNIST/raw").resolve()
    write_files(given)
    small_mnist(root=str(given)).setup()
    assert opened[-1] == given / "MNIST/raw"


def test_a_given_root_is_searched_alone(small_mnist, write_files, empty_places, tmp_path):
    write_files(empty_places / "data")
    message = refusal(small_mnist(root=str(tmp_path / "typo")))
    assert f"{tmp_path}/typo/MNIST/raw/train-images-idx3-ubyte[.gz]" in message
    assert message.endswith(f"--root {tmp_path}/typo")


def test_debian_layout(monkeypatch, small_files, write_files, tmp_path):
    files = replace(FASHION_MNIST_FILES, **{part: getattr(small_files, part) for part in PARTS})
    monkeypatch.setattr(FashionMNIST, "files", files)
    monkeypatch.setattr(FashionMNIST, "facts", replace(files.facts, num_train=40, num_test=20))
    write_files(tmp_path / "system", "fashion-mnist")
    module = FashionMNIST()
    module.setup()
    assert len(module.train_images) == 40


PARTS = ("train_images", "train_labels", "test_images", "test_labels")


def test_home_and_empty_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert search_roots("~/d") == [tmp_path / "d"]
    monkeypatch.setenv("LIGHTNING_DP_DATA", "")
    assert [str(root) for root in search_roots(None)] == ["data", str(tmp_path / "system")]


def test_nothing_anywhere(small_mnist):
    message = refusal(small_mnist())
    assert "data/MNIST/raw/train-images-idx3-ubyte" in message
    assert "system/MNIST/raw" in message
    assert message.endswith("Run: lightning-dp data fetch mnist")


def test_one_file_missing_is_not_taken_from_elsewhere(small_mnist, write_files, empty_places, tmp_path):
    place = write_files(empty_places / "data")
    write_files(tmp_path / "system")
    (place / f"{TRAIN_LABELS}.gz").unlink()
    assert f"data/MNIST/raw/{TRAIN_LABELS} or {TRAIN_LABELS}.gz" in refusal(small_mnist())


def break_file(place, name, data: bytes) -> str:
    """Overwrite one file (.gz) with compressed `data`; return its path."""
    path = place / f"{name}.gz"
    path.write_bytes(gzip.compress(data))
    return str(path)


def flip_pixel(data: bytes) -> bytes:
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]


BROKEN = {
    "flipped pixel": (TRAIN_IMAGES, flip_pixel, "Expected SHA-256 [0-9a-f]{64} .*got another one .corrupt"),
    "not idx": (TRAIN_IMAGES, lambda data: b"<html>404</html>", "Expected an IDX file .*got b'<htm'"),
    "empty": (TRAIN_IMAGES, lambda data: b"", "Expected an IDX file"),
    "header only": (TRAIN_IMAGES, lambda data: data[:9], "got 9 bytes"),
    "cut": (TRAIN_IMAGES, lambda data: data[:-5], "Expected 31376 bytes .*got 31371 bytes"),
    "padded": (TRAIN_IMAGES, lambda data: data + b"\0", "got 31377 bytes"),
    "float type": (TRAIN_IMAGES, lambda data: b"\0\0\x0d" + data[3:], "element type 0x08 .*got 0x0d"),
    "other size": (
        TRAIN_IMAGES,
        lambda data: idx_bytes(np.zeros((40, 32, 32), np.uint8)),
        r"Expected shape=\(40, 28, 28\) .*got shape=\(40, 32, 32\)",
    ),
    "labels for images": (TRAIN_IMAGES, lambda data: idx_bytes(np.zeros(40, np.uint8)), r"got shape=\(40,\)"),
    "count mismatch": (
        TRAIN_LABELS,
        lambda data: idx_bytes(np.zeros(39, np.uint8)),
        r"Expected shape=\(40,\) .*got shape=\(39,\)",
    ),
    "label 10": (TRAIN_LABELS, lambda data: data[:-1] + b"\x0a", "Expected labels 0..9 .*got others"),
    "swapped labels": (TRAIN_LABELS, lambda data: data[:-2] + data[-1:] + data[-2:-1], "Expected SHA-256"),
}


@pytest.mark.parametrize(("name", "change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_contents(small_mnist, write_files, contents, tmp_path, name, change, message):
    place = write_files(tmp_path / "root")
    path = break_file(place, name, change(contents[name]))
    got = refusal(small_mnist(root=str(tmp_path / "root")))
    assert path in got
    assert re.search(message, got), got


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: b"not gzip at all", "Expected gzip data"),
        (lambda data: data[:200] + b"\xff" * 40 + data[240:], "Expected gzip data"),
        (lambda data: b"", "IDX file"),
    ],
    ids=["truncated", "other data", "damaged", "empty"],
)
def test_broken_archives(small_mnist, write_files, tmp_path, change, message):
    path = write_files(tmp_path / "root") / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(change(path.read_bytes()))
    got = refusal(small_mnist(root=str(tmp_path / "root")))
    assert str(path) in got
    assert message in got


def test_unreadable_file(monkeypatch, small_mnist, write_files, tmp_path):
    write_files(tmp_path / "root")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    assert "got: Permission denied" in refusal(small_mnist(root=str(tmp_path / "root")))


def test_a_failed_setup_leaves_nothing_behind(small_mnist, write_files, contents, tmp_path):
    place = write_files(tmp_path / "root")
    break_file(place, TRAIN_LABELS, contents[TRAIN_LABELS][:-1])
    module = small_mnist(root=str(tmp_path / "root"))
    refusal(module)
    break_file(place, TRAIN_LABELS, contents[TRAIN_LABELS])
    module.setup()
    assert len(module.train_labels) == NUM_TRAIN


def test_num_train_uses_a_prefix_and_frees_the_rest(small_mnist, write_files, contents, tmp_path):
    write_files(tmp_path / "root")
    whole, part = (small_mnist(root=str(tmp_path / "root"), num_train=n) for n in (None, 7))
    assert (whole.num_records, part.num_records) == (NUM_TRAIN, 7)  # before any file is read
    whole.setup()
    part.setup()
    assert torch.equal(part.train_images, whole.train_images[:7])
    assert part.train_images.untyped_storage().nbytes() == 7 * 784
    assert torch.equal(part.test_images, whole.test_images)
    assert whole.fingerprint != part.fingerprint


def test_published_tables():
    for files in (MNIST_FILES, FASHION_MNIST_FILES):
        assert files.facts.num_train == files.train_images.shape[0] == files.train_labels.shape[0] == 60000
        assert [file.num_bytes for file in files.files] == [47040016, 60008, 7840016, 10008]
        assert len({file.sha256 for file in files.files}) == 4
    assert (MNIST().num_records, MNIST().num_classes, MNIST().image_shape, MNIST().name) == (
        60000,
        10,
        (1, 28, 28),
        "MNIST",
    )
    with pytest.raises(ConfigurationError, match="num_train <= 60000"):
        FashionMNIST(num_train=60001)


def test_checksum_is_of_the_uncompressed_bytes(small_files, contents):
    assert small_files.train_images.sha256 == hashlib.sha256(contents[TRAIN_IMAGES]).hexdigest()

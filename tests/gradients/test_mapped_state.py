import errno
import os

import pytest
import torch

from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.mapped_state import MappedState

SHAPE = torch.Size((7, 3000))


def test_what_was_written_outlives_its_dropping(tmp_path):
    state = MappedState(str(tmp_path), 7)
    stack = state.zeros(SHAPE, torch.float32)
    assert torch.count_nonzero(stack) == 0
    wanted = torch.arange(7 * 3000, dtype=torch.float32).view(SHAPE)
    for start in range(0, 7, 2):
        teachers = slice(start, start + 2)
        state.fetch(slice(start, start + 4))
        stack[teachers] = wanted[teachers]
        state.drop(teachers)
    assert torch.equal(stack, wanted)
    assert list(tmp_path.iterdir()) == []


def test_only_whole_pages_of_the_dropped_teachers_are_unmapped(tmp_path):
    """The broken twin advises on every page touched: it would drop a neighbour's as well."""
    state = MappedState(str(tmp_path), 7)
    state.zeros(SHAPE, torch.float32)
    row, advised = 3000 * 4, []

    class Spy:
        def __len__(self):
            return 7 * row

        def madvise(self, advice, start, length):
            advised.append((start, start + length))

    state._maps = [Spy()]
    state.drop(slice(2, 4))
    state.fetch(slice(2, 4))
    (dropped_from, dropped_to), (read_from, read_to) = advised
    assert 2 * row <= dropped_from < dropped_to <= 4 * row
    assert read_from <= 2 * row
    assert read_to >= 4 * row


def test_a_full_disk_is_told_before_training(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigurationError, match=r"No space left on device; 0\.0 GB asked"):
        MappedState(str(tmp_path), 7).zeros(SHAPE, torch.float32)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="none free"):
        MappedState(str(tmp_path / "missing"), 7).zeros(SHAPE, torch.float32)

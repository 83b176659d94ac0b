"""On an accelerator every call starts a kernel: long rows must not be cut into pieces of a CPU's cache there."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_dp.gradients.parts import Rows, product
from lightning_dp.mechanisms.grid import cut_to_grid
from lightning_dp.mechanisms.rows import entries_at_once

RECORDS, LONG = 512, 1_700_000  # a batch of DP-GAN and the parameters of its critic
MOST = 200


class Launches(TorchDispatchMode):
    """Counts what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def weighted_sum(device):
    rows = Rows(torch.empty(RECORDS, LONG, device=device))
    rows.add_weighted_sum(
        torch.empty(RECORDS, device=device, dtype=torch.float64), torch.empty(LONG, device=device, dtype=torch.float64)
    )


def convolution(device):
    """Places of a small layer, as rows."""
    left, right = torch.empty(RECORDS, 196, 32, device=device), torch.empty(RECORDS, 196, 144, device=device)
    product(left, lambda few: right[few], 144, as_rows=True)


@pytest.mark.parametrize("work", [weighted_sum, convolution])
def test_few_kernels_on_an_accelerator(work):
    with Launches() as launches:
        work("meta")
    assert launches.count < MOST


def test_the_count_sees_pieces_of_a_cache(monkeypatch):
    monkeypatch.setattr("lightning_dp.gradients.parts.entries_at_once", lambda in_cache, device: in_cache)
    with Launches() as launches:
        weighted_sum("meta")
    assert launches.count > 10_000


def test_a_cpu_keeps_to_its_cache():
    assert entries_at_once(2**16, torch.device("cpu")) == 2**16
    assert entries_at_once(2**16, torch.device("cuda", 0)) == 2**26
    with Launches() as few, pytest.raises(RuntimeError):  # the check of bounds reads a number
        cut_to_grid(torch.empty(64, LONG, device="meta"), step=1.0, bound=1.0)
    assert few.count < MOST

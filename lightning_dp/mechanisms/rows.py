"""What encoding does to whole rows: it silences those without finite numbers, and scales those that norms decide."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_ON_OTHER_DEVICES: Final = 2**26  # half a gigabyte in double precision


@dataclass(frozen=True)
class RowScaling:
    """What `encode` does to rows of one vector, where their norms decide it.

    Attributes:
        weights: What each vector is multiplied by, (num_rows,), float64; exactly 0 for a row that sends zeros.
        appended: What follows the scaled vectors in the encoded rows, (num_rows, encoded_dim - vector_dim), float64.
    """

    weights: Tensor
    appended: Tensor | None = None


def entries_at_once(in_cache: int, device: torch.device) -> int:
    """Return how many numbers to work on at a time: what a CPU's cache holds, or what is worth starting a kernel for.

    Args:
        in_cache: As many as stay in the cache.
        device: Where they live.
    """
    return in_cache if device.type == "cpu" else max(in_cache, _ON_OTHER_DEVICES)


def zero_non_finite(rows: Tensor) -> Tensor:
    """Return `rows` with every vector that holds a NaN or an infinity replaced by zeros.

    A factor of zero would not do (0 * NaN is NaN), so the values are selected, not multiplied.
    """
    if bool(torch.isfinite(rows.sum())):  # one pass: a NaN or an infinity anywhere makes the sum one
        return rows
    finite = torch.isfinite(rows).all(dim=-1, keepdim=True)
    return torch.where(finite, rows, torch.zeros((), dtype=rows.dtype, device=rows.device))

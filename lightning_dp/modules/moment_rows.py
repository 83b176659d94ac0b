"""Rows of counts, means and second moments, of which the exact sum is had without forming them.

Shapes: n records of one cell, D coefficients.
"""

import math
from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dp.gradients.record_gradients import SummableRows
from lightning_dp.gradients.teachers import RowChunk

ROW_STEPS: Final = 2.0**28
"""Steps to a unit of the grid on which every number of a row lies."""

_ROUNDING: Final = 1e-9  # relative, of a norm; its terms are rounded a few times in 2^-52
_CACHED_ENTRIES: Final = 2**17
_COLUMNS: Final = 20  # coefficients that meet all that follow in one product


class MomentRows(SummableRows):
    """Rows (w0, w1 u, w2 S(u)), cut to the grid, of records of one cell (see `ClassMoments`).

    With weights of 0 and 1 the sum is that of the rows to the last bit: all of its terms are whole steps, and below
    2^53 of them. It is taken block by block in the cache.

    Args:
        ids: Stable ids, int64, (n,).
        place: Number of the cell.
        directions: u, float64, (n, D), of length at most 1 (but for rounding).
        weights: (w0, w1, w2).
        pair_weights: What u_a u_b is multiplied by, for a <= b row by row, float64, (D (D + 1) / 2,); at most w2 if a =
            b, else sqrt 2 w2.
        form: Returns rows, (n, numbers in a row), of directions.
        chunk_size: Rows formed at a time.
    """

    def __init__(
        self,
        ids: Tensor,
        place: int,
        directions: Tensor,
        *,
        weights: tuple[float, ...],
        pair_weights: Tensor,
        form: Callable[[Tensor], Tensor],
        chunk_size: int,
    ) -> None:
        self.ids, self.place = ids, place
        self._directions, self._weights, self._pair_weights = directions, weights, pair_weights
        self._form, self._chunk_size = form, chunk_size

    @property
    @override
    def norm_bounds(self) -> Tensor:
        count, mean, pair = (weight**2 for weight in self._weights)
        squares = self._directions.square().sum(1)
        return (count + (mean + pair * squares) * squares).sqrt() * (1 + _ROUNDING)

    @override
    def add_weighted_sum(self, weights: Tensor, total: Tensor) -> None:
        directions, is_silent = self._directions, weights == 0
        if bool(is_silent.any()):  # selected, not multiplied: 0 * NaN is NaN
            directions = directions.masked_fill(is_silent[:, None], 0.0)
        dim = directions.shape[1]
        pairs = tuple(torch.triu_indices(dim, dim, device=directions.device))
        steps = directions.new_zeros(dim, dim)
        steps[pairs] = self._pair_weights.to(directions) * ROW_STEPS
        first, second = directions.new_zeros(1 + dim), torch.zeros_like(steps)
        at_once = max(1, _CACHED_ENTRIES // (_COLUMNS * dim))
        for few, some in zip(directions.split(at_once), weights.split(at_once), strict=True):
            first[0] += some.sum() * math.trunc(self._weights[0] * ROW_STEPS)
            first[1:] += some @ whole_steps(few * self._weights[1])
            _add_pairs(second, few, some, steps)
        total += torch.cat([first, second[pairs]]).div_(ROW_STEPS)

    @override
    def row_chunks(self) -> Iterator[RowChunk]:
        chunks = zip(self.ids.split(self._chunk_size), self._directions.split(self._chunk_size), strict=True)
        for ids, directions in chunks:
            yield RowChunk(ids, self._form(directions)[:, None], slice(self.place, self.place + 1))


def whole_steps(rows: Tensor) -> Tensor:
    """Return rows in whole steps, cut towards zero, in place; by way of whole numbers, which takes a third of `trunc`.

    Args:
        rows: float64, below 1 in size, so that steps fit into 32 bits.
    """
    return _cut(rows.mul_(ROW_STEPS))


def _cut(steps: Tensor) -> Tensor:
    return steps.copy_(steps.to(torch.int32))


def _add_pairs(total: Tensor, directions: Tensor, weights: Tensor, steps: Tensor) -> None:
    """Add weight times u_a u_b, in whole steps, to entries (a, b) of a total, a <= b; what is below is left open."""
    for start in range(0, len(steps), _COLUMNS):
        few = slice(start, start + _COLUMNS)
        block = directions[:, few, None] * directions[:, None, start:]  # (n, columns, rest)
        _cut(block.mul_(steps[few, start:]))
        total[few, start:] += (weights @ block.flatten(1)).unflatten(0, block.shape[1:])

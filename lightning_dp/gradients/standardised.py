"""Per-record gradients through a standardised weight in closed form, without a row of the weight that is trained.

Symbols: W one output's weight, of m entries, c = W - mean(W), s = sqrt(max(|c|^2, min)), gain g, and G a record's
gradient with respect to g c / s. With a the mean of G and b = <c, G>, the gradients are

    of W:  (g / s) (G - a - is_free b c / s^2),  is_free where |c|^2 is not below the minimum,
    of g:  b / s.

The first is one linear map for all records. Their weighted sum is taken of G and mapped once; their norms follow from
|G|, a and b: g^2 / s^2 (|G|^2 - m a^2 - is_free b^2 / s^2).
"""

from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from lightning_dp.gradients.parts import Part, Rows
from lightning_dp.mechanisms.rows import entries_at_once
from lightning_dp.networks.standardised import MIN_SQUARES, StandardisedFrom

_CACHED_ENTRIES: Final = 2**16


class StandardisedRows(Part):
    """Gradients of W, from rows G.

    Args:
        rows: G.
        source: Weight and gain.
    """

    def __init__(self, rows: Rows, source: StandardisedFrom) -> None:
        self._rows, self._source = rows, source
        self.lines = rows.laid(len(source.weight))  # (n, outputs, m)
        weight = source.weight.detach().unsqueeze(0)
        laid = weight.flatten(2) if rows.order is None else rows.order.laid(weight)
        self._centred = laid.squeeze(0).to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        self._centred -= self._centred.mean(1, keepdim=True)  # (outputs, m)
        squares = torch.linalg.vector_norm(self._centred, dim=1).square()
        self._squares = squares.clamp(min=MIN_SQUARES)
        self._free_share = (squares >= MIN_SQUARES) / self._squares
        self._scale = source.gain.detach().to(torch.float64).flatten() / self._squares.sqrt()

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """|G|^2, m a and b, (n, outputs) each, in double precision, whatever products the machine would round."""
        num, outputs, m = self.lines.shape
        found = self._centred.new_empty(3, num, outputs)
        ones, few = self._centred.new_ones(m), max(1, entries_at_once(_CACHED_ENTRIES, self._centred.device) // m)
        for record in range(num):
            for start in range(0, outputs, few):
                part = slice(start, start + few)
                lines = self.lines[record, part].to(torch.float64)
                found[0, record, part] = torch.linalg.vector_norm(lines, dim=1)
                torch.mv(lines, ones, out=found[1, record, part])
                torch.linalg.vecdot(lines, self._centred[part], out=found[2, record, part])
        found[0].square_()
        return found[0], found[1], found[2]

    def gain_rows(self) -> Rows:
        """Return the gradients of the gain."""
        return Rows((self._statistics[2] / self._squares.sqrt()).to(self.lines.dtype))

    def rows(self) -> Tensor:  # noqa: D102
        mapped = self._mapped(self.lines.to(torch.float64, copy=True)).to(self.lines.dtype).flatten(1)
        return mapped if self._rows.order is None else self._rows.order.restored(mapped)

    @cached_property
    def squared_norms(self) -> Tensor:  # noqa: D102
        squares, total, along = self._statistics
        lost = total.square() / self.lines.shape[2] + along.square() * self._free_share
        return ((squares - lost).clamp(min=0) * self._scale.square()).sum(1)

    @property
    def squared_bounds(self) -> Tensor:  # noqa: D102
        return self.squared_norms + 8 * (self.lines.shape[2] + 4) * torch.finfo(torch.float64).eps * self.squared_masses

    @cached_property
    def squared_masses(self) -> Tensor:  # noqa: D102
        # |G| + |a| sqrt(m) + |b| |c| / s^2 is at most three times |G|.
        return 9 * (self._statistics[0] * self._scale.square()).sum(1)

    def add_weighted_sum(self, weights: Tensor, total: Tensor) -> None:  # noqa: D102
        summed = torch.zeros_like(self._centred).unsqueeze(0)
        Rows(self.lines).add_weighted_sum(weights, summed.view(-1))
        mapped = self._mapped(summed).flatten(1)
        total += (mapped if self._rows.order is None else self._rows.order.restored(mapped)).squeeze(0)

    def _mapped(self, lines: Tensor) -> Tensor:
        """Return gradients of W, (n, outputs, m), from float64 ones of what it became, which are overwritten."""
        along = torch.linalg.vecdot(lines, self._centred) * self._free_share
        lines -= lines.mean(2, keepdim=True)
        return lines.addcmul_(along[:, :, None], self._centred, value=-1.0).mul_(self._scale[:, None])

    def silence(self, is_silent: Tensor) -> Part:  # noqa: D102
        silent = self._rows.silence(is_silent)
        assert isinstance(silent, Rows)
        return StandardisedRows(silent, self._source)

    @property
    def num_bytes(self) -> int:  # noqa: D102
        return self._rows.num_bytes

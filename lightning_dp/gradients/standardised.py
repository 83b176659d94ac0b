"""Per-record gradients through a standardised weight in closed form, without a row of the weight that is trained.

Symbols: W one output's weight, of m entries, c = W - mean(W), s = sqrt(max(|c|^2, min)), h = c / s, gain g, and G a
record's gradient with respect to g h. With a the mean of G and b = <h, G>, the gradients are

    of W:  (g / s) (G - a - f b h),  f = 1 where |c|^2 is not below the minimum, else 0,
    of g:  b.

The first is one linear map for all records. Their weighted sum is taken of G and mapped once; their norms follow from
|G|, m a and b:  g^2 / s^2 (|G|^2 - m a^2 - f b^2 (2 - |h|^2) + 2 f a b <h, 1>), for any h, so for the rounded one too.
"""

import math
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from lightning_dp.gradients.parts import Order, Part, Rows
from lightning_dp.networks.standardised import MIN_SQUARES, StandardisedFrom

_MOST_ROUNDING: Final = 0.2


def rounding_margin(m: int, unit: float) -> float:
    """Return how far a squared norm may be off, in terms of |G|^2, as it is computed (docs/decisions.md, 2026-11-29).

    To first order and in any order of adding, |G|^2 is off by (m + 2) u |G|^2, m a^2 by 2 (m - 1), b^2 by 2 m, |h|^2 by
    m + 2 and the last term by 6 m - 4: 12 m - 2 in all. Double precision adds 48 u of its own at most, and terms of
    higher order are below what the divisor gives.

    Args:
        m: Entries of one output's weight.
        unit: Unit roundoff of the precision in which gradients are measured.
    """
    off = (m + 4) * unit
    return 12 * off / (1 - 4 * off) if off <= _MOST_ROUNDING else math.inf


class Standardisation:
    """The map of one weight, and what its gradients' norms follow from, taken while they are in the cache.

    Args:
        source: What the standardised weight was made of.
        num_records: How many gradients will come.
        order: How their entries lie; None where they lie as in the weight.
    """

    def __init__(self, source: StandardisedFrom, num_records: int, order: Order | None = None) -> None:
        centred, squares = source.centred.unsqueeze(0), source.squares.flatten()
        laid = (centred.flatten(2) if order is None else order.laid(centred)).squeeze(0)
        inverse = squares.clamp(min=MIN_SQUARES).rsqrt()
        self._unit = laid * inverse.unsqueeze(1)  # h, (outputs, m)
        self._is_free = (squares >= MIN_SQUARES).to(torch.float64)
        self.scale = source.gain.detach().flatten().to(torch.float64) * inverse
        self._lengths, self._totals, self.gains = self._unit.new_empty(3, num_records, len(squares))

    @staticmethod
    def takes(source: StandardisedFrom) -> bool:
        """Tell whether norms have a bound: not with millions of inputs in single precision."""
        unit = torch.finfo(source.centred.dtype).eps / 2
        return math.isfinite(rounding_margin(source.centred[0].numel(), unit))

    def measure(self, lines: Tensor, few: slice) -> None:
        """Take the norm, the sum, and the product with h of gradients.

        Args:
            lines: G of a few records, (k, outputs, m).
            few: Which of all records they are.
        """
        lines = lines.to(self._unit.dtype)  # under autocast they have fewer bits: exact copies
        torch.linalg.vector_norm(lines, dim=2, out=self._lengths[few])
        torch.sum(lines, dim=2, out=self._totals[few])
        torch.sum(lines * self._unit, dim=2, out=self.gains[few])  # no matrix product: a GPU may round its factors

    @property
    def unit_roundoff(self) -> float:
        """That of the precision in which gradients are measured."""
        return torch.finfo(self._unit.dtype).eps / 2

    def map(self, lines: Tensor) -> Tensor:
        """Return gradients of W, (n, outputs, m), from float64 ones of what it became, which are overwritten."""
        unit = self._unit.to(torch.float64)
        along = torch.linalg.vecdot(lines, unit) * self._is_free
        lines -= lines.mean(2, keepdim=True)
        return lines.addcmul_(along[:, :, None], unit, value=-1.0).mul_(self.scale[:, None])

    def squared_norms(self) -> Tensor:
        """Return those of the gradients of W, (n,), float64, as computed."""
        totals, along = (found.to(torch.float64) for found in (self._totals, self.gains))
        mean = totals / self._unit.shape[1]
        off_centre = self._unit.sum(1).to(torch.float64)
        twice = 2 - torch.linalg.vector_norm(self._unit, dim=1).to(torch.float64).square()
        lost = totals * mean + self._is_free * along * (along * twice - 2 * mean * off_centre)
        return ((self._squares - lost).clamp(min=0) * self.scale.square()).sum(1)

    def squared_masses(self) -> Tensor:
        """Return squares of what norms would be if nothing cancelled, (n,), float64."""
        # |G| + |a| sqrt(m) + |b| |h| is at most three times |G|, but for rounding.
        return 9.1 * (self._squares * self.scale.square()).sum(1)

    @cached_property
    def _squares(self) -> Tensor:
        lengths, m = self._lengths, self._unit.shape[1]
        return lengths.to(torch.float64).square() + m * torch.finfo(lengths.dtype).tiny


class StandardisedRows(Part):
    """Gradients of W.

    Args:
        rows: G.
        through: The map, which has measured them.
    """

    def __init__(self, rows: Rows, through: Standardisation) -> None:
        self._rows, self.through = rows, through

    def rows(self) -> Tensor:  # noqa: D102
        lines = self._rows.lines
        mapped = torch.cat([self.through.map(one.to(torch.float64, copy=True)).to(one.dtype) for one in lines.split(1)])
        return self._restored(mapped.flatten(1))

    @cached_property
    def squared_norms(self) -> Tensor:  # noqa: D102
        return self.through.squared_norms()

    @property
    def squared_bounds(self) -> Tensor:  # noqa: D102
        rounding = rounding_margin(self._rows.lines.shape[2], self.through.unit_roundoff)
        return self.squared_norms + rounding * self.squared_masses / 9

    @cached_property
    def squared_masses(self) -> Tensor:  # noqa: D102
        return self.through.squared_masses()

    def add_weighted_sum(self, weights: Tensor, total: Tensor) -> None:  # noqa: D102
        lines = self._rows.lines
        summed = total.new_zeros(1, *lines.shape[1:])
        Rows(lines).add_weighted_sum(weights, summed.view(-1))
        total += self._restored(self.through.map(summed).flatten(1)).squeeze(0)

    def silence(self, is_silent: Tensor) -> Part:  # noqa: D102
        return StandardisedRows(self._rows.silence(is_silent), self.through)

    @property
    def num_bytes(self) -> int:  # noqa: D102
        return self._rows.num_bytes

    def _restored(self, values: Tensor) -> Tensor:
        return values if self._rows.order is None else self._rows.order.restored(values)

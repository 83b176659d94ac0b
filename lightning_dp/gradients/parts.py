"""What the per-record gradients of one parameter are made of: rows, or two factors whose product is never formed.

Every part states a norm per record that its contribution to a weighted sum provably does not exceed, as computed, and
sums in double precision (docs/decisions.md, "What rounding may do to a weighted sum").
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from lightning_dp.errors import PrivacyProtocolError
from lightning_dp.mechanisms.rows import entries_at_once

# A number of a row costs about as much to write, measure and sum as this many multiplications (docs/performance.md).
_TRAFFIC: Final = 30
_BLOCK_ENTRIES: Final = 2**18
_CACHED_ENTRIES: Final = 2**18
_LONGEST_LINE: Final = 2**16  # entries whose squares are added in one go: their rounding stays small beside one
_MEASURED_ENTRIES: Final = 2**17  # a megabyte of exact copies, which fits where maps in single precision were freed


@dataclass(frozen=True)
class Order:
    """How the entries of a gradient lie in memory, and how they are to be handed out.

    Attributes:
        sizes: Lengths of the axes as they lie.
        axes: The same axes in the order of the parameter.
    """

    sizes: tuple[int, ...]
    axes: tuple[int, ...]

    def restored(self, values: Tensor) -> Tensor:
        """Return values, (..., m), in the order of the parameter."""
        leading = values.dim() - 1
        axes = (*range(leading), *(leading + axis for axis in self.axes))
        return values.unflatten(-1, self.sizes).permute(axes).flatten(leading)

    def laid(self, values: Tensor) -> Tensor:
        """Return values in the shape of the parameter, (n, *shape), as they lie: (n, first size, rest)."""
        back = sorted(range(len(self.axes)), key=lambda place: self.axes[place])
        return values.permute(0, *(1 + place for place in back)).flatten(2)


class Part(ABC):
    """A share of the gradients of n records with respect to one parameter of m entries."""

    @abstractmethod
    def rows(self) -> Tensor:
        """Return the gradients, (n, m)."""

    @property
    @abstractmethod
    def squared_norms(self) -> Tensor:
        """Return squared norms as computed, (n,), float64."""

    @property
    @abstractmethod
    def squared_bounds(self) -> Tensor:
        """Return numbers that the squared norms, computed without rounding, do not exceed, (n,), float64."""

    @property
    @abstractmethod
    def squared_masses(self) -> Tensor:
        """Return the squares of what the norms would be if nothing cancelled in the sums to come, (n,), float64."""

    @abstractmethod
    def add_weighted_sum(self, weights: Tensor, total: Tensor) -> None:
        """Add the sum over records of weight times gradient to a total.

        Args:
            weights: (n,), float64.
            total: (m,), float64, in one piece.
        """

    @abstractmethod
    def silence(self, is_silent: Tensor) -> "Part":
        """Return the part with the gradients of some records, (n,), replaced by zeros."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Memory that the part holds."""


class Rows(Part):
    """Gradients as they are.

    Args:
        values: (n, ...).
        order: Of the entries; None where they lie as in the parameter.
        lengths: Norms along the last axis of `values`, (n, lines), at least in single precision; None to have them
            computed.
    """

    def __init__(self, values: Tensor, order: Order | None = None, lengths: Tensor | None = None) -> None:
        self._values, self.order, self._lengths = values, order, lengths

    def rows(self) -> Tensor:  # noqa: D102
        rows = self._values.flatten(1)
        return rows if self.order is None else self.order.restored(rows)

    @cached_property
    def squared_norms(self) -> Tensor:  # noqa: D102
        # In their own precision, or single, along the last axis: squares do not cancel, so their rounding has a bound.
        lines, lengths = self.lines, self._lengths
        if lengths is None:
            parts = [_norms(part) for part in lines.split(_LONGEST_LINE, dim=-1)]
            lengths = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return lengths.to(torch.float64).square().sum(1)

    @property
    def squared_bounds(self) -> Tensor:  # noqa: D102
        lines = self.lines
        measured = torch.finfo(_precision(lines))
        # m squares, in any order, are off by a factor of at most 1 + 2 m u; a root and what underflows come on top.
        relative = 1 + (min(lines.shape[-1], _LONGEST_LINE) + 4) * measured.eps
        return self.squared_norms * relative + math.prod(lines.shape[1:]) * measured.tiny

    @property
    def squared_masses(self) -> Tensor:  # noqa: D102
        return self.squared_norms

    def add_weighted_sum(self, weights: Tensor, total: Tensor) -> None:  # noqa: D102
        if self.order is not None:
            summed = torch.zeros_like(total)
            Rows(self._values).add_weighted_sum(weights, summed)
            total += self.order.restored(summed)
            return
        rows = self._values.flatten(1)
        width = _block_width(rows)
        exact = rows.new_empty(width * len(rows), dtype=torch.float64)
        for block, share in zip(rows.split(width, dim=1), total.split(width), strict=True):
            few = exact[: block.numel()].view_as(block).copy_(block)
            share.addmv_(few.T, weights)

    def shaped(self, shape: torch.Size) -> tuple[Tensor, Order | None]:
        """Return the gradients in the shape of the parameter, (n, *shape), and how they lie in memory."""
        rows = self._values.flatten(1)
        if self.order is None:
            return rows.unflatten(1, shape), None
        axes = (0, *(1 + axis for axis in self.order.axes))
        return rows.unflatten(1, self.order.sizes).permute(axes), self.order

    def silence(self, is_silent: Tensor) -> "Rows":  # noqa: D102
        return Rows(self.lines.masked_fill(is_silent[:, None, None], 0.0), self.order)

    @property
    def num_bytes(self) -> int:  # noqa: D102
        return self._values.numel() * self._values.element_size()

    @property
    def lines(self) -> Tensor:
        """The gradients as they lie, in lines of which each has one sum of squares, (n, lines, entries)."""
        return self._values if self._values.dim() == 3 else self._values.flatten(1).unsqueeze(1)


class Product(Part):
    """The sum over T places of an outer product, (p, d), of two factors of each record; never formed.

    Norms come from the inner products of the factors at two places (T^2 (p + d) multiplications instead of T p d), and
    the weighted sum over records is one matrix product. Both in double precision, from exact copies.

    Args:
        left: (n, T, p).
        right: (n, T, d).
        order: Of the entries; None where they lie as in the parameter.
    """

    def __init__(self, left: Tensor, right: Tensor, order: Order | None = None) -> None:
        self._left, self._right, self._order = left, right, order
        self._versions = (left._version, right._version)

    def _factors(self) -> tuple[Tensor, Tensor]:
        # They are what the network computed with: a write to them between norm and sum would void the bound.
        if (self._left._version, self._right._version) != self._versions:
            raise PrivacyProtocolError(
                "The inputs or output gradients of a layer were overwritten before they were summed."
            )
        return self._left, self._right

    def rows(self) -> Tensor:  # noqa: D102
        left, right = self._factors()
        rows = torch.bmm(left.mT.to(torch.float64), right.to(torch.float64)).flatten(1)
        return rows if self._order is None else self._order.restored(rows)

    @cached_property
    def squared_norms(self) -> Tensor:  # noqa: D102
        if self._left.shape[1] == 1:
            return self.squared_masses
        inner = []
        for factor in self._factors():
            exact = factor.to(torch.float64)
            inner.append(torch.bmm(exact, exact.mT))  # (n, T, T)
        return inner[0].mul_(inner[1]).sum((1, 2)).clamp(min=0)

    @property
    def squared_bounds(self) -> Tensor:  # noqa: D102
        places, terms = self._left.shape[1], self._left.shape[2] + self._right.shape[2]
        rounding = 2 * (places * places + terms + 4) * torch.finfo(torch.float64).eps
        return self.squared_norms + rounding * self.squared_masses

    @cached_property
    def squared_masses(self) -> Tensor:  # noqa: D102
        left, right = (_lengths(factor) for factor in self._factors())
        return (left * right).sum(1).square()

    def add_weighted_sum(self, weights: Tensor, total: Tensor) -> None:  # noqa: D102
        left, right = self._factors()
        left, right = left.flatten(0, 1), right.flatten(0, 1).to(torch.float64)
        weights = weights.repeat_interleave(len(left) // len(weights))[:, None]
        summed = total if self._order is None else torch.zeros_like(total)
        width = _block_width(left)
        for few, share in zip(left.split(width, dim=1), summed.view(-1, right.shape[1]).split(width), strict=True):
            share.addmm_(few.to(torch.float64, copy=True).mul_(weights).T, right)
        if self._order is not None:
            total += self._order.restored(summed)

    def silence(self, is_silent: Tensor) -> Part:  # noqa: D102
        is_silent = is_silent[:, None, None]
        left, right = (factor.masked_fill(is_silent, 0.0) for factor in self._factors())
        return Product(left, right, self._order)

    @property
    def num_bytes(self) -> int:  # noqa: D102
        return self._left.nbytes + self._right.nbytes


def _precision(values: Tensor) -> torch.dtype:
    """Return that in which norms are taken: of fewer bits, they would be known to a few percent."""
    return torch.promote_types(values.dtype, torch.float32)


def _norms(lines: Tensor) -> Tensor:
    return torch.linalg.vector_norm(lines, dim=-1, dtype=_precision(lines))


def _block_width(rows: Tensor) -> int:
    """Return how many columns of (n, m) to copy exactly at a time: equal blocks, which fit where others were freed."""
    num_blocks = math.ceil(rows.numel() / entries_at_once(_BLOCK_ENTRIES, rows.device))
    return max(1, math.ceil(rows.shape[1] / max(1, num_blocks)))


def _lengths(factor: Tensor) -> Tensor:
    """Return the norms at each place, (n, T), in double precision, a few records' exact copies at a time."""
    few = max(1, entries_at_once(_MEASURED_ENTRIES, factor.device) // max(1, factor[0].numel()))
    return torch.cat([torch.linalg.vector_norm(part.to(torch.float64), dim=2) for part in factor.split(few)])


def product(
    left: Tensor,
    right: Callable[[slice], Tensor],
    d: int,
    *,
    as_rows: bool,
    order: Order | None = None,
    measure: Callable[[Tensor, slice], None] | None = None,
) -> Part:
    """Return the gradients sum_t left_t x right_t as rows, or as factors where that is cheaper.

    Args:
        left: (n, T, p).
        right: Returns (few, T, d) of a few records.
        d: Entries of the right factor at one place.
        as_rows: Rows are wanted whatever they cost.
        order: Of the entries; None where they lie as in the parameter.
        measure: Sees the rows of a few records, (few, p, d), while they are in the cache; None to take norms.
    """
    n, places, p = left.shape
    if measure is None and not as_rows and places * (1 + places * (p + d) / (p * d)) < _TRAFFIC:
        return Product(left, right(slice(0, n)), order)
    rows = left.new_empty(n, p, d)
    lengths = left.new_empty(n, p, dtype=_precision(left)) if measure is None and d <= _LONGEST_LINE else None
    cached = entries_at_once(_CACHED_ENTRIES, left.device)
    for some in _few_at_a_time(0, n, cached // (p * d)):
        for few in _few_at_a_time(some.start, some.stop, cached // (places * d)):
            torch.bmm(left[few].mT, right(few), out=rows[few])
        if measure is not None:
            measure(rows[some], some)
        elif lengths is not None:
            torch.linalg.vector_norm(rows[some], dim=2, dtype=lengths.dtype, out=lengths[some])
    return Rows(rows, order, lengths)


def _few_at_a_time(start: int, stop: int, few: int) -> Iterator[slice]:
    few = max(1, few)
    return (slice(at, min(at + few, stop)) for at in range(start, stop, few))

"""Rows that need not be formed, for mechanisms that decide by norms alone; per-record gradients are the first."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor, nn
from torch.func import vmap

from lightning_dp.errors import PrivacyProtocolError
from lightning_dp.gradients.overheard import Overhearing, UnsupportedNetwork
from lightning_dp.gradients.parts import Part, Rows
from lightning_dp.gradients.per_record import RecordLoss, trainable_parameters
from lightning_dp.gradients.teachers import RowChunk
from lightning_dp.gradients.uncompiled import uncompiled
from lightning_dp.mechanisms.rows import entries_at_once

# What the sums in double precision over a release may be off by, and how much may cancel before norms are raised.
_SUM_MARGIN: Final = 1e-5
_MOST_CANCELLED: Final = 64.0
_CACHED_ENTRIES: Final = 2**20


class SummableRows(ABC):
    """Rows of n records for one vector of a release: norms and weighted sums without rows, and rows for who wants them.

    Attributes:
        ids: Stable ids, int64, (n,).
        place: Number of the vector.
    """

    ids: Tensor
    place: int = 0

    @property
    @abstractmethod
    def norm_bounds(self) -> Tensor:
        """Norms that the contributions to a weighted sum do not exceed, rounding included, (n,), float64. Private."""

    @abstractmethod
    def add_weighted_sum(self, weights: Tensor, total: Tensor) -> None:
        """Add the sum of weight times row to a total, once; a record of weight zero adds nothing at all.

        What rows are made of may go on the way, so that sums and what is summed need not stand at the same time.

        Args:
            weights: (n,), float64, finite.
            total: (D,), float64, in one piece.
        """

    @abstractmethod
    def row_chunks(self) -> Iterator[RowChunk]:
        """Yield the rows, few enough at a time to stay in the cache."""


class RecordGradients(SummableRows):
    """The gradients of n records.

    Args:
        ids: Stable ids, int64, (n,).
        parts: Of each trained parameter, in the order in which rows are flattened; none where the loss does not use it.
        sizes: Entries of each parameter.
        num_bytes_seen: Memory that the layers' inputs and outputs took while the parts were made, about.
    """

    def __init__(self, ids: Tensor, parts: list[list[Part]], sizes: list[int], num_bytes_seen: int = 0) -> None:
        self.ids = ids
        self._num_bytes_seen = num_bytes_seen
        self._held: list[Part | None] | None = [_joined(few) for few in parts]
        self._sizes = sizes

    @property
    def _parts(self) -> list[Part | None]:
        if self._held is None:
            raise PrivacyProtocolError("The gradients of these records were summed and let go; make them again.")
        return self._held

    @property
    def norms(self) -> Tensor:
        """Norms as computed, (n,), float64; not finite where a gradient is not. Private."""
        return self._over_parts("squared_norms").sqrt()

    @property
    def norm_bounds(self) -> Tensor:  # noqa: D102
        bounds = self._over_parts("squared_bounds")
        masses = self._over_parts("squared_masses") / _MOST_CANCELLED**2
        return torch.maximum(bounds, masses).sqrt() * (1 + _SUM_MARGIN)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Return the sum of weight times gradient, (D,), float64, and keep what it is made of."""
        total = torch.zeros(sum(self._sizes), dtype=torch.float64, device=weights.device)
        self._add(list(self._parts), weights, total)
        return total

    def add_weighted_sum(self, weights: Tensor, total: Tensor) -> None:  # noqa: D102
        parts, self._held = self._parts, None
        self._add(parts, weights, total)

    def _add(self, parts: list[Part | None], weights: Tensor, total: Tensor) -> None:
        """Add the weighted sum of parts, each of which leaves the list when its turn comes."""
        is_silent = weights == 0
        some_are_silent = bool(is_silent.any())
        for place, share in enumerate(total.split(self._sizes)):
            part, parts[place] = parts[place], None
            if part is not None:
                # Selected, not multiplied: 0 * NaN is NaN.
                heard = part.silence(is_silent) if some_are_silent else part
                heard.add_weighted_sum(weights, share)

    def row_chunks(self) -> Iterator[RowChunk]:  # noqa: D102
        num = len(self.ids)
        pieces = max(1, entries_at_once(_CACHED_ENTRIES, self.ids.device) // sum(self._sizes))
        filled = [part.rows() for part in self._parts if part is not None]
        for few in torch.arange(num, device=self.ids.device).split(pieces):
            found = iter(filled)
            columns = [
                filled[0].new_zeros(len(few), size) if part is None else next(found)[few]
                for part, size in zip(self._parts, self._sizes, strict=True)
            ]
            yield RowChunk(self.ids[few], torch.cat(columns, dim=1).unsqueeze(1), slice(0, 1))

    @property
    def num_bytes(self) -> int:
        """Memory that making and keeping the parts takes, about."""
        return self._num_bytes_seen + sum(part.num_bytes for part in self._parts if part is not None)

    def _over_parts(self, name: str) -> Tensor:
        total = torch.zeros(len(self.ids), dtype=torch.float64, device=self.ids.device)
        for part in self._parts:
            if part is not None:
                total += getattr(part, name)
        return total


RecordChunk = RowChunk | SummableRows
"""What a release takes of some records."""


def rows_of(chunk: RecordChunk) -> Iterator[RowChunk]:
    """Yield the rows of a chunk."""
    if isinstance(chunk, RowChunk):
        yield chunk
    else:
        yield from chunk.row_chunks()


def _joined(parts: list[Part]) -> Part | None:
    """Return the one part of a parameter; one that is used in several places has the sum of its rows."""
    if len(parts) <= 1:
        return parts[0] if parts else None
    total = parts[0].rows().clone()
    for part in parts[1:]:
        total += part.rows()
    return Rows(total)


def overheard_gradients(
    network: nn.Module, loss: RecordLoss, records: tuple[Tensor, ...], *, ids: Tensor, as_rows: bool
) -> RecordGradients:
    """Return the gradients of `loss` at each record from one backward pass.

    `vmap` runs the loss of one record for all of them, so no record sees another, whatever the loss is; only the
    layers that use trained parameters are handed all records, and treat them alike. A gradient that reaches a trained
    parameter on any other way than through such a layer is noticed.

    Args:
        network: See `per_record_rows`.
        loss: See `per_record_rows`.
        records: See `per_record_rows`; at least one.
        ids: Stable ids, int64, (n,).
        as_rows: Form the gradient of every record; otherwise factors may be kept.

    Raises:
        UnsupportedNetwork: Some use of a trained parameter cannot be overheard.
    """
    trained = trainable_parameters(network)
    parameters = list(trained.values())

    def one_loss(*record: Tensor) -> Tensor:
        return loss(network, *(tensor.unsqueeze(0) for tensor in record))

    with torch.enable_grad():
        overhearing = Overhearing(as_rows=as_rows)
        with uncompiled(), overhearing:
            losses = _side_by_side(one_loss, records)
        anchors = [overhearing.anchor] if overhearing.anchor is not None else []
        if losses.requires_grad:
            overhearing.is_listening = True
            elsewhere = torch.autograd.grad(losses.sum(), [*anchors, *parameters], allow_unused=True)[len(anchors) :]
            for name, gradient in zip(trained, elsewhere, strict=True):
                if gradient is not None:
                    raise UnsupportedNetwork(f"{name} is used by another operation than a supported layer")
        parts = _by_parameter(overhearing.found, parameters)
    sizes = [parameter.numel() for parameter in parameters]
    return RecordGradients(ids, parts, sizes, overhearing.num_bytes)


def _side_by_side(one_loss: Callable[..., Tensor], records: tuple[Tensor, ...]) -> Tensor:
    try:
        losses: Tensor = vmap(one_loss)(*records)
        return losses
    except RuntimeError as error:
        if not str(error).startswith("Batching rule not implemented"):
            raise
        # functorch has another rule for some of these, a record after the other.
        raise UnsupportedNetwork(str(error).split(". ")[0]) from error


def _by_parameter(found: list[tuple[Tensor, Part]], parameters: list[nn.Parameter]) -> list[list[Part]]:
    """Return the parts of each parameter; those of what was computed from parameters are carried back to them."""
    parts: list[list[Part]] = [[] for _ in parameters]
    position = {id(parameter): index for index, parameter in enumerate(parameters)}
    for weight, part in found:
        if id(weight) in position:
            parts[position[id(weight)]].append(part)
            continue
        rows = part if isinstance(part, Rows) else Rows(part.rows())
        for index, carried in _carried_back(weight, rows, parameters):
            parts[index].append(carried)
    return parts


def _carried_back(weight: Tensor, rows: Rows, parameters: list[nn.Parameter]) -> Iterator[tuple[int, Rows]]:
    """Yield the per-record gradients of parameters from those of a weight that was computed from them."""
    at_once = max(1, entries_at_once(_CACHED_ENTRIES, weight.device) // weight.numel())
    given, order = rows.shaped(weight.shape)
    carried: dict[int, Tensor] = {}
    for start in range(0, len(given), at_once):
        few = slice(start, start + at_once)
        gradients = torch.autograd.grad(
            weight, parameters, given[few], retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            if index not in carried:
                like = (
                    given if gradient.shape[1:] == weight.shape else gradient[:1].expand(len(given), *gradient[0].shape)
                )
                carried[index] = torch.empty_like(like)
            carried[index][few] = gradient
    for index, values in carried.items():
        if order is not None and values.shape == given.shape:
            yield index, Rows(order.laid(values), order)
        else:
            yield index, Rows(values.flatten(min(2, values.dim() - 1)))

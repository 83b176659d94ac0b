"""Gradients of a loss at each record by itself: the rows of every record-level method."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lightning_dp.gradients.teachers import RowChunk
from lightning_dp.gradients.uncompiled import uncompiled
from lightning_dp.mechanisms.rows import entries_at_once

_CACHED_ENTRIES = 2**20

RecordLoss = Callable[..., Tensor]
"""Takes the network and one record (each of its tensors with a leading axis of length 1); returns a scalar."""


def trainable_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name, in the order in which rows are flattened."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def row_segments(network: nn.Module) -> tuple[int, ...]:
    """Return the lengths of a row's parts, one for each trained parameter; public, they follow from the network."""
    return tuple(parameter.numel() for parameter in trainable_parameters(network).values())


def per_record_rows(
    network: nn.Module,
    loss: RecordLoss,
    records: tuple[Tensor, ...],
    *,
    chunk_size: int,
    ids: Tensor | None = None,
) -> Iterator[RowChunk]:
    """Yield the gradient of `loss` at each record, a chunk of records at a time.

    No record sees another: the loss is called with one record, and `vmap` only runs the calls side by side. The result
    does not depend on `chunk_size`, which bounds memory: a chunk takes 4 D bytes a record, and the forward pass.

    Args:
        network: Its trained parameters, flattened in the order of `named_parameters`, are the columns of a row.
            Frozen ones are left out; layers that couple records or draw random numbers are refused by `vmap`.
        loss: Called as `loss(network, *record)`; must be a function of its arguments alone. Random numbers that it
            needs (noise of a latent, views of an image) come in as tensors of `records`, so that they belong to their
            record whatever else is in the batch.
        records: Tensors with the records along their first axis, (n, ...); n may be 0, which yields nothing.
        chunk_size: Records differentiated at once, >= 1; nothing but speed and memory depend on it.
        ids: Stable row ids, int64, (n,); positions in the batch if None.

    Yields:
        Chunks of at most `chunk_size` records, values (n, 1, D): gradients (not descent directions), private.

    Raises:
        ValueError: `chunk_size` is below 1, or the tensors of `records` differ in length.
    """
    num_records = len(records[0])
    if chunk_size < 1:
        raise ValueError(f"Expected chunk_size >= 1, got chunk_size={chunk_size}.")
    if any(len(tensor) != num_records for tensor in records):
        raise ValueError(f"Expected records of one length, got {[len(tensor) for tensor in records]}.")
    ids = torch.arange(num_records, device=records[0].device) if ids is None else ids
    parameters = {f"network.{name}": p.detach() for name, p in trainable_parameters(network).items()}
    with_loss = _RecordLoss(network, loss)

    def one_loss(values: dict[str, Tensor], *record: Tensor) -> Tensor:
        result: Tensor = functional_call(with_loss, values, tuple(tensor.unsqueeze(0) for tensor in record))
        return result

    gradients = vmap(grad(one_loss), in_dims=(None, *(0 for _ in records)))
    for start in range(0, num_records, chunk_size):
        part = slice(start, start + chunk_size)
        with uncompiled():
            found = gradients(parameters, *(tensor[part] for tensor in records))
        rows = torch.cat([value.flatten(1) for value in found.values()], dim=1)  # (n, D)
        # Differentiating likes many records at once, encoding likes what fits the cache.
        pieces = max(1, entries_at_once(_CACHED_ENTRIES, rows.device) // rows.shape[1])
        for few, few_ids in zip(rows.split(pieces), ids[part].split(pieces), strict=True):
            yield RowChunk(few_ids, few.unsqueeze(1), slice(0, 1))


class _RecordLoss(nn.Module):
    """Makes the loss a forward pass, so that `functional_call` replaces parameters wherever the loss uses them."""

    def __init__(self, network: nn.Module, loss: RecordLoss) -> None:
        super().__init__()
        self.network = network
        self.loss = loss

    def forward(self, *record: Any) -> Tensor:
        return self.loss(self.network, *record)

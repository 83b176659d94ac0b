"""How per-record gradients are made, and of how many records at a time: speed and memory, never the result."""

import logging
from collections.abc import Iterator
from typing import Final, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.failing_layer import FailingLayer
from lightning_dp.gradients.overheard import UnsupportedNetwork
from lightning_dp.gradients.per_record import RecordLoss, per_record_rows
from lightning_dp.gradients.record_gradients import RecordChunk, RecordGradients, overheard_gradients

GradientMode = Literal["auto", "ghost", "materialize", "functorch"]

_CPU_BUDGET: Final = 128_000_000
_BUDGET_PER_PARAMETER: Final = 32  # what a chunk costs whatever its size grows with the parameters
_CUDA_FREE_FRACTION: Final = 0.25
_FEW_RECORDS: Final = 32  # fewer in a chunk pay too often for what a chunk costs: half a step of a wide ResNet at 8
_FEW_BUDGET: Final = 1_000_000_000
_MOST_RECORDS: Final = 512
_FUNCTORCH_RECORDS: Final = 64

_logger = logging.getLogger(__name__)


class GradientSource:
    """Makes the gradients of records, in the way that was asked for.

    Args:
        mode: functorch differentiates one record at a time under `vmap` (the reference, for any loss). materialize
            forms the gradient of every record from what its layers saw in one backward pass; ghost forms as few of
            them as it can. auto is ghost, and functorch where a network or loss does not allow it.
        chunk_size: Records at a time; None fits it to cache and memory.

    Attributes:
        at_once: What `records_at_once` has found; None before it was asked.

    Raises:
        ConfigurationError: The mode is unknown.
    """

    def __init__(self, mode: GradientMode, chunk_size: int | None) -> None:
        if mode not in get_args(GradientMode):
            raise ConfigurationError(f"Expected model.gradients in {', '.join(get_args(GradientMode))}, got {mode!r}.")
        self.mode = mode
        self.chunk_size = chunk_size
        self.at_once: int | None = chunk_size
        self._reason: str | None = None

    def gradients(
        self, network: nn.Module, loss: RecordLoss, records: tuple[Tensor, ...], *, ids: Tensor
    ) -> Iterator[RecordChunk]:
        """Yield the gradients of `loss` at each of a few records; see `per_record_rows`.

        Raises:
            ConfigurationError: ghost or materialize was asked for and cannot be had.
        """
        if not len(ids):
            return
        if self.mode != "functorch" and self._reason is None:
            try:
                found = self._overheard(network, loss, records, ids)
            except UnsupportedNetwork as problem:
                self._fall_back(str(problem))
            else:
                yield found
                return
        yield from per_record_rows(network, loss, records, chunk_size=len(ids), ids=ids)

    def rehearse(self, network: nn.Module, loss: RecordLoss, record: tuple[Tensor, ...]) -> None:
        """Make the gradient of one record and drop it, so that what cannot be had is said before anything is released.

        Args:
            network: See `per_record_rows`.
            loss: See `per_record_rows`.
            record: One record; what it holds does not matter.

        Raises:
            ConfigurationError: There is none; names the layer.
        """
        with FailingLayer(network):
            for _ in self.gradients(network, loss, record, ids=torch.zeros(1, dtype=torch.int64)):
                pass

    def records_at_once(self, network: nn.Module, loss: RecordLoss, records: tuple[Tensor, ...]) -> int:
        """Return how many records to pass to `gradients`; looks at the shapes of one record, not at its values.

        Args:
            network: See `per_record_rows`.
            loss: See `per_record_rows`.
            records: At least one record.
        """
        if self.at_once is None:
            self.at_once = self._fitting(network, loss, tuple(torch.zeros_like(tensor[:1]) for tensor in records))
        return self.at_once

    def _fitting(self, network: nn.Module, loss: RecordLoss, one: tuple[Tensor, ...]) -> int:
        """Return how many times a record fits the memory, from a pass over one."""
        if self.mode != "functorch":
            try:
                found = self._overheard(network, loss, one, torch.zeros(1, dtype=torch.int64, device=one[0].device))
            except UnsupportedNetwork as problem:
                self._fall_back(str(problem))
            else:
                memory = _memory(one[0].device, sum(p.numel() for p in network.parameters() if p.requires_grad))
                size = max(1, found.num_bytes)
                return max(1, min(_MOST_RECORDS, max(memory // size, min(_FEW_RECORDS, _FEW_BUDGET // size))))
        return _FUNCTORCH_RECORDS

    def _overheard(
        self, network: nn.Module, loss: RecordLoss, records: tuple[Tensor, ...], ids: Tensor
    ) -> RecordGradients:
        return overheard_gradients(network, loss, records, ids=ids, as_rows=self.mode == "materialize")

    def _fall_back(self, reason: str) -> None:
        if self.mode != "auto":
            raise ConfigurationError(
                f"model.gradients={self.mode} cannot be had: {reason}. Use auto, which takes functorch then."
            )
        self._reason = reason
        _logger.info(f"Per-record gradients are taken by functorch: {reason}.")


def _memory(device: torch.device, num_parameters: int) -> int:
    if device.type == "cuda":
        return int(_CUDA_FREE_FRACTION * torch.cuda.mem_get_info(device)[0])
    return _CPU_BUDGET + _BUDGET_PER_PARAMETER * num_parameters

"""How many teachers are worked on at a time: as many as cache and memory hold, which changes nothing but speed."""

from typing import Final

import torch
from torch import Tensor

from lightning_dp.networks.discriminator import Discriminator

# Measured (docs/performance.md): on a CPU, chunks that stay in the cache win.
CPU_CHUNKS: Final[dict[tuple[str, str], int]] = {
    ("datalens", "loop"): 8,
    ("datalens", "stacked"): 8,
    ("gswgan", "loop"): 8,
    ("gswgan", "stacked"): 8,
    ("small_conv", "loop"): 16,
    ("small_conv", "stacked"): 12,
    ("mlp", "loop"): 16,
    ("mlp", "stacked"): 64,
}
CPU_MEMORY_BUDGET: Final = 1_500_000_000
CUDA_FREE_FRACTION: Final = 0.5


class ChunkSizes:
    """Fits chunks of teachers to the cache of a CPU or the memory of a device.

    Args:
        network: The architecture, on its device.
        sample_shape: Shape of one sample.
        num_classes: Number of labels.
        bytes_per_teacher: Memory of one teacher's parameters.
        num_lent: As many times these are lent to the device while a chunk is at work.
        preferred: Teachers at a time that the cache of a CPU holds.
    """

    def __init__(
        self,
        network: Discriminator,
        *,
        sample_shape: tuple[int, ...],
        num_classes: int,
        bytes_per_teacher: int,
        num_lent: int = 0,
        preferred: int,
    ) -> None:
        device = next(network.parameters()).device
        self._budget = _memory_budget(device)
        self._most = None if device.type == "cuda" else preferred
        self._bytes_per_sample = saved_bytes_per_sample(network, sample_shape, num_classes)
        self._bytes_per_teacher, self._num_lent = bytes_per_teacher, num_lent

    def fitting(self, samples: int) -> int:
        """Return how many teachers fit that work on so many samples each, at least one."""
        # Gradients and their contiguous copy; activations, their gradients and one working copy.
        per_teacher = (2 + self._num_lent) * self._bytes_per_teacher + 3 * samples * self._bytes_per_sample
        most = self._budget // per_teacher
        return max(1, most if self._most is None else min(self._most, most))


def _memory_budget(device: torch.device) -> int:
    """Return bytes for one chunk. Asked once: later the allocator's own cache would count as used."""
    if device.type != "cuda":
        return CPU_MEMORY_BUDGET
    free, _ = torch.cuda.mem_get_info(device)
    return int(CUDA_FREE_FRACTION * free)


def saved_bytes_per_sample(network: Discriminator, sample_shape: tuple[int, ...], num_classes: int) -> int:
    """Return how many bytes one sample leaves behind between the forward and the backward pass.

    Args:
        network: The architecture, on its device.
        sample_shape: Shape of one sample.
        num_classes: Number of labels.
    """
    like, saved = next(network.parameters()), [0]
    batch = network.min_batch
    parameters = {parameter.data_ptr() for parameter in network.parameters()}

    def count(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            saved[0] += tensor.numel() * tensor.element_size()
        return tensor

    samples = torch.zeros(batch, *sample_shape, dtype=like.dtype, device=like.device)
    one_hot = torch.zeros(batch, num_classes, dtype=like.dtype, device=like.device)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        network(samples, one_hot)
    return saved[0] // batch + samples[0].numel() * samples.element_size()

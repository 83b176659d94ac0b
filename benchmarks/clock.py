"""The clock and the memory of a device: CPU seconds of this process, or those of the wall around a GPU's work."""

import time

from lightning_dp.evaluation.peak_memory import peak_resident_bytes


def now(device: str) -> float:
    """Return seconds on the clock of a device: CPU time, or the wall's once a GPU has done all that it was given."""
    if device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(device: str) -> int:
    """Return the most memory that was held so far: resident in this process, or allocated on a GPU."""
    if device == "cpu":
        return peak_resident_bytes()
    import torch

    return torch.cuda.max_memory_allocated()

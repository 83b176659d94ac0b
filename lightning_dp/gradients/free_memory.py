"""How much memory is left: of a device, or of this process on its machine, in its container and within its limits."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch

_CGROUPS: Final = Path("/sys/fs/cgroup")
_CONTAINER_FILES: Final = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
_PROC: Final = Path("/proc")
_UNLIMITED: Final = 2**60


def free_memory(device: torch.device) -> int | None:
    """Return how many bytes more can be had, None where that is not known (macOS, say).

    Args:
        device: Where they are wanted. On a CPU the least counts of what the machine has (swap included), what the
            container may take, and what `ulimit` leaves.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    return min((*_of_the_machine(), *_of_the_container(), *_of_the_limits()), default=None)


@contextmanager
def no_more_than_free() -> Iterator[None]:
    """Let allocations beyond what is free fail at once: else the kernel ends the process when they are filled."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    used, free = _sizes(_PROC / "self" / "status").get("VmData"), free_memory(torch.device("cpu"))
    if used is None or free is None:
        yield
        return
    resource.setrlimit(resource.RLIMIT_DATA, (used + free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _of_the_machine() -> Iterator[int]:
    found = _sizes(_PROC / "meminfo")
    if "MemAvailable" in found:
        yield found["MemAvailable"] + found.get("SwapFree", 0)


def _of_the_container() -> Iterator[int]:
    for limit, used in _CONTAINER_FILES:
        try:
            most, now = int((_CGROUPS / limit).read_text()), int((_CGROUPS / used).read_text())
        except (OSError, ValueError):  # "max", or no container
            continue
        if most < _UNLIMITED:
            # What files were read lies in the cache, and makes room.
            yield max(0, most - now) + _cached(_CGROUPS / limit)


def _cached(limit: Path) -> int:
    try:
        lines = (limit.parent / "memory.stat").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.split()[0] in ("inactive_file", "active_file"))
    except (OSError, ValueError, IndexError):
        return 0


def _of_the_limits() -> Iterator[int]:
    used = _sizes(_PROC / "self" / "status")
    for limit, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY and name in used:
            yield max(0, most - used[name])


def _sizes(path: Path) -> dict[str, int]:
    """Return the lines "Name: 12 kB" of a file of the kernel, in bytes."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1:] == ["kB"]}

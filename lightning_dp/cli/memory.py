"""Memory that was freed stays with the process, for the next step wants as much again."""

import ctypes
import sys
from contextlib import suppress
from typing import Final

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt's settings in glibc's malloc.h
_KEPT: Final = 2**30  # bytes
_LARGE: Final = (2**28, 2**25)  # bytes; the second is the most that an older glibc takes


def keep_freed_memory() -> None:
    """Let glibc keep up to a gigabyte that was freed, instead of giving it back to the system after every step.

    What comes back from the system is cleared and mapped again, a fault for every 4 KB: up to a third of the time of a
    step on a busy machine (docs/performance.md). Elsewhere than on Linux, or with another allocator, nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, _KEPT)
        # Otherwise what is larger has pages of its own, which go at once.
        any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGE)

"""The most memory that this process has held."""

import resource
import sys
from pathlib import Path


def peak_resident_bytes() -> int:
    """Return the peak of this program's resident memory, in bytes.

    Linux keeps it per program; `ru_maxrss`, all that other systems have, begins there with the peak of the process that
    started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

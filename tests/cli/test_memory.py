"""Freed memory is not given back to the system after every step."""

import subprocess
import sys

import pytest

FAULTS = """
import resource
from lightning_dp.cli.memory import keep_freed_memory

def step():
    for large in [bytearray(b"x") * 2**24 for _ in range(4)]:
        large[::4096]

if {kept}:
    keep_freed_memory()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*, kept):
    command = [sys.executable, "-c", FAULTS.format(kept=kept)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_a_step_finds_the_memory_of_the_last_one():
    assert faults(kept=True) * 10 < faults(kept=False)

"""The peak of a process is its own."""

import subprocess
import sys

import numpy as np

from lightning_dp.evaluation.peak_memory import peak_resident_bytes


def test_memory_that_was_held_and_given_back_is_in_the_peak():
    before = peak_resident_bytes()
    np.ones(before // 8 + 2**20)  # as much again
    assert peak_resident_bytes() > 1.5 * before


def test_a_child_does_not_begin_with_the_peak_of_its_parent():
    held = np.ones(2**26)  # 512 MB
    command = [
        sys.executable,
        "-c",
        "from lightning_dp.evaluation.peak_memory import peak_resident_bytes as p; print(p())",
    ]
    child = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert child < held.nbytes < peak_resident_bytes()

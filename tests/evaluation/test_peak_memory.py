"""The peak of a process is its own."""

import json
import subprocess
import sys

PARENT = """
import json, subprocess, sys
import numpy as np
from lightning_dp.evaluation.peak_memory import peak_resident_bytes
before = peak_resident_bytes()
held = np.ones(2**27)  # 1 GiB
del held
code = "from lightning_dp.evaluation.peak_memory import peak_resident_bytes as peak; print(peak())"
child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
print(json.dumps([before, peak_resident_bytes(), int(child.stdout)]))
"""


def test_the_peak_holds_what_was_given_back_and_nothing_of_the_parent():
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, check=True)
    before, after, child = json.loads(done.stdout)
    assert after >= before + 2**29
    assert child < 2**30 < after

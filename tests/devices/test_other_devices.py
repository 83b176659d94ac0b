"""Methods, gradients and mechanisms keep to one device; which it is changes nothing but where numbers lie."""

import json
import os
import subprocess
import sys

import pytest

from tests.devices.play import MORE, STRAY
from tests.distributed.runs import CASES

FEW = ("lent teachers", "records", "joint", "moments", STRAY)
TOLERANCE = 1e-6  # of parameters; some sums run along memory, which may lie in another order


def played(*names: str) -> dict:
    command = [sys.executable, "-W", "ignore", "-m", "tests.devices.play", *names]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict) -> None:
    error = found.pop(STRAY)
    assert "Expected all tensors on pretend" in error, "a tensor in the wrong place goes unnoticed"
    for name, difference in found.items():
        assert isinstance(difference, float), difference
        assert difference <= TOLERANCE, name


def test_a_run_on_another_device_is_the_same_run():
    check(played(*FEW))


@pytest.mark.slow
def test_every_method_and_mechanism_on_another_device():
    check(played(*CASES, *MORE))

"""kill -9 at random moments: every visible value is charged, no noise is drawn twice, runs end in budget."""

import json
import subprocess
import sys

import pytest

from tests.policy.sources import ROOT


def drive(folder, seed, *modes):
    """Run the driver in a process of its own, which forks; return what it found in each mode."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.crash_driver", str(folder), str(seed), *modes],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_handful_of_crashes_and_three_broken_programs(tmp_path):
    found, late, seeded, twice = drive(tmp_path, 1, "right=6", "late=3", "seeded=1", "twice=3")
    assert found["problems"] == []
    assert found["kills"] == 6
    assert found["visible"] <= found["charged"]
    assert any("values visible" in problem for problem in late["problems"]), "a ledger written after the noise"
    assert any("noise drawn twice" in problem for problem in seeded["problems"]), "noise from a fixed seed"
    assert any("lines of the ledger are gone" in problem for problem in twice["problems"]), "a ledger begun anew"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_hundred_crashes(tmp_path):
    (found,) = drive(tmp_path, 20261128, "right=500")
    assert found["problems"] == []
    assert found["kills"] == 500
    assert 0 < found["visible"] <= found["charged"]
    assert 20 < found["in_setup"] < 480  # before, between and after releases

"""The run on a GPU within some minutes: what happens without time, after an error, and to numbers already there."""

import json
import subprocess

import pytest

from benchmarks import gpu


def test_a_step_that_fails_or_has_no_time_leaves_the_others(tmp_path):
    def late(patience_s):
        raise subprocess.TimeoutExpired("python", patience_s)

    def broken(patience_s):
        raise RuntimeError("no kernel")

    steps = {"good": lambda patience_s: {"met": True}, "late": late, "broken": broken}
    found = gpu.measure(steps, tmp_path, minutes=1)
    assert found == json.loads((tmp_path / "gpu.json").read_text())
    assert found["good"]["met"]
    assert found["late"]["left_out"].startswith("not done after")
    assert found["broken"]["failed"] == "no kernel"
    assert gpu.measure(steps, tmp_path, minutes=0)["good"]["left_out"] == "no time"


def test_the_last_line_of_an_error_is_kept():
    with pytest.raises(RuntimeError, match=r"^ValueError: no$"):
        gpu._python(["-c", "raise ValueError('no')"], 60)
    assert gpu._python(["-c", "print(3)"], 60) == "3\n"


def test_a_missing_gpu_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no GPU" in capsys.readouterr().err.splitlines()[-1]

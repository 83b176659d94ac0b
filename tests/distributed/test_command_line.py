"""`lightning-dp fit --trainer.devices 2` from end to end, by Lightning's own launcher and by torchrun; kill -9."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.ledger import PrivacyLedger
from tests.cli.runs import TINY, read_json
from tests.distributed.group import free_port
from tests.integration.test_experiments import FOLDER, SMALL, smaller
from tests.integration.test_kill import num_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PLANNED = 120
PATIENCE_S = 240.0
PYTHON = (sys.executable, "-m", "lightning_dp")


def command(*flags: object, launcher: tuple[str, ...] = PYTHON) -> list[str]:
    return [*launcher, "fit", *map(str, flags)]


def start(arguments: list[str], out: int = subprocess.DEVNULL) -> subprocess.Popen:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs behind it without one
    try:
        return subprocess.Popen(
            arguments,
            stdout=out,
            stderr=out,
            text=True,
            env=clean_environment(),
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def clean_environment() -> dict[str, str]:
    """Each run takes a port of its own: two at once must not meet."""
    return {**os.environ, "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}


def finished(arguments: list[str]) -> tuple[int, str, str]:
    process = start(arguments, subprocess.PIPE)
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        end_group(process)
    return process.returncode, out, err


def end_group(process: subprocess.Popen) -> None:
    if is_anyone_left(process):
        os.killpg(process.pid, signal.SIGKILL)


def is_anyone_left(process: subprocess.Popen) -> bool:
    """Tell whether a process of the run's own group lives."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition, seconds: float = PATIENCE_S) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())


@pytest.mark.parametrize(
    "name", ["datalens_mnist_cpu", "dpsgd_mnist", "dpsinkhorn_mnist_joint_cpu", "dpgan_mnist_cpu", "moments_mnist"]
)
def test_every_kind_runs_on_two_processes(tmp_path, name):
    path = FOLDER / f"{name}.yaml"
    flags = (*SMALL, *smaller(yaml.safe_load(path.read_text())), "--trainer.devices", 2)
    code, out, err = finished(command("--config", path, "--run_dir", tmp_path / "run", *flags))
    assert code == 0, err
    claim = read_json(tmp_path / "run" / "claim.json")
    assert claim["level"] == "PROVED"
    assert claim["num_releases"] == 2
    assert len(PrivacyLedger.read(tmp_path / "run" / "ledger.jsonl")) == 2
    assert out.count("claim level") == 1, "one process tells"
    assert (tmp_path / "run" / "release").is_dir()


def test_torchrun(tmp_path):
    launcher = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "lightning_dp",
    )
    flags = ("--config", TINY, "--name", "many", "--trainer.devices", 2, "--evaluate", "false")
    before = Path.cwd()
    try:
        os.chdir(tmp_path)  # the run folder is named by the time: only one may appear
        code, _, err = finished(command(*flags, launcher=launcher))
    finally:
        os.chdir(before)
    assert code == 0, err
    (run,) = (tmp_path / "runs" / "many").iterdir()
    assert read_json(run / "claim.json")["num_releases"] == 5


def test_a_mistake_is_one_line(tmp_path):
    (tmp_path / "ledger.jsonl").write_text("no ledger")
    flags = ("--config", TINY, "--run_dir", tmp_path, "--trainer.devices", 2)
    code, _, err = finished(command(*flags, "--ckpt_path", "last"))
    assert code != 0
    assert [line for line in err.splitlines() if "error:" in line], err
    assert len([line for line in err.splitlines() if "error:" in line]) == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(("victim", "afterwards"), [("first", 1), ("second", 3)])
def test_kill_9_of_one_process_and_resume_on_another_number(tmp_path, victim, afterwards):
    run_dir = tmp_path / "run"
    fixed = ("--config", TINY, "--run_dir", run_dir, "--trainer.max_steps", PLANNED, "--evaluate", "false")
    fixed = (*fixed, "--checkpoint_every", 20)
    process = start(command(*fixed, "--trainer.devices", 2))
    try:
        assert wait_until(lambda: num_lines(run_dir / "ledger.jsonl") >= 41 or process.poll() is not None)
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(process.pid if victim == "first" else int(child), signal.SIGKILL)
        process.wait(timeout=60)
        assert process.returncode != 0
        assert wait_until(lambda: not is_anyone_left(process), 60), "a process waits for a dead one"
    finally:
        end_group(process)
    spent = num_lines(run_dir / "ledger.jsonl")
    assert 41 <= spent < PLANNED, "the run was not killed in its midst"
    before = (run_dir / "ledger.jsonl").read_bytes()

    code, out, err = finished(command(*fixed, "--trainer.devices", afterwards, "--ckpt_path", "last"))
    assert code == 0, err
    assert re.search(r"Still charged: \d+ releases? after the last checkpoint", out + err)
    assert (run_dir / "ledger.jsonl").read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    ledger, claim = PrivacyLedger.read(run_dir / "ledger.jsonl"), read_json(run_dir / "claim.json")
    assert len(ledger) == claim["num_releases"] == PLANNED
    assert claim["epsilon"] == compute_epsilon(ledger.counts(), delta=1e-5, relation="replace_one").epsilon <= 5


@pytest.mark.parametrize("asked", ["all", "second"])
def test_ctrl_c_saves_after_the_same_release_on_all_processes(tmp_path, asked):
    run_dir = tmp_path / "run"
    fixed = ("--config", TINY, "--run_dir", run_dir, "--trainer.max_steps", PLANNED, "--evaluate", "false")
    process = start(command(*fixed, "--checkpoint_every", 1000, "--trainer.devices", 2), subprocess.PIPE)
    try:
        assert wait_until(lambda: num_lines(run_dir / "ledger.jsonl") >= 21 or process.poll() is not None)
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if asked == "all":  # as a terminal does
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(int(child), signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 130, err
        assert err.count("go on with the same command") == 1
        assert wait_until(lambda: not is_anyone_left(process), 60), "a process waits for a dead one"
    finally:
        end_group(process)
    spent = num_lines(run_dir / "ledger.jsonl") - 1
    assert 20 <= spent < PLANNED, "the run was not interrupted in its midst"

    code, out, err = finished(command(*fixed, "--ckpt_path", "last"))
    assert code == 0, err
    assert "Still charged" not in out + err, "a release was lost"
    assert read_json(run_dir / "claim.json")["num_releases"] == PLANNED

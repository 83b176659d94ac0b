"""kill -9 in mid-run, then the same command with --ckpt_path last: every release made before the kill stays charged."""

import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.ledger import PrivacyLedger
from tests.cli.runs import TINY, read_json

PLANNED = 120
PATIENCE_S = 120.0


def arguments(run_dir: Path, *flags: object) -> list[str]:
    fixed = ["--config", TINY, "--run_dir", run_dir, "--trainer.max_steps", PLANNED, "--evaluate", "false"]
    return ["fit", *map(str, [*fixed, *flags])]


def num_lines(ledger: Path) -> int:
    """Return how many releases the file holds, a torn line left out; works while another process writes it."""
    return max(0, ledger.read_bytes().count(b"\n") - 1) if ledger.exists() else 0


def kill_after(run_dir: Path, releases: int, extra_s: float, *flags: object) -> int:
    """Run the command, kill -9 it some time after so many releases are on disk; return how many were on disk then."""
    ledger = run_dir / "ledger.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_dp", *arguments(run_dir, *flags)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=run_dir.parent,
    )
    try:
        start = time.monotonic()
        while num_lines(ledger) < releases and process.poll() is None and time.monotonic() - start < PATIENCE_S:
            time.sleep(0.002)
        time.sleep(extra_s)
        seen = num_lines(ledger)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    return seen


def check_finished(run_dir: Path) -> None:
    ledger, claim = PrivacyLedger.read(run_dir / "ledger.jsonl"), read_json(run_dir / "claim.json")
    assert [entry.number for entry in ledger.entries] == list(range(1, PLANNED + 1))
    spent = compute_epsilon(ledger.counts(), delta=1e-5, relation="replace_one").epsilon
    assert claim["level"] == "PROVED"
    assert claim["num_releases"] == PLANNED
    assert claim["epsilon"] == spent
    assert 0.99 * 5 <= spent <= 5


def writers(run_dir: Path) -> list[str]:
    """Return the processes that wrote to the ledger, in order of their first release."""
    return list(dict.fromkeys(re.findall(r'"writer":"(\w+)"', (run_dir / "ledger.jsonl").read_text())))


@pytest.mark.parametrize(
    ("checkpoint_every", "expect_checkpoint"), [(20, True), pytest.param(1000, False, marks=pytest.mark.slow)]
)
def test_killed_once(cli, tmp_path, checkpoint_every, expect_checkpoint):
    """After the second checkpoint, and before the first."""
    run_dir, every = tmp_path / "run", ("--checkpoint_every", checkpoint_every)
    spent = kill_after(run_dir, 41, random.uniform(0.0, 0.05), *every)
    assert 41 <= spent < PLANNED, "the process was not killed in mid-run"
    before = (run_dir / "ledger.jsonl").read_bytes()
    assert (run_dir / "private" / "last.ckpt").exists() is expect_checkpoint
    assert not (run_dir / "claim.json").exists()

    outcome = cli(*arguments(run_dir, *every, "--ckpt_path", "last"))
    assert outcome.code == 0, outcome.err
    assert (run_dir / "ledger.jsonl").read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    check_finished(run_dir)
    assert len(writers(run_dir)) == 2
    lost = re.search(r"Still charged: (\d+) releases? after the last checkpoint", " ".join(outcome.logged))
    assert lost is not None
    learnt = torch.load(run_dir / "private" / "last.ckpt", weights_only=True)["round"]
    assert learnt == PLANNED - int(lost[1])
    assert int(lost[1]) >= 1


def test_a_ledger_torn_by_the_kill_is_mended_and_charged(cli, tmp_path):
    """Half a line at the end: its noise had not been drawn, yet it is charged once."""
    run_dir = tmp_path / "run"
    short = ["--trainer.max_steps", "6", "--evaluate", "false", "--checkpoint_every", "2"]
    assert cli("fit", "--config", TINY, "--run_dir", run_dir, *short).code == 0
    ledger = run_dir / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:4]) + lines[4][:50])  # 3 releases and a torn one
    (run_dir / "private" / "last.ckpt").unlink()
    assert len(PrivacyLedger.read(ledger)) == 4
    outcome = cli("fit", "--config", TINY, "--run_dir", run_dir, *short, "--ckpt_path", "last")
    assert outcome.code == 0
    assert any("4 releases after the last checkpoint" in line for line in outcome.logged)
    assert read_json(run_dir / "claim.json")["num_releases"] == 6


@pytest.mark.slow
@pytest.mark.timeout(900)  # nine starts of Python, on whatever machine
def test_killed_many_times_at_random_moments(cli, tmp_path):
    """Kills at start-up, between releases, or while a checkpoint is written: the ledger grows and never loses."""
    run_dir, every = tmp_path / "run", ("--checkpoint_every", 5)
    spent, seed = 0, random.randrange(2**32)
    dice = random.Random(seed)
    for attempt in range(8):
        resume = ("--ckpt_path", "last") if (run_dir / "ledger.jsonl").exists() else ()
        goal = min(spent + dice.randint(0, 20), PLANNED - 5)
        before = (run_dir / "ledger.jsonl").read_bytes() if resume else b""
        seen = kill_after(run_dir, goal, dice.uniform(0.0, 0.2), *every, *resume)
        assert seen >= spent, (seed, attempt)
        if resume:
            whole = before[: before.rfind(b"\n") + 1]
            assert (run_dir / "ledger.jsonl").read_bytes().startswith(whole), (seed, attempt)
        spent = seen
        if len(PrivacyLedger.read(run_dir / "ledger.jsonl")) >= PLANNED:
            break
    assert cli(*arguments(run_dir, *every, "--ckpt_path", "last")).code == 0, seed
    check_finished(run_dir)

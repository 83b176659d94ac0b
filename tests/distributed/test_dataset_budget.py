"""The budget of a data set and a run of two processes: one reservation, also after a kill and on another number."""

import json
import os
import signal
from pathlib import Path

import pytest

from lightning_dp.accounting.dataset_budget import DatasetBudget
from lightning_dp.accounting.ledger import PrivacyLedger
from tests.cli.runs import TINY, read_json
from tests.distributed.test_command_line import (
    PLANNED,
    command,
    end_group,
    finished,
    is_anyone_left,
    start,
    wait_until,
)
from tests.integration.test_kill import num_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FAST = ("--evaluate", "false", "--trainer.enable_progress_bar", "false")


def kinds(budget: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in (budget / "budget.jsonl").read_text().splitlines()]


def test_two_processes_reserve_once(tmp_path):
    budget = tmp_path / "budget"
    shared = ("--config", TINY, *FAST, "--trainer.devices", 2, "--dataset_budget.folder", budget)
    code, _, err = finished(command(*shared, "--run_dir", tmp_path / "a", "--dataset_budget.epsilon", 6))
    assert code == 0, err
    assert kinds(budget).count("reserve") == 1
    state = DatasetBudget(budget).state()
    (charge,) = state.runs.values()
    assert charge.counts == PrivacyLedger.read(tmp_path / "a" / "ledger.jsonl").counts()
    assert list(charge.writers.values()) == [5]

    code, _, err = finished(command(*shared, "--run_dir", tmp_path / "b"))
    assert code != 0
    assert len([line for line in err.splitlines() if "would cross the budget" in line]) == 1, err
    assert not (tmp_path / "b" / "ledger.jsonl").exists()
    assert DatasetBudget(budget).state().counts == state.counts


@pytest.mark.parametrize(("victim", "afterwards"), [("first", 3), ("second", 1)])
def test_a_killed_process_and_another_number_reserve_nothing_more(tmp_path, victim, afterwards):
    run_dir, budget = tmp_path / "run", tmp_path / "budget"
    fixed = ("--config", TINY, *FAST, "--run_dir", run_dir, "--trainer.max_steps", PLANNED, "--checkpoint_every", 20)
    fixed = (*fixed, "--dataset_budget.folder", budget)
    process = start(command(*fixed, "--trainer.devices", 2, "--dataset_budget.epsilon", 6))
    try:
        assert wait_until(lambda: num_lines(run_dir / "ledger.jsonl") >= 41 or process.poll() is not None)
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(process.pid if victim == "first" else int(child), signal.SIGKILL)
        process.wait(timeout=60)
        assert wait_until(lambda: not is_anyone_left(process), 60), "a process waits for a dead one"
    finally:
        end_group(process)
    spent = num_lines(run_dir / "ledger.jsonl")
    assert 41 <= spent < PLANNED, "the run was not killed in its midst"
    before = DatasetBudget(budget).state()
    (charge,) = before.runs.values()
    assert sum(charge.leases.values()) >= spent or victim == "second"  # process 0 of the second kind had a last word

    code, _, err = finished(command(*fixed, "--trainer.devices", afterwards, "--ckpt_path", "last"))
    assert code == 0, err
    after = DatasetBudget(budget).state()
    assert (kinds(budget).count("reserve"), after.counts) == (1, before.counts)
    ledger = PrivacyLedger.read(run_dir / "ledger.jsonl")
    assert ledger.counts() == after.counts
    assert len(ledger.writers()) == 2
    assert read_json(run_dir / "claim.json")["num_releases"] == PLANNED

"""A comparison refuses, runs, records, survives and goes on; the runs are made up."""

import fcntl
import json
from pathlib import Path

import pytest
import yaml

from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.benchmark.backends import Backend, Task
from lightning_dp.benchmark.grid_file import load_grid
from lightning_dp.benchmark.records import read_records
from lightning_dp.benchmark.report import write_report
from lightning_dp.benchmark.runner import Comparison
from lightning_dp.errors import ConfigurationError
from tests.benchmark.made_up import BASE, DELTA, GRID, make_run, plan_made_up, write_grid


class Spy:
    """Remembers what a reporter is told."""

    def __init__(self):
        self.planned_cells, self.started_cells, self.ended_cells, self.resumed = [], [], [], []

    def planned(self, cell, plan, record, index, total):
        self.planned_cells.append((record.cell, record.status))

    def started(self, task, run_dir, num_releases, *, resumed):
        self.started_cells.append(task.name)
        self.resumed += [task.name] if resumed else []

    def ended(self, record):
        self.ended_cells.append((record.cell, record.status))

    def tick(self):
        pass


class FakeBackend(Backend):
    """Makes the runs up in this process, two at a time.

    `breaks`: what is done instead for tasks whose name holds a text, returning the exit code.
    """

    def __init__(self, breaks=None):
        self.slots = 2
        self.breaks = breaks or {}
        self.waiting, self.most, self.interrupted = [], 0, []

    def start(self, task):
        self.waiting.append(task)
        self.most = max(self.most, len(self.waiting))

    def collect(self):
        task = self.waiting.pop(0)
        return [(task, self._do(task))]

    def _do(self, task):
        flags = dict(zip(task.arguments[1::2], task.arguments[2::2], strict=True))
        config, run_dir = yaml.safe_load(Path(flags["--config"]).read_text()), Path(flags["--run_dir"])
        assert ((run_dir / "ledger.jsonl").exists()) == ("--ckpt_path" in flags), "as the command line would demand"
        for name, instead in self.breaks.items():
            if name in task.name:
                return instead(task, run_dir, config)
        make_run(run_dir, config)
        return 0

    def interrupt(self):
        self.interrupted = [task.name for task in self.waiting]
        self.waiting = []


def fail(task: Task, run_dir, config):
    task.log.parent.mkdir(exist_ok=True)
    Path(f"{task.log}.err").write_text("Traceback\nRuntimeError: not enough memory: 8 GB\n\n")
    return 1


def stop(task, run_dir, config):
    """As kill -9 after the first release."""
    make_run(run_dir, config, upto=1)
    return fail(task, run_dir, config)


def comparison(tmp_path, **changes):
    return Comparison(load_grid(write_grid(tmp_path / "grid", **changes)), tmp_path / "out", planner=plan_made_up)


def run(tmp_path, breaks=None, **changes):
    """Plan and run a comparison; return it with its reporter and its backend."""
    found, spy, backend = comparison(tmp_path, **changes), Spy(), FakeBackend(breaks)
    found.plan(spy)
    found.run(backend, spy)
    return found, spy, backend


def statuses(found):
    return {name: record.status for name, record in found.records.items()}


def test_every_cell_runs_once(tmp_path):
    found, spy, backend = run(tmp_path)
    assert set(statuses(found).values()) == {"finished"}
    assert len(spy.started_cells) == len(set(spy.started_cells)) == len(found.records)
    assert backend.most == backend.slots
    assert read_records(found.folder) == list(found.records.values())


def test_a_run_without_privacy_has_no_epsilon_and_runs_once_a_seed(tmp_path):
    found, *_ = run(tmp_path)
    names = [name for name in found.records if "NoPrivacy" in name]
    assert names == [f"first-NoPrivacy-Digits-nonprivate-seed{seed}" for seed in (1, 2)]
    for name in names:
        assert found.records[name].epsilon is None
        assert found.records[name].target_epsilon is None
        assert found.records[name].level == "NONPRIVATE"
    assert len(list((found.folder / "requests").glob("*NoPrivacy*"))) == 2


def test_records_come_from_the_cards(tmp_path):
    found, *_ = run(tmp_path)
    for record in found.records.values():
        card = json.loads((found.folder / record.card).read_text())
        assert record.epsilon == card["claim"]["epsilon"]
        assert record.statement == card["claim_statement"]
        assert record.metrics["fid"] == card["evaluation"]["fid"]
        assert record.protocol_hash == card["evaluation"]["protocol_hash"]
        assert record.cost == card["cost"]


def test_noise_is_calibrated_before_anything_runs(tmp_path):
    found, spy = comparison(tmp_path), Spy()
    found.plan(spy)
    assert {status for _, status in spy.planned_cells} == {"waiting"}
    noise = {r.target_epsilon: r.noise_multiplier for r in read_records(found.folder) if r.mechanism == "Gaussian"}
    assert noise[1.0] > noise[10.0] > 0
    assert not (found.folder / "runs").exists()


@pytest.mark.parametrize(
    ("mechanism", "reason"),
    [("Impossible", "--mechanism Impossible has no proof for these rows."), ("Buggy", "KeyError: 'width'")],
)
def test_what_cannot_be_is_refused_with_the_reason_and_never_runs(tmp_path, mechanism, reason):
    methods = {"first": {"config": "base.yaml", "mechanisms": [mechanism, "Gaussian"]}}
    found, spy, _ = run(tmp_path, methods=methods)
    refused = [record for record in found.records.values() if record.status == "refused"]
    assert [record.reason for record in refused] == [reason] * 4
    assert not any(mechanism in name for name in spy.started_cells)
    assert sum(status == "finished" for status in statuses(found).values()) == 4


def test_a_failed_cell_is_recorded_and_the_rest_goes_on(tmp_path):
    found, *_ = run(tmp_path, {"eps1-seed1": fail})
    assert statuses(found).pop("first-Gaussian-Digits-eps1-seed1") == "failed"
    assert found.records["first-Gaussian-Digits-eps1-seed1"].reason == "RuntimeError: not enough memory: 8 GB"
    assert list(statuses(found).values()).count("finished") == len(found.records) - 1


def test_a_run_that_says_it_ended_and_left_no_card_has_failed(tmp_path):
    found, *_ = run(tmp_path, {"eps1-seed1": lambda *_: 0})
    record = found.records["first-Gaussian-Digits-eps1-seed1"]
    assert record.status == "failed"
    assert "holds no card" in record.reason
    assert str(tmp_path) not in record.reason  # it is published


def test_finished_cells_are_skipped(tmp_path):
    run(tmp_path)
    found, spy, _ = run(tmp_path)
    assert spy.started_cells == []
    assert {status for _, status in spy.planned_cells} == {"finished"}
    assert set(statuses(found).values()) == {"finished"}


def test_interrupted_cells_are_resumed(tmp_path):
    first, *_ = run(tmp_path, {"eps10-seed2": stop})
    name = "first-Gaussian-Digits-eps10-seed2"
    assert first.records[name].status == "failed"
    found, spy, _ = run(tmp_path)
    assert spy.started_cells == spy.resumed == [name]
    record = found.records[name]
    assert record.status == "finished"
    # the release before the kill is part of the run, and of the bill
    assert len(PrivacyLedger.read(found.folder / record.run_dir / "ledger.jsonl")) == 3


def test_a_run_that_spent_everything_and_kept_nothing_is_made_anew_and_paid_twice(tmp_path):
    """As a one-shot method killed between its release and its end."""
    once = {
        "eps1-seed1": lambda task, run_dir, config: make_run(run_dir, config, upto=3) or fail(task, run_dir, config)
    }
    run(tmp_path, once)
    found, spy, _ = run(tmp_path)
    name = "first-Gaussian-Digits-eps1-seed1"
    assert (spy.started_cells, spy.resumed) == ([name], [])
    assert found.records[name].run_dir.endswith("-attempt2")
    (spent,) = write_report(found.folder, list(found.records.values()), name="x", delta=DELTA)
    assert spent.num_runs == len(found.records) + 1


def test_with_a_checkpoint_such_a_run_goes_on(tmp_path):
    def judged_not(task, run_dir, config):
        make_run(run_dir, config, upto=3)
        (run_dir / "private").mkdir()
        (run_dir / "private" / "last.ckpt").write_text("")
        return 1

    run(tmp_path, {"eps1-seed1": judged_not})
    _, spy, _ = run(tmp_path)
    assert spy.resumed == ["first-Gaussian-Digits-eps1-seed1"]


def test_a_changed_request_is_another_run_and_the_old_one_stays_on_the_bill(tmp_path):
    before, *_ = run(tmp_path)
    found, spy, _ = run(tmp_path, settings={"model": {"init_args": {"width": 4}}})
    assert len(spy.started_cells) == len(found.records)
    assert {record.run_dir for record in found.records.values()}.isdisjoint(
        {record.run_dir for record in before.records.values()}
    )
    (spent,) = write_report(found.folder, list(found.records.values()), name="x", delta=DELTA)
    assert spent.num_runs == 2 * len(found.records)


def test_a_card_of_another_request_is_no_answer(tmp_path):
    """The broken twin: any card in the folder would do."""
    found, *_ = run(tmp_path)
    record = found.records["first-Gaussian-Digits-eps1-seed1"]
    path = found.folder / record.card
    card = json.loads(path.read_text())
    card["config"]["model"]["init_args"]["width"] = 99
    path.write_text(json.dumps(card))
    (found.folder / record.run_dir / "private").mkdir()
    (found.folder / record.run_dir / "private" / "last.ckpt").write_text("")
    _, spy, _ = run(tmp_path)
    assert spy.started_cells == [record.cell]


@pytest.mark.parametrize("damage", ["", "{", '{"format": 1}'])
def test_a_torn_card_is_no_answer(tmp_path, damage):
    found, *_ = run(tmp_path)
    record = found.records["first-Gaussian-Digits-eps1-seed1"]
    (found.folder / record.card).write_text(damage)
    _, spy, _ = run(tmp_path)
    assert spy.started_cells == [record.cell]


def test_an_altered_ledger_fails_its_cell_and_nothing_is_run_over_it(tmp_path):
    found, *_ = run(tmp_path)
    record = found.records["first-Gaussian-Digits-eps1-seed1"]
    ledger = found.folder / record.run_dir / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join([lines[0], *lines[2:]]))
    again, spy, _ = run(tmp_path)
    assert again.records[record.cell].status == "failed"
    assert "ledger" in again.records[record.cell].reason
    assert spy.started_cells == []


def test_an_interrupt_records_what_was_running_and_what_waits(tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    found, spy, backend = comparison(tmp_path), Spy(), FakeBackend({"eps1-seed1": interrupt})
    found.plan(spy)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        found.run(backend, spy)
    assert backend.interrupted == [spy.started_cells[1]]
    assert [statuses(found)[name] for name in spy.started_cells] == ["interrupted", "interrupted"]
    assert [r.status for r in read_records(found.folder)].count("waiting") == len(found.records) - 2
    again, *_ = run(tmp_path)
    assert set(statuses(again).values()) == {"finished"}


def test_who_interrupts_twice_is_told_how_to_go_on_all_the_same(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeBackend, "interrupt", interrupt)
    found, spy = comparison(tmp_path), Spy()
    found.plan(spy)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        found.run(FakeBackend({"eps1-seed1": interrupt}), spy)
    assert [statuses(found)[name] for name in spy.started_cells] == ["interrupted", "interrupted"]


def test_one_comparison_at_a_time(tmp_path):
    found, spy = comparison(tmp_path), Spy()
    found.plan(spy)
    with (found.folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigurationError, match="Another process runs the comparison"):
            found.run(FakeBackend(), spy)
    assert spy.started_cells == []


def test_the_request_is_what_fit_gets(tmp_path):
    grid = load_grid(write_grid(tmp_path / "grid", settings={"trainer": {"max_steps": 5}}))
    found = Comparison(grid, tmp_path / "out", planner=plan_made_up, wandb="offline")
    found.plan(Spy())
    request = yaml.safe_load((tmp_path / "out" / "requests" / "first-Gaussian-Digits-eps1-seed1.yaml").read_text())
    assert request["trainer"] == {"max_steps": 5, "enable_progress_bar": False}
    assert request["wandb"] == "offline"
    assert request["wandb_group"] == GRID["name"]
    assert request["model"] == BASE["model"]
    assert request["privacy"]["noise_multiplier"] is None

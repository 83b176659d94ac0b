"""A comparison under the budget of its data set: one list before any cell runs, and none twice."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import lightning_dp
from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.dataset_budget import DatasetBudget
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.benchmark import reservations
from lightning_dp.benchmark.grid_file import load_grid
from lightning_dp.benchmark.report import write_report
from lightning_dp.benchmark.reservations import Reservations, read_names
from lightning_dp.benchmark.runner import Comparison
from lightning_dp.benchmark.selection import Selection
from lightning_dp.errors import BudgetExceededError, ConfigurationError, LedgerError
from tests.benchmark.made_up import DELTA, FULL, RELATION, gaussian, make_run, noise_for, plan_made_up, write_grid
from tests.benchmark.test_runner import FakeBackend, Spy

ROOT = Path(lightning_dp.__file__).parents[1]
METHODS = {"first": {"config": "base.yaml", "mechanisms": ["Gaussian"]}}
CELLS = 4  # two epsilons, two seeds
ONE = "first-Gaussian-Digits-eps1-seed1"


def room_for(*epsilons: float) -> float:
    """An epsilon that holds exactly cells of these epsilons."""
    counts: dict = {}
    for epsilon in epsilons:
        key = (gaussian(noise_for(epsilon, 3)), FULL)
        counts[key] = counts.get(key, 0) + 3
    return compute_epsilon(counts, delta=DELTA, relation=RELATION).epsilon * (1 + 1e-6)


ALL = (1, 10, 1, 10)


class NotingBackend(FakeBackend):
    """Makes runs up as `fit` would within a budget: under the name of its reservation, and noted."""

    def _do(self, task):
        flags = dict(zip(task.arguments[1::2], task.arguments[2::2], strict=True))
        config, run_dir = yaml.safe_load(Path(flags["--config"]).read_text()), Path(flags["--run_dir"])
        budget, run = DatasetBudget(Path(flags["--dataset_budget.folder"])), flags["--dataset_budget.reservation"]
        assert run in budget.state().runs, "a cell runs that holds no share"
        self.seen = [*getattr(self, "seen", []), len(budget.state().runs)]
        for name, instead in self.breaks.items():
            if name in task.name:
                return instead(task, run_dir, config, run)
        make_run(run_dir, config, run_id=run, dataset_budget=True)
        budget.note(run, PrivacyLedger.read(run_dir / "ledger.jsonl"))
        return 0


def stop(upto):
    def stopped(task, run_dir, config, run):
        if upto:
            make_run(run_dir, config, upto=upto, run_id=run, dataset_budget=True)
            flags = dict(zip(task.arguments[1::2], task.arguments[2::2], strict=True))
            DatasetBudget(Path(flags["--dataset_budget.folder"])).note(
                run, PrivacyLedger.read(run_dir / "ledger.jsonl")
            )
        return 1

    return stopped


def comparison(tmp_path, *, epsilon=None, out="out", **changes):
    options = {"folder": str(tmp_path / "budget"), "epsilon": room_for(*ALL) if epsilon is None else epsilon}
    grid = {"methods": METHODS, "dataset_budget": options, **changes}
    found = Comparison(load_grid(write_grid(tmp_path / out / "grid", **grid)), tmp_path / out, planner=plan_made_up)
    found.plan(Spy())
    return found


def run(tmp_path, breaks=None, **changes):
    found, spy, backend = comparison(tmp_path, **changes), Spy(), NotingBackend(breaks)
    found.run(backend, spy)
    return found, spy, backend


def budget_of(tmp_path):
    return DatasetBudget(tmp_path / "budget")


def kinds(tmp_path):
    return [json.loads(line)["kind"] for line in (tmp_path / "budget" / "budget.jsonl").read_text().splitlines()]


def test_all_cells_are_one_list_before_the_first_runs(tmp_path):
    found, _, backend = run(tmp_path)
    assert backend.seen == [CELLS] * CELLS
    assert kinds(tmp_path)[:3].count("reserve") == kinds(tmp_path).count("reserve") == 1
    assert {record.status for record in found.records.values()} == {"finished"}
    state = budget_of(tmp_path).state()
    assert state.is_fixed_list
    (spent,) = write_report(
        found.folder,
        list(found.records.values()),
        name="made_up",
        delta=DELTA,
        budgets=found.reservations.states(["Digits"]),
    )
    assert spent.whole.epsilon == state.claim().epsilon == state.composed().epsilon
    written = json.loads((found.folder / "spending.json").read_text())
    assert written[0]["dataset_budget"]["epsilon"] == written[0]["whole"]["epsilon"]
    assert f"reserved to 100 % by {CELLS} runs" in (found.folder / "report.md").read_text()


def test_the_same_command_reserves_nothing_more(tmp_path):
    run(tmp_path, {"eps10-seed2": stop(1)})
    before = budget_of(tmp_path).state()
    found, spy, _ = run(tmp_path)
    assert spy.started_cells == spy.resumed == ["first-Gaussian-Digits-eps10-seed2"]
    assert {record.status for record in found.records.values()} == {"finished"}
    after = budget_of(tmp_path).state()
    assert after.counts == before.counts
    assert after.is_fixed_list
    assert kinds(tmp_path).count("reserve") == 1
    run(tmp_path)
    assert kinds(tmp_path).count("reserve") == 1


@pytest.mark.parametrize("upto", [0, 1])
def test_a_failed_cell_keeps_its_share(tmp_path, upto):
    found, *_ = run(tmp_path, {"eps10-seed2": stop(upto)})
    assert found.records["first-Gaussian-Digits-eps10-seed2"].status == "failed"
    assert len(budget_of(tmp_path).state().runs) == CELLS
    assert budget_of(tmp_path).state().spent == pytest.approx(1.0, abs=1e-5)


def test_a_crash_between_the_names_and_the_reservation_is_mended(tmp_path, monkeypatch):
    class Crash(Exception):
        pass

    def crash(*_):
        raise Crash

    found = comparison(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(DatasetBudget, "reserve", crash)
        with pytest.raises(Crash):
            found.run(NotingBackend(), Spy())
    names = read_names(found.folder)
    assert len(names) == CELLS
    assert not budget_of(tmp_path).exists()
    run(tmp_path)
    assert set(budget_of(tmp_path).state().runs) == set(names.values())


def test_names_that_are_not_kept_reserve_twice(tmp_path, monkeypatch):
    """The broken twin: what `reservations.json` is for."""
    comparison(tmp_path).reservations.reserve([])  # nothing to do, nothing written
    monkeypatch.setattr(Reservations, "_write", lambda self, names: None)
    found = comparison(tmp_path)
    shares = [job.share for job in found._jobs]
    found.reservations.reserve(shares)
    with pytest.raises(BudgetExceededError, match="% of it is left, and 100 % is asked"):
        found.reservations.reserve(shares)


def test_a_refusal_names_the_cells_that_would_fit_and_runs_none(tmp_path):
    found, backend = comparison(tmp_path, epsilon=room_for(1, 10, 1)), NotingBackend()
    with pytest.raises(BudgetExceededError) as caught:
        found.run(backend, Spy())
    text = str(caught.value)
    assert "\n" not in text
    names = "first-Gaussian-Digits-eps1-seed1 first-Gaussian-Digits-eps10-seed1 first-Gaussian-Digits-eps1-seed2"
    assert f"3 of 4 cells would fit together: --only {names}" in text
    assert not backend.waiting
    assert not budget_of(tmp_path).exists()
    with pytest.raises(BudgetExceededError, match="3 of 4 cells"):
        found.check_budget()
    found.plan(Spy(), Selection(only=names.split()))
    found.run(backend, Spy())
    assert len(budget_of(tmp_path).state().runs) == 3
    with pytest.raises(BudgetExceededError, match="None of the cells would fit by itself"):
        run(tmp_path, epsilon=room_for(1, 10, 1))


def test_a_part_of_a_comparison_is_a_list_of_its_own(tmp_path):
    found = comparison(tmp_path)
    found.plan(Spy(), Selection(seeds=[1]))
    found.run(NotingBackend(), Spy())
    assert len(budget_of(tmp_path).state().runs) == 2
    assert budget_of(tmp_path).state().is_fixed_list
    run(tmp_path)
    assert len(budget_of(tmp_path).state().runs) == CELLS
    assert not budget_of(tmp_path).state().is_fixed_list  # the second part was made in view of the first


def test_what_would_not_be_proved_is_refused_and_the_rest_runs(tmp_path):
    methods = {"first": {"config": "base.yaml", "mechanisms": ["Gaussian", "NoPrivacy"]}}
    found, *_ = run(tmp_path, methods=methods)
    refused = [record for record in found.records.values() if record.status == "refused"]
    assert [record.mechanism for record in refused] == ["NoPrivacy"] * 2
    assert all("allow_unproved" in str(record.reason) for record in refused)
    assert budget_of(tmp_path).state().claim().epsilon is not None
    options = {"folder": str(tmp_path / "budget"), "allow_unproved": True}
    found, *_ = run(tmp_path, methods=methods, dataset_budget=options)
    assert {record.status for record in found.records.values()} == {"finished"}
    assert budget_of(tmp_path).state().claim().epsilon is None


def test_runs_in_no_budget_are_not_mixed_in(tmp_path):
    changes = {"methods": METHODS, "dataset_budget": ...}
    found = Comparison(
        load_grid(write_grid(tmp_path / "out" / "grid", **changes)), tmp_path / "out", planner=plan_made_up
    )
    found.plan(Spy())
    found.run(FakeBackend({"eps1-": lambda *_: 1}), Spy())
    with pytest.raises(ConfigurationError, match=r"has made 3 releases not charged.*another --out"):
        run(tmp_path)
    assert not budget_of(tmp_path).exists()


def test_a_budget_that_was_begun_anew_does_not_take_its_runs_back(tmp_path):
    run(tmp_path, {"eps10-seed2": stop(1)})
    for path in (tmp_path / "budget").iterdir():
        path.unlink()
    with pytest.raises(ConfigurationError, match="not charged"):
        run(tmp_path)


def test_each_data_set_has_its_budget(tmp_path):
    data = {"Digits": None, "Others": {"class_path": "Digits"}}
    options = {"folder": str(tmp_path / "budgets" / "{data}"), "epsilon": room_for(*ALL)}
    run(tmp_path, data=data, dataset_budget=options)
    for label in data:
        assert len(DatasetBudget(tmp_path / "budgets" / label).state().runs) == CELLS


def test_other_records_need_a_folder_of_their_own(tmp_path, monkeypatch):
    found = comparison(tmp_path)
    shares = [job.share for job in found._jobs]
    plan = shares[-1].plan
    shares[-1] = replace(shares[-1], plan=replace(plan, header={**plan.header, "fingerprint": "another"}))
    with pytest.raises(ConfigurationError, match=r"other records.*\(A folder for each data set: .*/\{data\}\.\)"):
        found.reservations.reserve(shares)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"folder": "x", "epsilom": 3}, "Did you mean epsilon"),
        ({"epsilon": 3}, "Missing in dataset_budget: folder"),
        ({"folder": "x", "epsilon": -1}, "finite number > 0"),
        ({"folder": "x", "epsilon": "much"}, "finite number > 0"),
        ({"folder": 3}, "Expected a name"),
        ({"folder": "x", "rule": "pld"}, "rule"),
        ({"folder": "x", "allow_unproved": "maybe"}, "true or false"),
        ("x", "'key: value' lines"),
    ],
)
def test_mistakes_in_the_grid_are_one_line(tmp_path, given, words):
    with pytest.raises(ConfigurationError) as caught:
        load_grid(write_grid(tmp_path, dataset_budget=given))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_may_not_state_it_a_second_time(tmp_path):
    with pytest.raises(ConfigurationError, match="the grid states it once"):
        load_grid(write_grid(tmp_path, settings={"dataset_budget": {"folder": "x"}}))


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 3}'])
def test_names_that_are_none_are_refused(tmp_path, text):
    (tmp_path / reservations.RESERVATIONS_FILE).write_text(text)
    with pytest.raises(LedgerError, match="Expected the reservations of a comparison"):
        read_names(tmp_path)


def test_shares_that_nobody_began_are_given_back(tmp_path, cli):
    found, *_ = run(tmp_path, {"eps10-seed2": stop(0), "eps1-seed2": stop(1)})
    outcome = cli("account", "--dataset", tmp_path / "budget", "--give_back", found.folder)
    assert outcome.code == 0, outcome.err
    held = [Path(charge.name).name for charge in budget_of(tmp_path).state().runs.values()]
    assert len(held) == CELLS - 1
    assert not any("eps10-seed2" in name for name in held)
    (run_id,) = (run for name, run in read_names(found.folder).items() if "eps10-seed2" in name)
    with pytest.raises(LedgerError, match="is not in"):  # whoever began it elsewhere is stopped before its noise
        budget_of(tmp_path).note(run_id, PrivacyLedger({"relation": RELATION, "unit": "record"}, None))
    run(tmp_path)
    assert len(budget_of(tmp_path).state().runs) == CELLS


RACE = """
    import os, sys, time
    from pathlib import Path
    sys.path.insert(0, os.getcwd())
    from lightning_dp.errors import BudgetExceededError
    from tests.benchmark.test_reservations import NotingBackend, Spy, comparison, room_for
    folder, start, children = Path(sys.argv[1]), time.time() + 0.3, []
    found = [comparison(folder, out=f"out{number}", epsilon=room_for(1, 10, 1, 10, 10)) for number in range(6)]
    for one in found:
        child = os.fork()
        if not child:
            while time.time() < start:
                pass
            try:
                one.run(NotingBackend(), Spy())
                os._exit(0)
            except BudgetExceededError:
                os._exit(9)
        children.append(child)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_comparisons_launched_at_once_cannot_both_take_the_last_of_it(tmp_path):
    """Six at once, room for five cells: one comparison of four gets in and runs to its end, the others run nothing."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RACE), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert sorted(map(int, done.stdout.split())) == [0, 9, 9, 9, 9, 9]
    state = budget_of(tmp_path).state()
    assert len(state.runs) == CELLS
    assert state.spent <= 1
    made = [path for path in tmp_path.glob("out*/runs/*/ledger.jsonl") if len(PrivacyLedger.read(path))]
    assert len(made) == CELLS
    assert len({path.parents[2] for path in made}) == 1

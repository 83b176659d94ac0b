"""Parts of a comparison: which cells are chosen, and what becomes of the others' records."""

import pytest

from lightning_dp.benchmark.grid_file import load_grid
from lightning_dp.benchmark.records import read_records
from lightning_dp.benchmark.report import write_report
from lightning_dp.benchmark.runner import Comparison
from lightning_dp.benchmark.selection import Selection
from lightning_dp.errors import ConfigurationError
from tests.benchmark.made_up import DELTA, plan_made_up, write_grid
from tests.benchmark.test_runner import FakeBackend, Spy, fail, statuses

TWO = {name: {"config": "base.yaml", "mechanisms": ["Gaussian"]} for name in ("first", "second-best")}


def run_part(tmp_path, selection, breaks=None, **changes):
    grid = load_grid(write_grid(tmp_path / "grid", **{"methods": TWO, **changes}))
    found, spy = Comparison(grid, tmp_path / "out", planner=plan_made_up), Spy()
    found.plan(spy, selection)
    found.run(FakeBackend(breaks), spy)
    return found, spy


def finished(found):
    return [name for name, status in statuses(found).items() if status == "finished"]


@pytest.mark.parametrize(
    ("selection", "number"),
    [
        (Selection(only=["second-*"]), 4),
        (Selection(only=["second-best"], seeds=[2]), 2),
        (Selection(only=["second_best-*-eps10-*", "first"]), 6),
        (Selection(seeds=[1]), 4),
        (Selection(only=[]), 0),
        (Selection(), 8),
    ],
)
def test_only_chosen_cells_are_planned_and_run(tmp_path, selection, number):
    found, spy = run_part(tmp_path, selection)
    assert len(finished(found)) == len(spy.started_cells) == len(spy.planned_cells) == number
    assert len(found.records) == 8
    assert list(statuses(found).values()).count("waiting") == 8 - number


def test_parts_add_up_in_the_order_of_the_grid(tmp_path):
    run_part(tmp_path, Selection(only=["second-best"]))
    found, spy = run_part(tmp_path, Selection(only=["first"], seeds=[1]))
    assert len(spy.started_cells) == 2
    assert len(finished(found)) == 6
    assert list(found.records) == [cell.id for cell in found.grid.cells()]
    assert read_records(found.folder) == list(found.records.values())
    (spent,) = write_report(found.folder, list(found.records.values()), name="x", delta=DELTA)
    assert spent.num_runs == 6
    text = (found.folder / "report.md").read_text()
    assert "8 cells: 6 finished, 2 waiting" in text
    assert "| first | Gaussian | Digits | 1 | 2 | waiting | - |" in text


def test_failures_of_other_parts_stay_on_record(tmp_path):
    run_part(tmp_path, Selection(only=["first"], seeds=[1]), {"eps1-": fail})
    found, _ = run_part(tmp_path, Selection(only=["second-best"]))
    assert statuses(found)["first-Gaussian-Digits-eps1-seed1"] == "failed"


def test_a_record_of_another_request_is_not_kept(tmp_path):
    """The broken twin: whatever is on record under the cell's name would do."""
    run_part(tmp_path, Selection(only=["first"]))
    found, _ = run_part(tmp_path, Selection(only=["second-best"]), settings={"trainer": {"max_steps": 9}})
    assert not any(name.startswith("first") for name in finished(found))


def test_a_record_without_its_card_is_not_kept(tmp_path):
    found, _ = run_part(tmp_path, Selection(only=["first"], seeds=[1]))
    name = "first-Gaussian-Digits-eps1-seed1"
    (found.folder / found.records[name].card).unlink()
    again, _ = run_part(tmp_path, Selection(only=[]))
    assert statuses(again)[name] == "waiting"


def test_a_run_without_privacy_keeps_its_one_record(tmp_path):
    methods = {"first": {"config": "base.yaml", "mechanisms": ["Gaussian", "NoPrivacy"]}}
    run_part(tmp_path, Selection(only=["*NoPrivacy*"]), methods=methods)
    found, _ = run_part(tmp_path, Selection(only=["*Gaussian*"]), methods=methods)
    assert [name for name in found.records if "NoPrivacy" in name] == [
        f"first-NoPrivacy-Digits-nonprivate-seed{seed}" for seed in (1, 2)
    ]
    assert set(statuses(found).values()) == {"finished"}


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(only=["third*"]), "Expected --only to fit a cell, got 'third\\*'. Give a method \\(first, second"),
        (Selection(seeds=[7]), "Expected --seeds out of 1, 2, got 7"),
        (Selection(only=["*-seed1"], seeds=[2]), "both a name of --only and a seed of --seeds"),
    ],
)
def test_a_choice_of_nothing_is_refused(tmp_path, selection, message):
    with pytest.raises(ConfigurationError, match=message):
        run_part(tmp_path, selection)

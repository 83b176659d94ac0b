"""Every shipped comparison reads, its cells have a plan, and parts of it run through the command line."""

from pathlib import Path

import pytest

from lightning_dp.benchmark.grid_file import load_grid
from lightning_dp.benchmark.records import read_records

FOLDER = Path(__file__).parents[2] / "configs" / "benchmark"
GRIDS = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "wandb_sweep.yaml")


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_it_reads(path):
    grid = load_grid(path)
    assert grid.name == path.stem
    assert grid.cells()


def test_the_standard_comparison_takes_the_preset_of_data_and_epsilon():
    cells = {(c.method, c.mechanism, c.data, c.epsilon): c.config for c in load_grid(FOLDER / "standard.yaml").cells()}
    moments = {key[2:]: config["model"]["init_args"] for key, config in cells.items() if key[0] == "DP-Moments"}
    assert [moments[key]["cell_clip"] for key in moments] == [10.0, 8.0, 8.0, 8.5]
    assert cells["DataLens", "TopAgg", "MNIST", 1.0]["mechanism"]["init_args"]["top_k"] == 64
    assert cells["DataLens", "TopAgg", "MNIST", 10.0]["mechanism"]["init_args"]["top_k"] == 100
    clothes = cells["DataLens", "TopAgg", "FashionMNIST", 1.0]["model"]["init_args"]
    assert clothes["generator"]["init_args"]["window"] is clothes["basis"]["init_args"]["window"] is None


@pytest.mark.slow
@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_cell_has_a_plan(cli, tmp_path, path):
    seed = str(load_grid(path).seeds[0])
    outcome = cli("benchmark", path, "--out", tmp_path, "--seeds", seed, "--dry_run")
    assert outcome.code == 0
    assert not [record for record in read_records(tmp_path) if record.status == "refused"]


def test_a_part_is_planned_and_what_is_there_is_published(cli, tmp_path):
    out, shown = tmp_path / "out", tmp_path / "shown"
    outcome = cli("benchmark", FOLDER / "standard.yaml", "--out", out, "--only", "DP_MERF-*-eps1-*", "--dry_run")
    assert (outcome.code, outcome.out.count("noise multiplier")) == (0, 6)
    outcome = cli("benchmark", FOLDER / "standard.yaml", "--out", out, "--report_only", "--publish", shown)
    assert outcome.code == 0
    text = (shown / "report.md").read_text()
    assert "No run with a PROVED claim has finished." in text
    assert "| DP-MERF | Gaussian | MNIST | 1 | 1, 2, 3 | waiting | - |" in text
    planned = [record for record in read_records(shown) if record.noise_multiplier is not None]
    assert {record.method for record in planned} == {"DP-MERF"}


def test_a_report_runs_nothing(cli, tmp_path):
    outcome = cli("benchmark", FOLDER / "demo.yaml", "--out", tmp_path, "--report_only", "--only", "DataLens")
    assert "--report_only runs no cell; leave --dry_run, --only and --seeds out." in outcome.error()

"""The table of what runs with what, from configurations of whole runs."""

import shutil
from pathlib import Path

import pytest

from tests.cli.runs import TINY

WARM = Path(__file__).parents[2] / "configs/experiment/dpvae_mnist_warm.yaml"
SHIPPED = ["AdaptiveGaussian", "GNMax", "Gaussian", "NoPrivacy", "TopAgg", "VonMisesFisher"]


@pytest.fixture(autouse=True)
def _shipped_alone(monkeypatch):
    """Leave out the mechanisms that other tests in this process have defined."""
    monkeypatch.setattr("lightning_dp.cli.matrix.subclass_names", lambda base: SHIPPED)


def test_the_table_names_levels_and_refusals(cli, tmp_path):
    for path in (WARM, TINY):
        shutil.copy(path, tmp_path)
    out = cli("matrix", "--configs", tmp_path, "--markdown").out
    rows = {line.split("|")[1].strip(): line for line in out.splitlines() if line.startswith("|")}
    assert "dpvae_mnist_warm" in rows["DPVAE"]  # a warm start fixes no noise without a target
    assert "PROVED A R Z" in rows["DPVAE"]
    assert "refused" in rows["TeacherEnsembleGAN"]


def test_on_eighty_columns_no_name_is_cut(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shutil.copy(TINY, tmp_path)
    lines = cli("matrix", "--configs", tmp_path).out.splitlines()
    assert max(map(len, lines[:6])) <= 80
    words = {word for line in lines for word in line.split()}
    assert {"TeacherEnsemble", "GAN", "Adaptive", "Gaussian", "NONPRIVATE", "TopAgg", "Fisher"} <= words

"""The tutorial as it stands there: classes of one's own, named by where they are imported from."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_dp.mechanisms.base import ContributionSpec
from tests.contracts.mechanism import adversarial_rows, context

ROOT = Path(__file__).parents[2]


@pytest.fixture
def own(tmp_path):
    """A folder with the files of the tutorial."""
    text = (ROOT / "docs" / "tutorial.md").read_text()
    for language, name in (("python", "mine.py"), ("yaml", "mine.yaml")):
        (found,) = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
        (tmp_path / name).write_text(found)
    return tmp_path


def run(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "lightning_dp", "fit", "--evaluate", "false", "--wandb", "disabled", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_run_is_proved(own):
    done = run(own, "--config", "mine.yaml", "--trainer.max_steps", "2", "--run_dir", "run")
    assert done.returncode == 0, done.stderr
    claim = json.loads((own / "run" / "claim.json").read_text())
    assert (claim["level"], claim["mechanism"], claim["num_releases"]) == ("PROVED", "BoxClip", 2)
    assert claim["epsilon"] == pytest.approx(10, abs=1e-3)


def test_the_bound_is_kept(own, monkeypatch):
    monkeypatch.syspath_prepend(str(own))
    module = __import__("mine")
    mechanism = module.BoxClip(limit=0.01)
    spec = ContributionSpec.teachers(num_teachers=507, vectors_per_row=3, vector_dim=20)
    encoded = mechanism.encode(adversarial_rows(spec), spec, context(507))
    norms = encoded.double().flatten(1).norm(dim=1)
    assert 0.99 * mechanism.row_bound(spec) < float(norms.max()) <= mechanism.row_bound(spec)
    assert torch.isfinite(encoded).all()
    monkeypatch.delitem(sys.modules, "mine")


def test_a_class_that_cannot_be_imported_says_so(cli):
    outcome = cli("fit", "--config", str(ROOT / "configs/experiment/demo.yaml"), "--mechanism", "nowhere.BoxClip")
    assert outcome.code == 2
    assert "Cannot import --mechanism 'nowhere.BoxClip'" in outcome.err
    assert "PYTHONPATH" in outcome.err
    assert "_" not in outcome.err.partition("choose from ")[2]  # classes that nobody is meant to name

"""Every shipped experiment parses, and runs two releases through the command line on a few embedded digits."""

from pathlib import Path

import pytest
import yaml

from lightning_dp.cli.small_runs import SMALL_DATA, smaller_model, smaller_warm_start
from tests.cli.runs import read_json

FOLDER = Path(__file__).parents[2] / "configs" / "experiment"
CONFIGS = sorted(FOLDER.glob("*.yaml"))

SMALL = (
    *SMALL_DATA,
    *("--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--wandb", "disabled"),
    *("--evaluation.num_samples", "20", "--evaluation.num_reference", "20", "--evaluation.classifiers", "[logistic]"),
)


def smaller(config: dict) -> tuple[str, ...]:
    """Return the flags that shrink the model of a configuration."""
    flags = smaller_model(config)
    if "warm_start" in config:
        flags = (*flags, *smaller_warm_start(config["warm_start"]["class_path"]))
    if {"--model.expected_batch_size", "--model.expected_judges"} & {*flags}:
        # A small target is quickly calibrated: privacy loss distributions of little noise are large.
        flags = (*flags, "--privacy.target_epsilon", "0.3")
    return flags


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_two_releases(cli, tmp_path, path):
    config = yaml.safe_load(path.read_text())
    outcome = cli("fit", "--config", path, "--run_dir", tmp_path / "run", *SMALL, *smaller(config))
    assert outcome.code == 0, outcome.err
    claim = read_json(tmp_path / "run" / "claim.json")
    assert claim["level"] == "PROVED"
    before = smaller(config).count("--warm_start.samples") + smaller(config).count("--warm_start.releases")
    assert claim["num_releases"] == 2 + before  # one of moments, two of transport
    assert claim["epsilon"] <= config["privacy"]["target_epsilon"]


@pytest.mark.parametrize("mechanism", ["Gaussian", "NoPrivacy"])
def test_another_mechanism_is_one_flag(cli, tmp_path, mechanism):
    path = FOLDER / "datalens_mnist_cpu.yaml"
    small = (*SMALL, *smaller(yaml.safe_load(path.read_text())), "--evaluate", "false")
    outcome = cli("fit", "--config", path, "--run_dir", tmp_path / "run", "--mechanism", mechanism, *small)
    assert outcome.code == 0, outcome.err
    claim = read_json(tmp_path / "run" / "claim.json")
    assert claim["mechanism"] == mechanism
    assert claim["level"] == ("NONPRIVATE" if mechanism == "NoPrivacy" else "PROVED")


def test_there_are_experiments():
    assert {path.stem for path in CONFIGS} >= {
        "datalens_fashion_mnist",
        "datalens_mnist",
        "datalens_mnist_cpu",
        "demo",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_says_what_it_is(path):
    """A comment first, and a name that makes its run folder findable."""
    text = path.read_text()
    assert text.startswith("# ")
    assert yaml.safe_load(text)["name"] == path.stem

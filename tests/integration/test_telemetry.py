"""No number computed from private records without noise reaches a logger, unless it was asked for."""

import re

import pytest
from pytorch_lightning.loggers import CSVLogger

from lightning_dp.modules.teacher_gan import TeacherEnsembleGAN
from tests.cli.runs import read_json, read_metrics

ALLOWED = re.compile(
    r"privacy/(epsilon|final_epsilon|delta|releases)|cost/train_time_s|epoch|step"
    r"|eval/(fid|kid|precision|recall|accuracy/(logistic|mlp|cnn))"
)
TRAINED = (
    *("--model.teachers", "DiscriminatorTeachers", "--model.teachers.network", "mlp"),
    *("--model.teachers.num_teachers", "4", "--model.teachers.batch_size", "5", "--model.repulsion", "0"),
)
SHORT = ("--trainer.max_steps", "3")


@pytest.fixture
def logged(monkeypatch):
    """Everything that is handed to a logger, by name."""
    seen: dict[str, list[float]] = {}
    log = CSVLogger.log_metrics

    def spying(self, metrics, step=None):
        for name, value in metrics.items():
            seen.setdefault(name, []).append(value)
        return log(self, metrics, step)

    monkeypatch.setattr(CSVLogger, "log_metrics", spying)
    return seen


@pytest.mark.parametrize("teachers", [(), TRAINED], ids=["energy", "trained"])
@pytest.mark.parametrize("mechanism", ["TopAgg", "Gaussian", "NoPrivacy"])
def test_only_public_names_are_logged(fit, tmp_path, logged, teachers, mechanism):
    outcome = fit(*SHORT, *teachers, "--mechanism", mechanism, "--evaluate_every", "2")
    assert outcome.code == 0, outcome.err
    in_the_file = {name for row in read_metrics(tmp_path / "run") for name in row}
    for name in in_the_file | set(logged):
        assert ALLOWED.fullmatch(name), name
    assert "eval/fid" in in_the_file


@pytest.fixture
def log_in_training(monkeypatch):
    """Let the method log the mean of the private images under a name of the test's choice."""

    def under(name):
        step = TeacherEnsembleGAN.training_step

        def training_step(self, batch, batch_idx):
            step(self, batch, batch_idx)
            self.log(name, self.trainer.datamodule.train_images.float().mean())

        monkeypatch.setattr(TeacherEnsembleGAN, "training_step", training_step)

    return under


class TestRaw:
    def test_a_raw_number_is_dropped(self, fit, log_in_training, logged, tmp_path):
        log_in_training("raw/mean_pixel")
        assert fit(*SHORT, "--evaluate", "false").code == 0
        assert not [name for name in logged if name.startswith("raw")]
        assert "raw/" not in (tmp_path / "run" / "run_card.json").read_text()

    def test_a_name_that_promises_nothing_ends_the_run(self, fit, log_in_training, logged):
        log_in_training("mean_pixel")
        outcome = fit(*SHORT, "--evaluate", "false")
        assert outcome.code == 1
        assert len(outcome.err.splitlines()) == 1
        assert "'mean_pixel'" in outcome.err
        assert "raw/" in outcome.err
        assert "mean_pixel" not in logged

    def test_when_asked_for_it_is_logged_and_the_claim_says_so(self, fit, log_in_training, logged, tmp_path):
        log_in_training("raw/mean_pixel")
        assert fit(*SHORT, "--evaluate", "false", "--telemetry.raw", "true").code == 0
        assert logged["raw/mean_pixel"]
        claim = read_json(tmp_path / "run" / "claim.json")
        assert claim["level"] == "CONDITIONAL"
        assert any("telemetry.raw" in condition for condition in claim["assumptions"])

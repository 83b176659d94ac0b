"""A run that is refused after its settings were found right leaves nothing behind, and nothing of others is removed."""

import pytest

from lightning_dp.errors import ConfigurationError
from lightning_dp.modules.teacher_gan import TeacherEnsembleGAN
from tests.cli.runs import TINY

NO_DATA = ("--data", "MNIST", "--data.root", "nowhere")


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused_in_training_setup(monkeypatch):
    """What shows when loggers have begun and config.yaml is written."""

    def rehearse(self):
        raise ConfigurationError("Expected another network.")

    monkeypatch.setattr(TeacherEnsembleGAN, "rehearse", rehearse)


@pytest.mark.parametrize("where", [(), ("--run_dir", "mine")])
def test_missing_data_leave_no_folder(cli, here, where):
    assert (
        "lightning-dp data fetch mnist" in cli("fit", "--config", TINY, *NO_DATA, "--wandb", "offline", *where).error()
    )
    assert contents(here) == []


@pytest.mark.parametrize("where", [(), ("--run_dir", "mine")])
def test_neither_does_what_is_refused_when_loggers_have_begun(cli, here, where, refused_in_training_setup):
    done = cli("fit", "--config", TINY, "--wandb", "offline", *where)
    assert (done.code, done.err.splitlines()[-1]) == (2, "lightning-dp: error: Expected another network.")
    assert contents(here) == []


@pytest.mark.parametrize("flags", [NO_DATA, ()], ids=["data", "later"])
def test_folders_of_the_user_stay(cli, here, flags, refused_in_training_setup):
    (here / "empty").mkdir()
    (here / "full").mkdir()
    (here / "full" / "notes.txt").write_text("mine")
    for name in ("empty", "full"):
        assert cli("fit", "--config", TINY, *flags, "--run_dir", name).code == 2
    assert contents(here / "empty") == []
    assert (here / "full" / "notes.txt").read_text() == "mine"


def test_a_folder_with_a_ledger_stays(cli, here, monkeypatch):
    def attach(self, session, optimizers):
        raise ConfigurationError("Expected another start.")

    monkeypatch.setattr(TeacherEnsembleGAN, "attach", attach)
    assert cli("fit", "--config", TINY, "--run_dir", "mine").code == 2
    assert {"config.yaml", "ledger.jsonl"} <= set(contents(here / "mine"))

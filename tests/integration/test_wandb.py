"""W&B without an account or a network: the run that was written is read back."""

import math
import socket
import time

import pytest

from lightning_dp.cli.loggers import is_logged_in
from tests.cli.runs import read_json
from tests.integration.wandb_file import read_history, read_summary, record_kinds


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    """An empty home, no key, and no way out to the network."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    # Setting and deleting makes monkeypatch remember the value: WandbLogger writes this variable.
    monkeypatch.setenv("WANDB_MODE", "x")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home" / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "home" / "cache"))
    (tmp_path / "home").mkdir()
    connect = socket.socket.connect

    def local_only(self, address):
        host = address[0] if isinstance(address, tuple) else ""
        assert not host or host in ("127.0.0.1", "::1", "localhost"), f"a connection to {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


def read_finished(path):
    """Return rows and configuration once the last row is there: W&B's service closes the file after the run ended."""
    for _ in range(600):
        rows, config = read_history(path)
        if "exit" in record_kinds(path):
            return rows, config
        time.sleep(0.1)
    raise AssertionError(f"{path} was never completed")


def run_files(folder):
    return sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))


def test_offline_is_the_default_when_not_logged_in(fit, tmp_path):
    outcome = fit("--wandb", "auto", "--trainer.max_steps", "3")
    assert outcome.code == 0, outcome.err
    (path,) = run_files(tmp_path / "run")
    rows, config = read_finished(path)

    claim = read_json(tmp_path / "run" / "claim.json")
    card = read_json(tmp_path / "run" / "run_card.json")
    epsilons = [row["privacy/epsilon"] for row in rows if "privacy/epsilon" in row]
    assert len(epsilons) == 3
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] == claim["epsilon"]
    assert [row["privacy/final_epsilon"] for row in rows if "privacy/final_epsilon" in row] == [claim["epsilon"]]
    (quality,) = [row for row in rows if "eval/fid" in row]
    assert quality["eval/fid"] == card["evaluation"]["fid"]
    assert quality["eval/accuracy/logistic"] == card["evaluation"]["accuracy"]["logistic"]
    assert any("samples" in name for row in rows for name in row)
    assert config["privacy"]["target_epsilon"] == 5
    summary = read_summary(path)
    assert (summary["privacy/level"], summary["privacy/claim"]) == ("PROVED", claim["statement"])
    assert config["mechanism"]["class_path"].endswith("TopAgg")
    assert "stats" not in record_kinds(path)  # memory and load as time goes by follow the secret batches


def test_a_run_without_privacy_holds_no_epsilon(fit, tmp_path):
    assert fit("--wandb", "offline", "--mechanism", "NoPrivacy", "--trainer.max_steps", "2").code == 0
    (path,) = run_files(tmp_path / "run")
    rows, _ = read_finished(path)
    assert any("eval/fid" in row for row in rows)
    assert not [name for row in rows for name in row if "epsilon" in name]
    assert not [value for row in rows for value in row.values() if isinstance(value, float) and math.isinf(value)]


def test_two_runs_of_one_process_are_two_wandb_runs(fit, tmp_path):
    flags = ("--wandb", "offline", "--trainer.max_steps", "1", "--evaluate", "false")
    for name in ("a", "b"):
        assert fit("--run_dir", tmp_path / name, *flags).code == 0
        assert len(run_files(tmp_path / name)) == 1


def test_disabled_writes_nothing(fit, tmp_path):
    assert fit("--trainer.max_steps", "1", "--evaluate", "false").code == 0
    assert not (tmp_path / "run" / "wandb").exists()


class TestLoggedIn:
    def test_nothing_at_hand(self):
        assert not is_logged_in()

    def test_a_key_in_the_environment(self, monkeypatch):
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        assert is_logged_in()

    @pytest.mark.parametrize("mode", ["offline", "dryrun", "disabled"])
    def test_the_mode_wins(self, monkeypatch, mode):
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_MODE", mode)
        assert not is_logged_in()

    def test_a_netrc(self, tmp_path):
        (tmp_path / "home" / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "0" * 40 + "\n")
        assert is_logged_in()

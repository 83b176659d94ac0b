"""Mistakes that show when files are read or a run goes on: one line, and the right exit code."""

import errno
import gzip
import subprocess
import sys

import pytest

from lightning_dp.cli import main
from tests.cli.runs import TINY


class TestFiles:
    def test_missing_data_names_the_command_that_fetches_them(self, fit, tmp_path):
        line = fit("--data", "MNIST", "--data.root", tmp_path / "none").error()
        assert "train-images-idx3-ubyte" in line
        assert f"Run: lightning-dp data fetch mnist --root {tmp_path / 'none'}" in line

    def test_a_truncated_file_is_named(self, fit, tmp_path):
        raw = tmp_path / "MNIST" / "raw"
        raw.mkdir(parents=True)
        (raw / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(100_000))[:60])
        line = fit("--data", "MNIST", "--data.root", tmp_path).error()
        assert "train-images-idx3-ubyte.gz" in line
        assert "truncated" in line
        assert "Run: lightning-dp data fetch mnist" in line

    def test_after_missing_data_the_same_folder_can_be_used(self, fit, tmp_path):
        assert fit("--data", "MNIST", "--data.root", tmp_path / "none").code == 2
        assert fit("--trainer.max_steps", "1", "--evaluate", "false").code == 0

    def test_an_unwritable_run_folder(self, fit, tmp_path):
        (tmp_path / "file").write_text("")
        line = fit("--run_dir", tmp_path / "file" / "run").error()
        assert f"Cannot write to the run folder {tmp_path / 'file' / 'run'}" in line
        assert "--run_dir" in line

    def test_a_folder_that_holds_a_run(self, fit, finished_run):
        before = (finished_run / "ledger.jsonl").read_bytes(), (finished_run / "config.yaml").read_bytes()
        line = fit("--run_dir", finished_run).error()
        assert "already holds a run" in line
        assert "--ckpt_path last" in line
        assert before == ((finished_run / "ledger.jsonl").read_bytes(), (finished_run / "config.yaml").read_bytes())

    def test_a_run_that_is_going_on_elsewhere(self, fit, tmp_path):
        from lightning_dp.accounting.ledger import PrivacyLedger

        assert fit("--trainer.max_steps", "1", "--evaluate", "false").code == 0
        with PrivacyLedger.reopen(tmp_path / "run" / "ledger.jsonl"):
            line = fit("--trainer.max_steps", "1", "--evaluate", "false", "--ckpt_path", "last").error()
        assert "in use by another process" in line

    def test_a_resume_with_other_records(self, fit, tmp_path):
        assert fit("--trainer.max_steps", "1", "--evaluate", "false").code == 0
        line = fit("--trainer.max_steps", "1", "--data.num_train", "190", "--ckpt_path", "last").error()
        assert "was opened with plan.num_teachers=200, now plan.num_teachers=190." in line
        assert "another --run_dir" in line

    def test_a_resume_with_another_network(self, fit, tmp_path):
        assert fit("--trainer.max_steps", "2", "--evaluate", "false").code == 0
        outcome = fit("--trainer.max_steps", "2", "--model.generator.width", "9", "--ckpt_path", "last")
        assert outcome.code == 2
        assert "holds another network (size mismatch for generator." in outcome.err.splitlines()[-1]
        assert "Traceback" not in outcome.err


def test_a_delta_above_one_over_n_is_a_warning_that_the_claim_carries(fit, tmp_path):
    outcome = fit("--privacy.target_delta", "0.01", "--trainer.max_steps", "1", "--evaluate", "false")
    assert outcome.code == 0
    assert "delta=0.01 is above 1 / num_records" in " ".join(outcome.out.replace("│", " ").split())
    claim = (tmp_path / "run" / "claim.json").read_text()
    assert "above 1 / num_records for num_records=200" in claim


def test_a_broken_protocol_is_no_mistake_of_the_user(cli, monkeypatch):
    """Exit codes tell a bug of a method (1) from a mistake of the user (2)."""
    from lightning_dp.cli import commands
    from lightning_dp.errors import PrivacyProtocolError

    def broken(arguments):
        raise PrivacyProtocolError("released twice")

    monkeypatch.setattr(commands, "fit", broken)
    outcome = cli("fit")
    assert outcome.code == 1
    assert outcome.err == "lightning-dp: error: privacy protocol broken: released twice\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "ledger.jsonl"), ["cannot write ledger.jsonl", "make room"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ["not enough memory", "images_per_step"]),
        (MemoryError(), ["not enough memory"]),
    ],
)
def test_a_full_disk_and_a_full_memory_are_one_line(cli, monkeypatch, error, words):
    from lightning_dp.cli import commands

    def full(arguments):
        raise error

    monkeypatch.setattr(commands, "fit", full)
    outcome = cli("fit")
    assert outcome.code == 1
    assert outcome.err.startswith("lightning-dp: error: ")
    assert outcome.err.count("\n") == 1
    assert all(word in outcome.err for word in words)


def test_an_unforeseen_bug_keeps_its_traceback(monkeypatch):
    from lightning_dp.cli import commands

    monkeypatch.setattr(commands, "fit", lambda arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["fit"])


def test_one_line_in_a_process_of_its_own(tmp_path):
    """What other libraries write at start-up would show here: the error comes after Lightning has built a trainer."""
    command = [sys.executable, "-m", "lightning_dp", "fit", "--config", str(TINY), "--run_dir", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, "--data", "MNIST", "--data.root", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("lightning-dp: error: Expected MNIST in ")

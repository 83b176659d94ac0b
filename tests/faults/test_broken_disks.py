"""Full disks, spoilt and hostile files, broken gradients, two processes in one folder: words, and no charge lost."""

import io
import os
import pickle
import random
import shutil
import zipfile

import pytest
import torch

from callbacks import PrivateCheckpoint
from lightning_dp.accounting import ledger_file
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import ConfigurationError, LedgerError
from lightning_dp.gradients.energy_teachers import DirectionChunk
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.noise import NoiseSource
from lightning_dp.mechanisms.topagg import TopAgg
from lightning_dp.modules.release import ReleaseSession
from tests.accounting.test_ledger import start
from tests.cli.runs import TINY, read_json
from tests.conftest import TinyData, callbacks_for, tiny_gan, trainer_for


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run folder as a kill leaves it: six releases of ten, a checkpoint after the fourth."""
    from lightning_dp.cli import main

    folder = tmp_path_factory.mktemp("stopped") / "run"
    fast = ["--evaluate", "false", "--checkpoint_every", "4", "--trainer.enable_progress_bar", "false"]
    arguments = ["fit", "--config", str(TINY), "--run_dir", str(folder), "--trainer.max_steps", "4", *fast]
    assert main(arguments) == 0
    return folder


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of it that may be spoilt."""
    return shutil.copytree(stopped, tmp_path / "run")


@pytest.fixture
def resume(cli, run):
    def go(*flags):
        fast = ["--evaluate", "false", "--checkpoint_every", "4", "--trainer.enable_progress_bar", "false"]
        fixed = ["fit", "--config", TINY, "--run_dir", run, "--trainer.max_steps", "4", *fast]
        return cli(*fixed, *(flags or ("--ckpt_path", "last")))

    return go


def spoilt(data: bytes, how: str) -> bytes:
    dice = random.Random(how)
    if how == "empty":
        return b""
    if how == "cut":
        return data[: len(data) // 2]
    if how == "cut by a byte":
        return data[:-1]
    if how == "garbage":
        return dice.randbytes(4000)
    if how == "zeros":
        return bytes(len(data))
    place = {"a bit of a tensor": None}.get(how, len(data) // 3)
    text = bytearray(data)
    if place is None:  # in the middle of the largest stored record
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            record = max(archive.infolist(), key=lambda info: info.file_size)
        place = record.header_offset + 200 + record.file_size // 2
    text[place] ^= 0x10
    return bytes(text)


@pytest.mark.parametrize("how", ["empty", "cut", "cut by a byte", "garbage", "zeros", "a bit of a tensor"])
def test_a_spoilt_checkpoint_is_refused_in_one_line(run, resume, how):
    checkpoint, ledger = run / "private" / "last.ckpt", (run / "ledger.jsonl").read_bytes()
    checkpoint.write_bytes(spoilt(checkpoint.read_bytes(), how))
    for flags in (("--ckpt_path", "last"), ("--ckpt_path", checkpoint)):
        line = resume(*flags).error()
        assert "last.ckpt" in line
        assert "start a new run" in line
    assert (run / "ledger.jsonl").read_bytes() == ledger


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("form", ["pickle", "torch", "inside"])
def test_no_file_of_a_run_folder_executes_code(run, resume, cli, tmp_path, form):
    target, checkpoint = tmp_path / "executed", run / "private" / "last.ckpt"
    if form == "pickle":
        checkpoint.write_bytes(pickle.dumps(Payload(target)))
    elif form == "torch":
        torch.save({"state_dict": {}, "x": Payload(target)}, checkpoint)
    else:
        stored = torch.load(checkpoint, weights_only=True)
        stored["callbacks"]["PrivacyAccountant"] = Payload(target)
        torch.save(stored, checkpoint)
    assert "last.ckpt" in resume().error()
    assert "last.ckpt" in resume("--ckpt_path", checkpoint).error()
    for name in (
        "release/generator.safetensors",
        "release/generator.json",
        "ledger.jsonl",
        "claim.json",
        "config.yaml",
    ):
        (run / name).write_bytes(pickle.dumps(Payload(target)))
    (run / "config.yaml").write_text(f"data: !!python/object/apply:os.system ['touch {target}']\n")
    for command in ("sample", "evaluate", "account"):
        outcome = cli(command, run)
        assert outcome.code == 2
        assert len(outcome.err.splitlines()) == 1
    assert not target.exists()
    torch.load(checkpoint, weights_only=False) if form != "pickle" else pickle.loads(checkpoint.read_bytes())
    assert target.exists(), "the payload itself works: loading it the wrong way executes it"


def test_a_spoilt_ledger_stops_the_run_before_a_release(run, resume):
    path = run / "ledger.jsonl"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"number":2', b'"number":7'))
    assert "was changed, removed or moved" in resume().err
    path.write_bytes(data.splitlines(keepends=True)[0][:-40])
    assert "header is incomplete" in resume().err
    path.unlink()
    assert "found no ledger" in resume().error()


def test_a_ledger_that_was_cut_is_made_whole_by_the_checkpoint(run, resume):
    """Lines cut off the end: the checkpoint knows of them, and none is forgotten."""
    path = run / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    assert resume().code == 0
    assert len(PrivacyLedger.read(path)) == 4
    assert read_json(run / "claim.json")["num_releases"] == 4


FULL_DISK = """
    import resource, signal, sys
    from pathlib import Path
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails as on a full disk
    from lightning_dp.accounting.events import GaussianRelease, Sampling
    from lightning_dp.accounting.ledger import PrivacyLedger
    from lightning_dp.errors import LedgerError
    ledger = PrivacyLedger({"relation": "replace_one", "unit": "record"}, Path(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    made = 0
    try:
        while True:
            ledger.append(GaussianRelease(noise_std=1.0, l2_sensitivity=1.0), Sampling(scheme="full"))
            made += 1
    except LedgerError as error:
        print(made, error)
"""


def test_a_real_limit_on_the_file_is_a_full_disk(tmp_path):
    """The system itself cuts a line short; the release is not made, and the torn line is charged on reopening."""
    path = tmp_path / "ledger.jsonl"
    with start(FULL_DISK, path, 1000) as process:
        said = process.stdout.read()
    assert "nothing was released" in said
    assert len(said.splitlines()) == 1
    made = int(said.split()[0])
    assert path.stat().st_size == 1000
    with PrivacyLedger.reopen(path) as ledger:
        assert len(ledger) == made + 1


@pytest.mark.parametrize("after", [0, 2])
def test_a_disk_that_fills_up_during_training_ends_the_run_before_the_noise(tmp_path, monkeypatch, after):
    drawn = []
    callbacks = callbacks_for(ledger_path=tmp_path / "ledger.jsonl")
    module = tiny_gan()
    real_write, lines = os.write, []

    def filling(descriptor, data):
        if bytes(data).startswith(b'{"event"'):
            lines.append(data)
            if len(lines) > after:
                raise OSError(28, "No space left on device")
        return real_write(descriptor, data)

    whole = NoiseSource.whole
    monkeypatch.setattr(NoiseSource, "whole", lambda *a, **k: (drawn.append(1), whole(*a, **k))[1])
    with monkeypatch.context() as patch:
        patch.setattr(ledger_file.os, "write", filling)
        with pytest.raises(LedgerError, match=r"No space left on device\); nothing was released"):
            trainer_for(tmp_path, callbacks).fit(module, datamodule=TinyData())
    assert len(drawn) == after
    assert len(PrivacyLedger.read(tmp_path / "ledger.jsonl")) == after


def test_a_disk_that_is_full_for_the_checkpoint_leaves_the_one_before(tmp_path, monkeypatch):
    """One line, the old checkpoint whole, every release charged; the run goes on when there is room."""
    path, ledger = tmp_path / "private" / "last.ckpt", tmp_path / "ledger.jsonl"

    def fit(**options):
        callbacks = callbacks_for(ledger_path=ledger)
        saver = PrivateCheckpoint(path=path, accountant=callbacks[1], every_n_releases=2)
        trainer = trainer_for(tmp_path, [*callbacks, saver], 6, enable_checkpointing=True)
        trainer.fit(tiny_gan(), datamodule=TinyData(), weights_only=True, **options)

    save, saved = torch.save, []

    def filling(checkpoint, file):
        saved.append(1)
        if len(saved) > 1:
            file.write(b"half of a checkpoint")
            raise OSError(28, "No space left on device")
        save(checkpoint, file)

    with monkeypatch.context() as patch:
        patch.setattr("callbacks.private_checkpoint.torch.save", filling)
        with pytest.raises(ConfigurationError, match=r"No space left on device.*--ckpt_path last"):
            fit()
    assert len(PrivacyLedger.read(ledger)) == 4
    assert not path.with_suffix(".part").exists()
    assert "state_dict" in torch.load(path, weights_only=True)
    fit(ckpt_path=path)
    assert len(PrivacyLedger.read(ledger)) == 6


def test_a_second_process_on_one_run_folder_is_refused(run, resume):
    """Whoever holds the ledger is the run; the other leaves no line, no release, and the first goes on."""
    with PrivacyLedger.reopen(run / "ledger.jsonl"):
        before = (run / "ledger.jsonl").read_bytes()
        outcome = resume()
        assert outcome.code == 2
        assert "in use by another process" in outcome.err
        assert len(outcome.err.splitlines()) == 1
        assert (run / "ledger.jsonl").read_bytes() == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("rows", [slice(None), slice(1)], ids=["all", "one"])
@pytest.mark.parametrize("mechanism", [TopAgg(top_k=4), Gaussian()], ids=["TopAgg", "Gaussian"])
def test_gradients_that_are_no_numbers_never_reach_a_release(tmp_path, monkeypatch, bad, rows, mechanism):
    """The released values are finite, and so is what learns from them; the charge is the usual one."""
    make_rows, release, values = DirectionChunk._rows, ReleaseSession.release, []

    def broken(self, basis):
        found = make_rows(self, basis).clone()
        found[rows] = bad
        return found

    def kept(self, *arguments, **options):
        released = release(self, *arguments, **options)
        values.append(released.value)
        return released

    monkeypatch.setattr(DirectionChunk, "_rows", broken)
    monkeypatch.setattr(ReleaseSession, "release", kept)
    module = tiny_gan()
    callbacks = callbacks_for(mechanism, ledger_path=tmp_path / "ledger.jsonl")
    trainer_for(tmp_path, callbacks, 3).fit(module, datamodule=TinyData())
    assert len(values) == 3
    assert all(bool(torch.isfinite(value).all()) for value in values)
    assert all(bool(torch.isfinite(p).all()) for p in module.released_generator().parameters())
    assert len(PrivacyLedger.read(tmp_path / "ledger.jsonl")) == 3


def test_a_teacher_that_fails_ends_the_run_charged(tmp_path):
    """Nothing leaves of the release to which its rows belonged; the run can go on."""
    callbacks = callbacks_for(ledger_path=tmp_path / "ledger.jsonl")
    make_rows, released = DirectionChunk._rows, []

    def failing(self, basis):
        if len(released) == 2:
            raise RuntimeError("teacher 7 ran out of memory")
        return make_rows(self, basis)

    whole = NoiseSource.whole

    def noted(*arguments, **options):
        released.append(1)
        return whole(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DirectionChunk, "_rows", failing)
        patch.setattr(NoiseSource, "whole", noted)
        with pytest.raises(RuntimeError, match="teacher 7"):
            trainer_for(tmp_path, callbacks, 5).fit(tiny_gan(), datamodule=TinyData())
    assert len(released) == 2
    assert len(PrivacyLedger.read(tmp_path / "ledger.jsonl")) in (2, 3)  # charged before or after its rows were made
    again = callbacks_for(ledger_path=tmp_path / "ledger.jsonl")
    trainer_for(tmp_path, again, 5).fit(tiny_gan(), datamodule=TinyData())
    assert len(PrivacyLedger.read(tmp_path / "ledger.jsonl")) == 5  # what was lost stays charged


def test_a_ledger_refuses_a_forged_header():
    for name, value in {"num_records": "many", "target_delta": 2, "unverified": "x", "mechanism": 3}.items():
        with pytest.raises(ConfigurationError, match=f"Expected {name} in a ledger's header"):
            PrivacyLedger({"relation": "replace_one", "unit": "record", name: value}, None)

"""Stopped and resumed in one process: the ledger never forgets, noise never repeats, state and budget carry on."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from callbacks import PrivateCheckpoint
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.cli import fit as fit_module
from lightning_dp.mechanisms.noise import NoiseSource
from lightning_dp.modules.teacher_gan import TeacherEnsembleGAN
from tests.cli.runs import read_json

PLANNED = 12
LENGTH = ("--trainer.max_steps", PLANNED, "--checkpoint_every", "4", "--evaluate", "false")
TRAINED = (
    *("--model.teachers", "DiscriminatorTeachers", "--model.teachers.network", "mlp"),
    *("--model.teachers.num_teachers", "4", "--model.teachers.batch_size", "5", "--model.repulsion", "0"),
)


class Stop(pl.Callback):
    """Raises at the end of a given release, like a crash in mid-run."""

    def __init__(self, release: int, error: type[BaseException]) -> None:
        self.release, self.error = release, error
        self.left = release

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.left -= 1
        if self.left == 0:
            raise self.error("stopped by the test")


@pytest.fixture
def stop_at(monkeypatch):
    """Make the next runs stop after so many releases; None lets them run."""
    own = fit_module.FitCLI._callbacks

    def arm(release: int | None, error: type[BaseException] = RuntimeError) -> None:
        def callbacks(self, *args):
            # In front, so that the checkpoint of this very release is not written.
            return [*([Stop(release, error)] if release is not None else []), *own(self, *args)]

        monkeypatch.setattr(fit_module.FitCLI, "_callbacks", callbacks)

    return arm


@pytest.fixture
def drawn(monkeypatch):
    """Noise of every release as it is drawn, [(release number, noise)]."""
    seen: list[tuple[int, Tensor]] = []
    draw = NoiseSource.whole

    def spying(self, law, shape, *, scale, release_number, leaf="noise"):
        noise = draw(self, law, shape, scale=scale, release_number=release_number, leaf=leaf)
        seen.append((release_number, noise))
        return noise

    monkeypatch.setattr(NoiseSource, "whole", spying)
    return seen


def replayed(drawn: list[tuple[int, Tensor]]) -> int:
    """Return how many draws equal an earlier one."""
    keys = [noise.numpy().tobytes() for _, noise in drawn]
    return len(keys) - len(set(keys))


def crash(fit, *flags):
    with pytest.raises(RuntimeError, match="stopped by the test"):
        fit(*LENGTH, *flags)


def ledger_of(run_dir: Path) -> PrivacyLedger:
    return PrivacyLedger.read(run_dir / "ledger.jsonl")


def writers(run_dir: Path) -> int:
    text = (run_dir / "ledger.jsonl").read_text()
    return len({line.split('"writer":"')[1][:16] for line in text.splitlines()[1:]})


class TestCrash:
    def test_releases_after_the_checkpoint_stay_charged(self, fit, stop_at, drawn, tmp_path):
        run = tmp_path / "run"
        stop_at(6)  # the checkpoint holds 4
        crash(fit)
        assert len(ledger_of(run)) == 6
        stop_at(None)
        outcome = fit(*LENGTH, "--ckpt_path", "last")
        assert outcome.code == 0
        assert any("Still charged: 2 releases after the last checkpoint" in line for line in outcome.logged)
        claim = read_json(run / "claim.json")
        assert claim["num_releases"] == len(ledger_of(run)) == PLANNED
        assert 0.99 * 5 <= claim["epsilon"] <= 5
        assert claim["level"] == "PROVED"
        assert [entry.number for entry in ledger_of(run).entries] == list(range(1, PLANNED + 1))
        assert [number for number, _ in drawn] == list(range(1, PLANNED + 1))
        assert writers(run) == 2
        # 6 before, 6 after, the first 4 of which live on: the model has seen 10 of the 12 paid releases.
        assert torch.load(run / "private" / "last.ckpt", weights_only=True)["round"] == 10
        assert replayed(drawn) == 0

    def test_before_the_first_checkpoint(self, fit, stop_at, drawn, tmp_path):
        stop_at(3)
        crash(fit)
        stop_at(None)
        outcome = fit(*LENGTH, "--ckpt_path", "last")
        assert outcome.code == 0
        assert any("3 releases after the last checkpoint" in line for line in outcome.logged)
        assert [number for number, _ in drawn] == list(range(1, PLANNED + 1))
        assert replayed(drawn) == 0
        assert read_json(tmp_path / "run" / "claim.json")["num_releases"] == PLANNED
        assert torch.load(tmp_path / "run" / "private" / "last.ckpt", weights_only=True)["round"] == PLANNED - 3

    def test_again_and_again(self, fit, stop_at, drawn, tmp_path):
        for _ in range(3):
            stop_at(3)
            crash(fit, *(("--ckpt_path", "last") if drawn else ()))
        stop_at(None)
        assert fit(*LENGTH, "--ckpt_path", "last").code == 0
        assert [number for number, _ in drawn] == list(range(1, PLANNED + 1))
        assert replayed(drawn) == 0
        assert read_json(tmp_path / "run" / "claim.json")["epsilon"] <= 5

    def test_all_spent_and_nothing_saved(self, fit, stop_at, tmp_path):
        """An untrained generator must not be published under the claim of a trained one."""
        stop_at(PLANNED)
        crash(fit, "--checkpoint_every", "100")
        stop_at(None)
        line = fit(*LENGTH, "--ckpt_path", "last").err
        assert "no checkpoint holds what they taught" in line
        assert "--run_dir" in line
        assert not (tmp_path / "run" / "release").exists()

    def test_a_fixed_secret_replays_noise_and_the_spy_notices(self, fit, stop_at, drawn, tmp_path):
        """The broken twin: under insecure_seed the noise of a number is always the same."""
        insecure = ("--privacy.insecure_seed", "1")
        for name in ("a", "b"):
            assert (
                fit("--run_dir", tmp_path / name, "--trainer.max_steps", "2", "--evaluate", "false", *insecure).code
                == 0
            )
        assert replayed(drawn) == 2

    def test_a_ledger_lost_on_the_way_is_restored_from_the_checkpoint(self, fit, stop_at, tmp_path):
        run = tmp_path / "run"
        stop_at(6)
        crash(fit)
        (run / "ledger.jsonl").unlink()
        stop_at(None)
        assert "found no ledger" in fit(*LENGTH, "--ckpt_path", "last").error()
        assert fit(*LENGTH, "--ckpt_path", run / "private" / "last.ckpt").code == 0
        # The 4 of the checkpoint are known; the 2 after it are gone with the file.
        assert read_json(run / "claim.json")["num_releases"] == PLANNED

    def test_a_larger_budget_counts_what_the_smaller_one_spent(self, fit, tmp_path):
        run = tmp_path / "run"
        assert fit(*LENGTH).code == 0
        longer = ("--trainer.max_steps", 20, "--evaluate", "false", "--privacy.target_epsilon", "9")
        outcome = fit(*longer, "--ckpt_path", "last")
        assert outcome.code == 0
        assert any("once it is left, no epsilon is stated" in line for line in outcome.logged)  # before it is spent
        claim = read_json(run / "claim.json")
        # Charged together within the budget of 9; but that was set in view of what the first releases had shown.
        assert (claim["level"], claim["epsilon"], claim["num_releases"]) == ("UNVERIFIED", None, 20)
        assert "kept to the plan that was fixed before its first release" in claim["statement"]
        assert len(ledger_of(run).counts()) == 2  # two noise levels, composed


class TestState:
    def test_resumed_state_is_that_of_the_checkpoint(self, fit, stop_at, monkeypatch, tmp_path):
        """Without noise, a run that was stopped at a checkpoint ends bit for bit like one that was not."""
        exact = ("--mechanism", "NoPrivacy", "--model.ema_decay", "0.5", *TRAINED)
        assert fit(*LENGTH, *exact, "--run_dir", tmp_path / "whole").code == 0
        halves = ("--run_dir", tmp_path / "halves")
        stop_at(5)  # the checkpoint holds 4; without privacy the fifth may be made again
        crash(fit, *exact, *halves)
        stop_at(None)
        fives = ("--trainer.max_steps", PLANNED + 1, *LENGTH[2:])  # the lost release is charged: one more is planned
        monkeypatch.setattr(TeacherEnsembleGAN, "configure_optimizers", planned_for(PLANNED))
        assert fit(*fives, *exact, *halves, "--ckpt_path", "last").code == 0
        whole, resumed = (
            torch.load(tmp_path / name / "private" / "last.ckpt", weights_only=True) for name in ("whole", "halves")
        )
        assert whole["round"] == resumed["round"] == PLANNED
        for state, charged in ((whole, PLANNED), (resumed, PLANNED + 1)):  # who wrote which release differs
            assert sum(state["state_dict"]["_extra_state"].pop("writers").values()) == charged
        assert same(whole["state_dict"], resumed["state_dict"])
        assert same(whole["teachers"], resumed["teachers"])
        assert same(whole["optimizer_states"], resumed["optimizer_states"])
        released = "release/generator.safetensors"
        assert (tmp_path / "whole" / released).read_bytes() == (tmp_path / "halves" / released).read_bytes()

    def test_resuming_a_finished_run_changes_nothing_but_the_time(self, fit, tmp_path):
        run = tmp_path / "run"
        assert fit("--trainer.max_steps", "3").code == 0
        before = {name: (run / name).read_bytes() for name in ("ledger.jsonl", "claim.json", "samples.png")}
        weights = (run / "release" / "generator.safetensors").read_bytes()
        quality = read_json(run / "run_card.json")["evaluation"]
        outcome = fit("--trainer.max_steps", "3", "--ckpt_path", "last")
        assert outcome.code == 0
        assert before == {name: (run / name).read_bytes() for name in before}
        assert weights == (run / "release" / "generator.safetensors").read_bytes()
        assert read_json(run / "run_card.json")["evaluation"]["fid"] == quality["fid"]

    def test_a_kill_during_the_last_evaluation_loses_nothing(self, fit, stop_at, monkeypatch, tmp_path):
        """The checkpoint of the last release is written before the evaluation begins."""
        from callbacks import EvaluateGenerator

        def die(self, trainer, pl_module):
            raise RuntimeError("stopped by the test")

        with monkeypatch.context() as patch:
            patch.setattr(EvaluateGenerator, "on_train_end", die)
            with pytest.raises(RuntimeError, match="stopped"):
                fit("--trainer.max_steps", "3")
        assert fit("--trainer.max_steps", "3", "--ckpt_path", "last").code == 0
        assert read_json(tmp_path / "run" / "run_card.json")["evaluation"]["fid"] > 0
        assert torch.load(tmp_path / "run" / "private" / "last.ckpt", weights_only=True)["round"] == 3


class TestInterrupt:
    def test_ctrl_c_saves_and_says_how_to_go_on(self, fit, stop_at, drawn, tmp_path):
        import signal

        handler = signal.getsignal(signal.SIGINT)
        try:
            stop_at(6, KeyboardInterrupt)
            outcome = fit(*LENGTH)
        finally:
            signal.signal(signal.SIGINT, handler)  # Lightning leaves it switched off
        assert outcome.code == 130
        assert len(outcome.err.splitlines()) == 1
        assert f"--run_dir {tmp_path / 'run'} --ckpt_path last" in outcome.err
        assert not (tmp_path / "run" / "release").exists()
        stop_at(None)
        assert fit(*LENGTH, "--ckpt_path", "last").code == 0
        assert [number for number, _ in drawn] == list(range(1, PLANNED + 1))
        # Nothing was lost: the interrupt saved the sixth release.
        assert torch.load(tmp_path / "run" / "private" / "last.ckpt", weights_only=True)["round"] == PLANNED


class TestTornCheckpoint:
    def test_a_crash_while_saving_leaves_the_checkpoint_before(self, fit, stop_at, monkeypatch, tmp_path):
        run = tmp_path / "run"
        save = pl.Trainer.save_checkpoint

        def torn(self, path, *args, **options):
            if self.global_step < 8:
                return save(self, path, *args, **options)
            Path(path).write_bytes(b"half a checkpoint")
            raise RuntimeError("stopped by the test")

        with monkeypatch.context() as patch:
            patch.setattr(pl.Trainer, "save_checkpoint", torn)
            crash(fit)
        assert torch.load(run / "private" / "last.ckpt", weights_only=True)["round"] == 4
        assert fit(*LENGTH, "--ckpt_path", "last").code == 0
        assert read_json(run / "claim.json")["num_releases"] == PLANNED

    def test_how_often_is_checked(self, tmp_path):
        from lightning_dp.errors import ConfigurationError

        with pytest.raises(ConfigurationError, match="checkpoint_every >= 1"):
            PrivateCheckpoint(path=tmp_path / "last.ckpt", accountant=None, every_n_releases=0)


def planned_for(num_releases):
    """The module's own optimizers, with the schedule of another length."""
    own = TeacherEnsembleGAN.configure_optimizers

    def configure(self):
        self.planned_releases = num_releases
        return own(self)

    return configure


def same(a, b) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b

"""What stands at the end of a run: progress, checkpoint, grid, evaluation, card."""

import io
import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from callbacks import (
    EvaluateGenerator,
    GradientPrivatizer,
    PrivacyAccountant,
    PrivateCheckpoint,
    ReleaseProgress,
    RunFolder,
    SampleGrid,
)
from lightning_dp.errors import ConfigurationError
from lightning_dp.evaluation.protocol import EvaluationProtocol
from lightning_dp.mechanisms.no_privacy import NoPrivacy
from lightning_dp.mechanisms.topagg import TopAgg
from lightning_dp.modules.warm_start import MomentsWarmStart
from tests.conftest import TinyData, callbacks_for, settings, tiny_gan, trainer_for

QUICK = EvaluationProtocol(num_samples=16, num_reference=16, classifiers=("logistic",))


class TestProgress:
    def lines(self, tmp_path, mechanism=None, max_steps=4, terminal=False):
        callbacks = callbacks_for(mechanism)
        progress, text = ReleaseProgress(accountant=callbacks[1]), io.StringIO()
        progress._console = Console(file=text, force_terminal=terminal, width=120)
        trainer = trainer_for(tmp_path, [*callbacks, progress], max_steps, enable_progress_bar=True)
        trainer.fit(tiny_gan(), datamodule=TinyData())
        return text.getvalue().splitlines()

    def test_without_a_terminal_a_line_now_and_then(self, tmp_path):
        lines = self.lines(tmp_path, max_steps=25)
        assert 10 <= len(lines) <= 14
        assert lines[-1].startswith("releases 25/25, epsilon ")
        # Never below the budget that was spent: the last line is the budget, rounded up.
        assert float(lines[-1].rpartition(" ")[2]) >= 4.999

    def test_no_number_where_nothing_is_proved(self, tmp_path):
        lines = self.lines(tmp_path, NoPrivacy())
        assert lines[-1] == "releases 4/4, no epsilon is proved"

    def test_a_line_has_the_epsilon_of_its_releases_even_if_it_is_computed_rarely(self, tmp_path, monkeypatch):
        monkeypatch.setattr(PrivacyAccountant, "_is_time_to_speak", lambda self: len(self.ledger) % 7 == 0)
        rare = self.lines(tmp_path, max_steps=25)
        monkeypatch.undo()
        assert rare == self.lines(tmp_path, max_steps=25)

    def test_a_bar_says_of_which_release_its_epsilon_is(self):
        accountant = SimpleNamespace(epsilon=1.25, epsilon_releases=40)
        progress = ReleaseProgress(accountant=accountant)
        assert progress._spent(40) == "epsilon 1.2500"
        assert progress._spent(43) == "epsilon 1.2500 at release 40"
        accountant.epsilon, accountant.epsilon_releases = None, 0
        assert progress._spent(1) == ""

    def test_on_a_terminal_one_bar(self, tmp_path):
        text = "".join(self.lines(tmp_path, terminal=True))
        assert "4/4" in text


class TestCheckpoint:
    def saved(self, tmp_path, monkeypatch, max_steps, every):
        callbacks = callbacks_for()
        checkpoint = PrivateCheckpoint(
            path=tmp_path / "p" / "last.ckpt", accountant=callbacks[1], every_n_releases=every
        )
        trainer, rounds = trainer_for(tmp_path, [*callbacks, checkpoint], max_steps, enable_checkpointing=True), []
        save = trainer.save_checkpoint
        monkeypatch.setattr(trainer, "save_checkpoint", lambda path: rounds.append(trainer.global_step) or save(path))
        trainer.fit(tiny_gan(), datamodule=TinyData())
        assert [path.name for path in (tmp_path / "p").iterdir()] == ["last.ckpt"]
        assert torch.load(tmp_path / "p" / "last.ckpt", weights_only=True)["round"] == rounds[-1]
        return rounds

    def test_every_so_many_releases_and_with_the_last(self, tmp_path, monkeypatch):
        assert self.saved(tmp_path, monkeypatch, max_steps=7, every=3) == [3, 6, 7]

    def test_the_last_is_saved_once(self, tmp_path, monkeypatch):
        assert self.saved(tmp_path, monkeypatch, max_steps=6, every=3) == [3, 6]

    def test_with_the_last_only(self, tmp_path, monkeypatch):
        assert self.saved(tmp_path, monkeypatch, max_steps=2, every=100) == [2]


class TestEvaluation:
    def fit(self, tmp_path, evaluation, grid=None, max_steps=4):
        extra = [callback for callback in (evaluation, grid) if callback is not None]
        trainer = trainer_for(tmp_path, [*callbacks_for(), *extra], max_steps)
        trainer.fit(tiny_gan(), datamodule=TinyData())
        return trainer

    def test_it_leaves_the_run_as_it_was(self, tmp_path):
        """Judging samples on the way draws no number that training would have drawn."""
        weights = []
        for evaluation in (None, EvaluateGenerator(protocol=QUICK, every_n_releases=1)):
            callbacks = callbacks_for(insecure_seed=3)
            trainer = trainer_for(tmp_path, [*callbacks, *([evaluation] if evaluation else [])], 3)
            module = tiny_gan()
            trainer.fit(module, datamodule=TinyData())
            weights.append([p.clone() for p in module.generator.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))

    def test_only_the_test_split_is_read(self, tmp_path, monkeypatch):
        """Training images are NaN to the evaluation: it may not look at them."""
        from lightning_dp.evaluation import protocol

        seen = []
        judge = protocol.evaluate_samples

        def spying(images, labels, test_images, test_labels, *args, **options):
            seen.append(test_images)
            return judge(images, labels, test_images, test_labels, *args, **options)

        for module in ("lightning_dp.evaluation.protocol", "lightning_dp.modules.base", "callbacks.evaluate_generator"):
            monkeypatch.setattr(f"{module}.evaluate_samples", spying, raising=False)
        trainer = self.fit(tmp_path, EvaluateGenerator(protocol=QUICK))
        assert len(seen) == 1
        assert torch.equal(seen[0], trainer.datamodule.test_images)

    def test_what_was_just_judged_is_not_judged_again(self, tmp_path, monkeypatch):
        evaluation, calls = EvaluateGenerator(protocol=QUICK, every_n_releases=2), []
        judge = EvaluateGenerator._evaluate
        monkeypatch.setattr(EvaluateGenerator, "_evaluate", lambda *args: calls.append(1) or judge(*args))
        self.fit(tmp_path, evaluation)
        done = len(calls)
        evaluation.on_train_end(None, None)  # would need a trainer to judge
        assert done == len(calls) == 2
        assert evaluation.time_s >= evaluation.result.wall_time_s

    @pytest.mark.parametrize("every", [0, -1])
    def test_how_often_is_checked(self, every):
        with pytest.raises(ConfigurationError, match="evaluate_every >= 1"):
            EvaluateGenerator(every_n_releases=every)
        with pytest.raises(ConfigurationError, match="evaluate_every >= 1"):
            SampleGrid(path="x.png", every_n_releases=every)

    def test_the_grid_is_a_picture_of_every_class(self, tmp_path):
        path = tmp_path / "grid.png"
        self.fit(tmp_path, None, SampleGrid(path=path, per_class=3, every_n_releases=2))
        assert path.read_bytes().startswith(b"\x89PNG")


class TestRunFolder:
    def test_without_an_evaluation(self, tmp_path):
        callbacks = callbacks_for(ledger_path=tmp_path / "ledger.jsonl")
        folder = RunFolder(path=tmp_path, privatizer=callbacks[0], evaluation=None, config={"a": 1}, title="tiny")
        trainer_for(tmp_path, [*callbacks, folder], 3).fit(tiny_gan(), datamodule=TinyData())
        card = json.loads((tmp_path / "run_card.json").read_text())
        assert card["evaluation"] is None
        assert card["sample_grid"] is None
        assert card["budget"]["releases"] == 3
        assert card["config"] == {"a": 1}
        assert card["data"]["num_records"] == 40
        curve = card["epsilon_curve"]
        assert [point[0] for point in curve] == [1, 2, 3]
        assert curve[-1][1] == card["claim"]["epsilon"]
        assert [a[1] < b[1] for a, b in pairwise(curve)] == [True, True]
        assert folder.card is not None

    def test_the_card_names_the_noise_it_ran_with(self, tmp_path):
        callbacks = callbacks_for()
        folder = RunFolder(path=tmp_path, privatizer=callbacks[0], evaluation=None, config={}, title="tiny")
        trainer_for(tmp_path, [*callbacks, folder], 3).fit(tiny_gan(), datamodule=TinyData())
        card = json.loads((tmp_path / "run_card.json").read_text())
        ((event, _),) = callbacks[1].ledger.counts()
        assert card["mechanism"]["noise_std"] == event.noise_std
        assert card["mechanism"]["l2_sensitivity"] == event.l2_sensitivity
        assert "fresh secret" in card["seed_policy"]

    def test_the_card_tells_how_a_warm_start_and_the_method_share_the_budget(self, tmp_path):
        warm = MomentsWarmStart(budget=0.3, samples=20, steps=2, num_coefficients=10)
        accountant = PrivacyAccountant(privacy=settings())
        privatizer = GradientPrivatizer(mechanism=TopAgg(top_k=4), accountant=accountant, warm_start=warm)
        folder = RunFolder(path=tmp_path, privatizer=privatizer, evaluation=None, config={}, title="tiny")
        trainer_for(tmp_path, [privatizer, accountant, folder], 3).fit(tiny_gan(), datamodule=TinyData())
        budget = json.loads((tmp_path / "run_card.json").read_text())["budget"]
        assert budget["epsilon_of_warm_start_alone"] == pytest.approx(0.3 * 5, rel=1e-3)
        assert 3.5 < budget["epsilon_of_method_alone"] < 5  # more than the rest: the two compose

    def test_an_insecure_seed_is_on_the_card(self, tmp_path):
        callbacks = callbacks_for(insecure_seed=5)
        folder = RunFolder(path=tmp_path, privatizer=callbacks[0], evaluation=None, config={}, title="tiny")
        trainer_for(tmp_path, [*callbacks, folder], 2).fit(tiny_gan(), datamodule=TinyData())
        card = json.loads((tmp_path / "run_card.json").read_text())
        assert "not private" in card["seed_policy"]
        assert card["claim"]["epsilon"] is None
        assert card["epsilon_curve"] == []
        assert "target_epsilon" not in card["budget"]


def test_a_run_that_diverged_still_leaves_its_claim(tmp_path):
    callbacks = callbacks_for()
    evaluation = EvaluateGenerator(protocol=QUICK)
    folder = RunFolder(path=tmp_path, privatizer=callbacks[0], evaluation=evaluation, config={}, title="diverged")
    grid = SampleGrid(path=tmp_path / "samples.png")
    module = tiny_gan(learning_rate=1e38, step_size=1e30)
    trainer_for(tmp_path, [folder, *callbacks, evaluation, grid], max_steps=3).fit(module, datamodule=TinyData())
    assert not torch.isfinite(module.generator.means).all()
    assert json.loads((tmp_path / "claim.json").read_text())["num_releases"] == 3
    assert evaluation.result is None
    assert not (tmp_path / "samples.png").exists()

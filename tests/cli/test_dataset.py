"""Runs that share the budget of a data set: reserved before the first release, refused in one line."""

import json
import shutil

import pytest

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.budget_request import DatasetBudgetSettings
from lightning_dp.accounting.dataset_budget import DatasetBudget
from lightning_dp.accounting.ledger import PrivacyLedger
from tests.cli.runs import read_json
from tests.conftest import TinyData, callbacks_for, tiny_gan, trainer_for


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "budget"


@pytest.fixture
def share(fit, folder, tmp_path):
    """Fit into a run folder of this name, within the budget."""

    def run(name, *flags, epsilon=("--dataset_budget.epsilon", 8)):
        fast = ("--evaluate", "false", "--trainer.enable_progress_bar", "false")
        where = ("--run_dir", tmp_path / name, "--dataset_budget.folder", folder)
        return fit(*where, *fast, *epsilon, *flags)

    return run


def test_two_runs_fit_the_third_is_refused_and_leaves_nothing(share, folder, tmp_path, cli):
    assert share("a").code == 0
    assert share("b", epsilon=()).code == 0
    line = share("c", epsilon=()).error()
    assert "9.41 % of it is left, and 45.3 % is asked" in line
    assert "1 release (now 5)" in line
    assert not (tmp_path / "c").exists()
    assert share("c", "--trainer.max_steps", 1, "--privacy.target_epsilon", 1, epsilon=()).code == 0

    outcome = cli("account", "--dataset", folder)
    assert outcome.code == 0
    assert "(epsilon=8.000, delta=1e-05)-DP per record, replace-one" in outcome.out
    assert "composed as one list" in outcome.out
    found = json.loads(cli("account", "--dataset", folder, "--delta", "1e-6", "--json").out)
    joined = {}
    for name in "abc":
        for key, count in PrivacyLedger.read(tmp_path / name / "ledger.jsonl").counts().items():
            joined[key] = joined.get(key, 0) + count
    assert found["composed"]["epsilon"] == compute_epsilon(joined, delta=1e-6, relation="replace_one").epsilon
    assert found["claim"]["epsilon"] > found["composed"]["epsilon"]
    assert [run["releases"] for run in found["runs"]] == [5, 5, 1]


def test_a_killed_run_goes_on_without_reserving_twice(share, folder, tmp_path):
    assert share("a", "--checkpoint_every", 2).code == 0
    run = tmp_path / "a"
    # as a kill after the third release leaves it
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    for name in ("claim.json", "run_card.json"):
        (run / name).unlink()
    older = tmp_path / "older"
    shutil.copytree(run, older)
    (older / "ledger.jsonl").write_bytes(b"".join(lines[:4]))
    (older / "private" / "last.ckpt").unlink()
    # the budget has seen five releases: this folder is an older copy, whose other releases were made
    assert "older copy" in share("older", "--ckpt_path", "last").error()
    shares = DatasetBudget(folder).state().spent
    outcome = share("a", "--ckpt_path", "last")
    assert outcome.code == 0
    assert DatasetBudget(folder).state().spent == shares
    assert read_json(run / "claim.json")["num_releases"] == 5


def test_a_run_that_dies_before_its_first_release_gives_back(tmp_path, folder):
    class Broken(TinyData):
        def train_dataloader(self):
            raise RuntimeError("no loader")

    def callbacks():
        privatizer, accountant = callbacks_for(ledger_path=tmp_path / "ledger.jsonl")
        accountant.dataset_budget = DatasetBudgetSettings(folder=str(folder), epsilon=9.0)
        return [privatizer, accountant]

    with pytest.raises(RuntimeError, match="no loader"):
        trainer_for(tmp_path, callbacks()).fit(tiny_gan(), datamodule=Broken())
    assert DatasetBudget(folder).state().runs == {}
    trainer_for(tmp_path, callbacks()).fit(tiny_gan(), datamodule=TinyData())
    (charge,) = DatasetBudget(folder).state().runs.values()
    assert sum(charge.counts.values()) == 5


def test_a_run_that_dies_after_its_first_release_stays_charged_in_full(tmp_path, folder):
    privatizer, accountant = callbacks_for(ledger_path=tmp_path / "ledger.jsonl")
    accountant.dataset_budget = DatasetBudgetSettings(folder=str(folder), epsilon=9.0)
    module = tiny_gan()
    step, made = module.training_step, []

    def dies(*arguments):
        if made:
            raise RuntimeError("a broken second step")
        made.append(1)
        return step(*arguments)

    module.training_step = dies
    with pytest.raises(RuntimeError, match="second step"):
        trainer_for(tmp_path, [privatizer, accountant]).fit(module, datamodule=TinyData())
    (charge,) = DatasetBudget(folder).state().runs.values()
    assert sum(charge.counts.values()) == 5
    assert list(charge.writers.values()) == [1]


def test_the_flag_may_not_be_forgotten_on_resume(share, fit, tmp_path):
    assert share("a").code == 0
    line = fit("--run_dir", tmp_path / "a", "--ckpt_path", "last").err
    assert "opened with dataset_budget=True, now dataset_budget=None" in line
    assert fit("--run_dir", tmp_path / "b", "--evaluate", "false").code == 0
    assert "now dataset_budget=True" in share("b", "--ckpt_path", "last").err


def test_a_run_without_privacy_needs_a_word(share, cli, folder):
    assert share("a").code == 0
    line = share("b", "--mechanism", "NoPrivacy", epsilon=()).error()
    assert "NONPRIVATE" in line
    assert "--dataset_budget.allow_unproved true" in line
    assert "UNVERIFIED" in share("b", "--privacy.insecure_seed", 3, epsilon=()).error()
    assert share("b", "--mechanism", "NoPrivacy", "--dataset_budget.allow_unproved", "true", epsilon=()).code == 0
    out = cli("account", "--dataset", folder).out
    assert "No differential privacy" in out
    assert "epsilon=8.000" not in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset_budget.epsilon", "3"], "needs the folder"),
        (["--dataset_budget.folder", "x", "--dataset_budget.epsilon", "-1"], "dataset_budget.epsilon > 0"),
        (["--dataset_budget.folder", "x"], "say what all its runs together may spend"),
        (["--dataset_budget.folder", "x", "--dataset_budget.epsilon", "3", "--dataset_budget.rule", "pld"], "rule"),
    ],
)
def test_mistakes_are_one_line(fit, flags, words):
    assert words in fit(*flags).error()


def test_account_of_no_budget_and_of_a_broken_one(cli, share, folder, tmp_path):
    assert "no such file" in cli("account", "--dataset", tmp_path / "none").error()
    assert share("a").code == 0
    assert "whole plan stays charged" in cli("account", "--dataset", folder, "--give_back", tmp_path / "a").error()
    assert "only an empty ledger" in cli("account", "--dataset", folder, "--give_back", tmp_path / "none").error()
    assert "0 < delta < 1" in cli("account", "--dataset", folder, "--delta", "2").error()
    path = folder / "budget.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"count":5', b'"count":1'))
    assert "was changed, removed or moved" in cli("account", "--dataset", folder).error()
    assert "was changed, removed or moved" in share("b").error()


def test_a_reservation_goes_with_its_run_alone(share, tmp_path):
    assert share("a").code == 0
    line = share("a", "--ckpt_path", "last", "--dataset_budget.reservation", "another").err
    assert "got dataset_budget.reservation=another. Drop it." in line


def test_a_run_that_the_budget_does_not_know_may_not_go_on_in_it(share, folder, tmp_path):
    """As after a budget's folder was deleted, and opened anew by the resumed run."""
    assert share("a").code == 0
    shutil.rmtree(folder)
    line = share("a", "--ckpt_path", "last").err
    assert "has made 5 releases, of which the budget in" in line
    assert not DatasetBudget(folder).exists()


@pytest.mark.parametrize("is_copy", [False, True])
def test_a_run_that_was_killed_is_charged_for_what_it_had_room_to_release(tmp_path, folder, monkeypatch, is_copy):
    """60 releases are noted three at a time: a kill after the fifth costs the sixth; a copy without it, too."""
    planned, run = 60, tmp_path / "run"

    def callbacks(where):
        privatizer, accountant = callbacks_for(ledger_path=where / "ledger.jsonl")
        accountant.dataset_budget = DatasetBudgetSettings(folder=str(folder), epsilon=30.0)
        return privatizer, accountant

    run.mkdir()
    privatizer, accountant = callbacks(run)
    monkeypatch.setattr(accountant, "_close", lambda: accountant.ledger.close())  # as a kill: no last word
    module = tiny_gan()
    step, made = module.training_step, []

    def dies(*arguments):
        if len(made) == 5:
            raise RuntimeError("killed")
        made.append(1)
        return step(*arguments)

    module.training_step = dies
    with pytest.raises(RuntimeError, match="killed"):
        trainer_for(run, [privatizer, accountant], planned).fit(module, datamodule=TinyData())
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 5
    if is_copy:
        (run / "ledger.jsonl").write_bytes(b"".join(lines[:-1]))
    privatizer, accountant = callbacks(run)
    trainer_for(run, [privatizer, accountant], planned).fit(tiny_gan(), datamodule=TinyData())
    ledger = PrivacyLedger.read(run / "ledger.jsonl")
    assert list(ledger.writers().values()) == [6, planned - 6]
    assert accountant.claim().num_releases == planned
    assert str(accountant.claim().level) == "PROVED"
    (charge,) = DatasetBudget(folder).state().runs.values()
    assert sum(charge.counts.values()) == planned

"""What a run leaves, and the commands that work on it: sample, evaluate, account."""

import json
import shutil

import numpy as np
import pytest
import yaml

from datamodules import EmbeddedDigits
from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.ledger import PrivacyLedger
from tests.cli.runs import changed, read_json, read_metrics


@pytest.fixture
def run_copy(finished_run, tmp_path):
    """A run folder of this test's own."""
    return shutil.copytree(finished_run, tmp_path / "copy")


class TestRunFolder:
    def test_it_holds_what_a_colleague_needs_and_nothing_else(self, finished_run):
        files = {str(path.relative_to(finished_run)) for path in finished_run.rglob("*") if path.is_file()}
        assert files == {
            "claim.json",
            "config.yaml",
            "ledger.jsonl",
            "metrics/attempt_0/metrics.csv",
            "private/last.ckpt",
            "release/generator.json",
            "release/generator.safetensors",
            "run_card.html",
            "run_card.json",
            "samples.png",
        }

    def test_claim_card_ledger_metrics_and_release_agree(self, finished_run):
        claim = read_json(finished_run / "claim.json")
        card = read_json(finished_run / "run_card.json")
        ledger = PrivacyLedger.read(finished_run / "ledger.jsonl")
        spent = compute_epsilon(ledger.counts(), delta=1e-5, relation="replace_one").epsilon
        assert claim["level"] == "PROVED"
        assert claim["epsilon"] == spent
        assert 0.99 * 5 <= spent <= 5
        assert card["claim"]["epsilon"] == spent
        assert card["claim_statement"] == claim["statement"]
        assert card["run_id"] == ledger.header["run_id"]
        assert card["budget"] == {
            "target_epsilon": 5.0,
            "target_delta": 1e-5,
            "planned_releases": 5,
            "releases": 5,
        }
        assert read_json(finished_run / "release" / "generator.json")["claim"]["epsilon"] == spent
        assert [entry.number for entry in ledger.entries] == [1, 2, 3, 4, 5]

    def test_metrics_hold_epsilon_after_each_release(self, finished_run):
        rows = [row for row in read_metrics(finished_run) if "privacy/epsilon" in row]
        ledger = PrivacyLedger.read(finished_run / "ledger.jsonl")
        ((key, _),) = ledger.counts().items()
        assert [row["privacy/releases"] for row in rows] == [1, 2, 3, 4, 5]
        for count, row in enumerate(rows, start=1):
            # Exactly: a float32 on the way would show an epsilon below the one spent.
            spent = compute_epsilon({key: count}, delta=1e-5, relation="replace_one").epsilon
            assert row["privacy/epsilon"] == spent

    def test_metrics_hold_quality_and_cost(self, finished_run):
        names = {name for row in read_metrics(finished_run) for name in row}
        quality = {"eval/fid", "eval/kid", "eval/precision", "eval/recall", "eval/accuracy/logistic"}
        assert names >= quality | {"privacy/final_epsilon", "privacy/delta", "cost/train_time_s"}

    def test_the_configuration_is_resolved(self, finished_run):
        config = yaml.safe_load((finished_run / "config.yaml").read_text())
        assert config["mechanism"]["init_args"]["threshold"] == 0.0  # a default that the file does not name
        given = changed("name", "tiny")
        assert config["privacy"]["target_epsilon"] == given["privacy"]["target_epsilon"]

    def test_the_page_shows_the_claim_and_the_samples(self, finished_run):
        page = (finished_run / "run_card.html").read_text()
        assert "PROVED" in page
        assert "data:image/png;base64," in page

    def test_the_table_at_the_end(self, fit, tmp_path):
        out = " ".join(fit().out.replace("│", " ").split())
        for words in ("epsilon 5.0000", "delta 1e-05", "relation replace_one", "claim level PROVED", "accuracy, logi"):
            assert words in out
        for words in ("FID (digits-fashion-cnn)", "time", "total"):
            assert words in out
        for name in ("samples.png", "run_card.html", "release"):
            assert str(tmp_path / "run" / name) in out


class TestSample:
    def test_shapes_types_and_labels(self, cli, finished_run, tmp_path):
        outcome = cli("sample", finished_run, "--num", "25", "--out", tmp_path / "s.npz")
        assert outcome.code == 0
        with np.load(tmp_path / "s.npz") as file:
            assert set(file) == {"images", "labels"}
            assert file["images"].shape == (25, 1, 28, 28)
            assert file["images"].dtype == np.uint8
            assert file["labels"].tolist() == [i % 10 for i in range(25)]
        assert str(tmp_path / "s.npz") in outcome.out
        assert read_json(finished_run / "claim.json")["statement"] in outcome.out

    def test_a_seed_makes_it_reproducible(self, cli, finished_run, tmp_path):
        images = []
        for name, seed in (("a", "3"), ("b", "3"), ("c", "4"), ("d", None), ("e", None)):
            flags = ("--seed", seed) if seed else ()
            assert cli("sample", finished_run, "--num", "10", *flags, "--out", tmp_path / f"{name}.npz").code == 0
            images.append(np.load(tmp_path / f"{name}.npz")["images"])
        assert (images[0] == images[1]).all()
        assert (images[0] != images[2]).any()
        assert (images[3] != images[4]).any()

    def test_by_default_into_the_run_folder(self, cli, run_copy):
        assert cli("sample", run_copy, "--num", "3").code == 0
        assert (run_copy / "samples.npz").exists()

    def test_not_into_a_release_folder_which_is_published_whole(self, cli, run_copy, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        before = sorted((run_copy / "release").iterdir())
        assert cli("sample", run_copy / "release", "--num", "3").code == 0
        assert (tmp_path / "samples.npz").exists()
        assert sorted((run_copy / "release").iterdir()) == before

    @pytest.mark.parametrize("name", ["images.png", "nowhere/s.npz"])
    def test_an_output_that_cannot_be(self, cli, finished_run, tmp_path, name):
        line = cli("sample", finished_run, "--num", "3", "--out", tmp_path / name).error()
        assert "--out" in line

    def test_a_damaged_release(self, cli, run_copy):
        weights = run_copy / "release" / "generator.safetensors"
        weights.write_bytes(weights.read_bytes()[:-40])
        line = cli("sample", run_copy, "--num", "3").error()
        assert str(weights) in line


class TestEvaluate:
    def test_json_repeats_the_numbers_of_the_run(self, cli, finished_run):
        """Same protocol, same seed of samples: `evaluate` on the release gives what the run itself reported."""
        outcome = cli("evaluate", finished_run, "--json")
        assert outcome.code == 0
        result = json.loads(outcome.out)
        card = read_json(finished_run / "run_card.json")["evaluation"]
        for name in ("fid", "kid", "precision", "recall", "accuracy", "protocol_hash", "num_samples"):
            assert result[name] == card[name]

    def test_a_flag_changes_the_protocol(self, cli, finished_run):
        flags = ("--evaluation.num_samples", "50", "--evaluation.classifiers", "[]", "--seed", "9")
        result = json.loads(cli("evaluate", finished_run, "--json", *flags).out)
        assert result["num_samples"] == 50
        assert result["accuracy"] == {}

    def test_table(self, cli, finished_run):
        out = cli("evaluate", finished_run).out
        assert "FID (digits-fashion-cnn)" in out
        assert "PROVED" in out

    def test_data_of_a_plug_in(self, cli, run_copy):
        class FewDigits(EmbeddedDigits):
            """As a package of the user's own would define it."""

        config = yaml.safe_load((run_copy / "config.yaml").read_text())
        config["data"]["class_path"] = "somewhere.FewDigits"
        (run_copy / "config.yaml").write_text(yaml.safe_dump(config))
        flags = ("--evaluation.num_samples", "50", "--evaluation.classifiers", "[]")
        assert cli("evaluate", run_copy, "--json", *flags).code == 0
        assert FewDigits.facts == EmbeddedDigits.facts

    def test_data_that_nobody_has_defined(self, cli, run_copy):
        config = yaml.safe_load((run_copy / "config.yaml").read_text())
        config["data"]["class_path"] = "os.EmbeddedDigit"
        (run_copy / "config.yaml").write_text(yaml.safe_dump(config))
        assert "'EmbeddedDigit'. Did you mean EmbeddedDigits?" in cli("evaluate", run_copy).error()

    def test_a_run_without_its_configuration(self, cli, run_copy):
        (run_copy / "config.yaml").unlink()
        assert "config.yaml" in cli("evaluate", run_copy).error()


class TestAccount:
    def test_text_agrees_with_the_claim(self, cli, finished_run):
        outcome = cli("account", finished_run)
        claim = read_json(finished_run / "claim.json")
        assert outcome.code == 0
        assert outcome.out.splitlines()[0] == claim["statement"]
        assert "agrees with the run's own claim" in outcome.out
        for line in claim["not_covered"]:
            assert line in outcome.out

    def test_json_is_the_claim(self, cli, finished_run):
        result = json.loads(cli("account", finished_run, "--json").out)
        assert result.pop("agrees_with_run") is True
        assert result == read_json(finished_run / "claim.json")

    @pytest.mark.parametrize("delta", [1e-3, 1e-7])
    def test_any_delta(self, cli, finished_run, delta):
        result = json.loads(cli("account", finished_run, "--delta", delta, "--json").out)
        ledger = PrivacyLedger.read(finished_run / "ledger.jsonl")
        assert result["delta"] == delta
        assert result["epsilon"] == compute_epsilon(ledger.counts(), delta=delta, relation="replace_one").epsilon
        assert (result["epsilon"] > 5) == (delta < 1e-5)
        assert result["agrees_with_run"] is None

    def test_the_ledger_alone_is_enough(self, cli, finished_run, tmp_path):
        shutil.copy(finished_run / "ledger.jsonl", tmp_path / "ledger.jsonl")
        for place in (tmp_path, tmp_path / "ledger.jsonl"):
            result = json.loads(cli("account", place, "--json").out)
            assert result["agrees_with_run"] is None
            assert result["epsilon"] == read_json(finished_run / "claim.json")["epsilon"]

    @pytest.mark.parametrize("place", [3, 150, 700, -80, -2])
    def test_a_ledger_with_one_byte_changed_is_refused(self, cli, run_copy, place):
        ledger = run_copy / "ledger.jsonl"
        data = bytearray(ledger.read_bytes())
        data[place] ^= 1
        ledger.write_bytes(bytes(data))
        line = cli("account", run_copy).error()
        assert "ledger.jsonl, line" in line

    def test_a_ledger_with_a_line_removed_is_refused(self, cli, run_copy):
        ledger = run_copy / "ledger.jsonl"
        lines = ledger.read_bytes().splitlines(keepends=True)
        ledger.write_bytes(b"".join(lines[:2] + lines[3:]))
        assert "removed" in cli("account", run_copy).error()

    @pytest.mark.parametrize("change", ["epsilon", "releases", "broken"])
    def test_a_claim_that_is_not_the_ledgers_is_told(self, cli, run_copy, change):
        """A claim made smaller by hand is noticed: exit code 1, so that a program notices too."""
        claim = read_json(run_copy / "claim.json")
        claim.pop("statement")
        if change == "epsilon":
            claim["epsilon"] = 0.5
        elif change == "releases":
            claim["num_releases"] = 4
        text = json.dumps(claim) if change != "broken" else "{"
        (run_copy / "claim.json").write_text(text)
        outcome = cli("account", run_copy)
        assert outcome.code == 1
        assert "DIFFERS" in outcome.out
        assert json.loads(cli("account", run_copy, "--json").out)["agrees_with_run"] is False


def test_samples_of_another_program_are_judged_under_the_same_protocol(cli, tmp_path):
    digits = EmbeddedDigits()
    digits.setup()
    images, labels = digits.train_images[:40].numpy(), digits.train_labels[:40].numpy()
    np.savez(tmp_path / "theirs.npz", images=images[:, 0], labels=labels)
    flags = ["--data", "EmbeddedDigits", "--evaluation.classifiers", "[logistic]", "--json"]
    outcome = cli("evaluate", tmp_path / "theirs.npz", *flags)
    assert outcome.code == 0, outcome.err
    judged = json.loads(outcome.out)
    assert judged["num_samples"] == 40  # as many as there are, unless a number is asked for
    assert judged["accuracy"]["logistic"] > 0.4
    np.savez(tmp_path / "theirs.npz", images=images[:, 0], labels=labels + 1)
    assert "labels 0..9" in cli("evaluate", tmp_path / "theirs.npz", *flags).error()
    for place in (tmp_path / "theirs.npz", tmp_path):
        assert "name the data whose test split they are held to: --data NAME" in cli("evaluate", place).error()

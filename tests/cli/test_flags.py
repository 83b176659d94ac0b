"""Flags over a configuration change what runs, as the claim, the ledger and the resolved configuration tell."""

import re
from types import SimpleNamespace

import pytest
import yaml
from pytorch_lightning.loggers import WandbLogger

from lightning_dp.accounting.events import GaussianRelease, NonPrivateRelease
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.cli import run_dirs
from lightning_dp.cli.loggers import make_loggers
from lightning_dp.errors import ConfigurationError
from lightning_dp.modules import step_memory
from tests.cli.runs import TINY, read_json, read_metrics
from tests.conftest import callbacks_for, trainer_for

QUICK = ("--evaluate", "false")


class StoppedClock:
    @staticmethod
    def now():
        return SimpleNamespace(strftime=lambda form: "now")


def config_of(run_dir):
    return yaml.safe_load((run_dir / "config.yaml").read_text())


def events_of(run_dir):
    return [entry.event for entry in PrivacyLedger.read(run_dir / "ledger.jsonl").entries]


class TestMechanism:
    def test_gaussian(self, fit, tmp_path):
        assert fit("--mechanism", "Gaussian", "--mechanism.max_grad_norm", "0.5", *QUICK).code == 0
        claim, config = read_json(tmp_path / "run" / "claim.json"), config_of(tmp_path / "run")
        assert (claim["mechanism"], claim["level"], claim["num_releases"]) == ("Gaussian", "PROVED", 5)
        assert config["mechanism"]["class_path"].endswith(".Gaussian")
        assert config["mechanism"]["init_args"]["max_grad_norm"] == 0.5
        # Replace-one: the row of one record, 2 vectors of norm 0.5, may turn round.
        (event,) = set(events_of(tmp_path / "run"))
        assert event.l2_sensitivity == pytest.approx(2 * 0.5 * 2**0.5)

    def test_one_flag_is_enough(self, fit, tmp_path):
        """Options of the mechanism in the file do not stand in the way of another one."""
        for name in ("Gaussian", "NoPrivacy"):
            assert fit("--run_dir", tmp_path / name, "--mechanism", name, *QUICK).code == 0
            assert read_json(tmp_path / name / "claim.json")["mechanism"] == name

    def test_an_option_of_the_configured_mechanism(self, fit, tmp_path):
        assert fit("--mechanism.top_k", "3", *QUICK).code == 0
        assert config_of(tmp_path / "run")["mechanism"]["init_args"]["top_k"] == 3
        (event,) = set(events_of(tmp_path / "run"))
        assert event.l2_sensitivity == pytest.approx(2 * (2 * 3) ** 0.5)  # 2 vectors with 3 votes each turn round


class TestNoPrivacy:
    @pytest.fixture
    def outcome(self, fit):
        return fit("--mechanism", "NoPrivacy")

    def test_the_claim_says_so(self, outcome, tmp_path):
        assert outcome.code == 0
        claim = read_json(tmp_path / "run" / "claim.json")
        assert (claim["level"], claim["epsilon"]) == ("NONPRIVATE", None)
        assert "No differential privacy" in claim["statement"]
        assert set(events_of(tmp_path / "run")) == {NonPrivateRelease()}
        assert len(events_of(tmp_path / "run")) == 5

    def test_no_budget_is_printed_logged_or_on_the_card(self, outcome, tmp_path):
        printed = outcome.out + outcome.err + " ".join(outcome.logged)
        assert "NONPRIVATE" in printed
        assert not re.search(r"epsilon\W*(\d|inf)", printed)
        assert not [key for row in read_metrics(tmp_path / "run") for key in row if "epsilon" in key]
        card = read_json(tmp_path / "run" / "run_card.json")
        card.pop("config")  # what was asked, whatever the mechanism made of it
        assert [place for place in places(card) if "epsilon" in place[0]] == [("/claim/epsilon", None)]
        assert not [value for _, value in places(card) if isinstance(value, float) and value == float("inf")]
        page = (tmp_path / "run" / "run_card.html").read_text()
        assert "epsilon" not in page.replace("&quot;target_epsilon&quot;", "")

    def test_max_steps_alone_is_its_length(self, fit, tmp_path):
        nothing = ("--privacy.target_epsilon", "null", "--trainer.max_steps", "3")
        assert fit("--mechanism", "NoPrivacy", *nothing, *QUICK).code == 0
        assert len(events_of(tmp_path / "run")) == 3

    def test_without_noise_it_is_reproducible(self, fit, tmp_path):
        weights = []
        for name in ("a", "b"):
            fit("--run_dir", tmp_path / name, "--mechanism", "NoPrivacy", *QUICK)
            weights.append((tmp_path / name / "release" / "generator.safetensors").read_bytes())
        assert weights[0] == weights[1]


def places(value, path=""):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, f"{path}/{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from places(inner, path)
    else:
        yield path, value


class TestPrivacy:
    @pytest.mark.parametrize("epsilon", [1.0, 8.0])
    def test_a_target_calibrates_the_noise(self, fit, tmp_path, epsilon):
        outcome = fit("--privacy.target_epsilon", epsilon, *QUICK)
        claim = read_json(tmp_path / "run" / "claim.json")
        assert claim["level"] == "PROVED"
        assert 0.99 * epsilon <= claim["epsilon"] <= epsilon
        assert config_of(tmp_path / "run")["privacy"]["target_epsilon"] == epsilon
        assert f"{epsilon:.4f}" in outcome.out

    def test_a_smaller_budget_means_more_noise(self, fit, tmp_path):
        for epsilon in ("1", "8"):
            fit("--run_dir", tmp_path / epsilon, "--privacy.target_epsilon", epsilon, *QUICK)
        small, large = (events_of(tmp_path / name)[0].noise_std for name in ("1", "8"))
        assert small > 3 * large

    def test_target_delta(self, fit, tmp_path):
        for delta in ("1e-3", "1e-6"):
            fit("--run_dir", tmp_path / delta, "--privacy.target_delta", delta, *QUICK)
            claim = read_json(tmp_path / delta / "claim.json")
            assert claim["delta"] == float(delta)
            assert 0.99 * 5 <= claim["epsilon"] <= 5
        assert events_of(tmp_path / "1e-6")[0].noise_std > events_of(tmp_path / "1e-3")[0].noise_std

    def test_noise_multiplier_without_a_target(self, fit, tmp_path):
        assert fit("--privacy.noise_multiplier", "3", "--privacy.target_epsilon", "null", *QUICK).code == 0
        (event,) = set(events_of(tmp_path / "run"))
        assert isinstance(event, GaussianRelease)
        assert event.noise_multiplier == pytest.approx(3)
        # mu = sqrt(5) / 3; the reference is dp_accounting's exact curve at that mu.
        from dp_accounting import get_epsilon_gaussian

        claim = read_json(tmp_path / "run" / "claim.json")
        assert claim["epsilon"] == pytest.approx(get_epsilon_gaussian(3 / 5**0.5, 1e-5), rel=1e-6)

    def test_noise_and_target_give_the_length(self, fit, tmp_path):
        flags = ("--privacy.noise_multiplier", "4", "--trainer.max_steps", "-1", "--data.steps_per_epoch", "3")
        assert fit(*flags, *QUICK).code == 0
        claim, events = read_json(tmp_path / "run" / "claim.json"), events_of(tmp_path / "run")
        assert claim["epsilon"] <= 5
        from lightning_dp.accounting.accountants import compute_epsilon

        ledger = PrivacyLedger.read(tmp_path / "run" / "ledger.jsonl")
        ((key, count),) = ledger.counts().items()
        assert count == len(events) > 6  # several epochs of three steps
        one_more = compute_epsilon({key: count + 1}, delta=1e-5, relation="replace_one")
        assert one_more.epsilon > 5

    def test_relation(self, fit, tmp_path):
        assert fit("--privacy.neighboring_relation", "replace_special", *QUICK).code == 0
        claim = read_json(tmp_path / "run" / "claim.json")
        assert claim["relation"] == "replace_special"
        assert "zero-out" in claim["statement"]

    def test_insecure_seed_downgrades_the_claim_and_prints_no_number(self, fit, tmp_path):
        outcome = fit("--privacy.insecure_seed", "7", *QUICK)
        claim = read_json(tmp_path / "run" / "claim.json")
        assert (claim["level"], claim["epsilon"]) == ("UNVERIFIED", None)
        assert "insecure_seed" in claim["statement"]
        assert not re.search(r"epsilon\W*\d", outcome.out + " ".join(outcome.logged))
        assert not [key for row in read_metrics(tmp_path / "run") for key in row if "epsilon" in key]

    @pytest.mark.parametrize("law", ["rounded_gaussian", "discrete_gaussian"])
    def test_noise_in_whole_numbers_closes_the_gap_of_floating_point(self, fit, tmp_path, law):
        """The float path names the gap; the exact one keeps the budget without it, and says which noise it drew."""
        for name, noise in (("float", "gaussian"), ("exact", law)):
            assert fit("--run_dir", tmp_path / name, "--mechanism.noise", noise, *QUICK).code == 0
        gap = "the gap between real-valued noise and the floating-point sampler"
        claims = {name: read_json(tmp_path / name / "claim.json") for name in ("float", "exact")}
        assert gap in claims["float"]["not_covered"]
        assert gap not in claims["exact"]["not_covered"]
        assert any("last bits of a row" in text for text in claims["exact"]["not_covered"])
        assert (claims["exact"]["level"], claims["exact"]["accountant"]) == (
            "PROVED",
            "gaussian" if law == "rounded_gaussian" else "rdp",
        )
        assert 5 * (1 - 1e-4) <= claims["exact"]["epsilon"] <= 5
        ((event, _),) = PrivacyLedger.read(tmp_path / "exact" / "ledger.jsonl").counts()
        assert event.kind == law

    def test_an_insecure_seed_downgrades_exact_noise_too(self, fit, tmp_path):
        assert fit("--privacy.insecure_seed", "7", "--mechanism.noise", "rounded_gaussian", *QUICK).code == 0
        claim = read_json(tmp_path / "run" / "claim.json")
        assert (claim["level"], claim["epsilon"]) == ("UNVERIFIED", None)
        assert "insecure_seed" in claim["statement"]


class TestRawTelemetry:
    """Numbers without noise: kept apart, never online, and no epsilon rests on them."""

    FLAGS = ("--telemetry.raw", "true", "--trainer.max_steps", "2", *QUICK)

    def test_the_claim_is_conditional_and_the_logs_are_private(self, fit, tmp_path):
        outcome = fit(*self.FLAGS)
        claim = read_json(tmp_path / "run" / "claim.json")
        assert (claim["level"], claim["epsilon"]) == ("CONDITIONAL", None)
        assert "conditional on: the logs of this run staying private" in " ".join(outcome.out.split())
        assert not (tmp_path / "run" / "metrics").exists()
        (log,) = (tmp_path / "run" / "private" / "metrics").glob("*/metrics.csv")
        assert "raw/" in log.read_text()

    def test_without_the_flag_no_log_holds_them(self, fit, tmp_path):
        """The broken twin of the first: nothing raw stands where others may read."""
        assert fit("--trainer.max_steps", "2", *QUICK).code == 0
        (log,) = (tmp_path / "run" / "metrics").glob("*/metrics.csv")
        assert "raw/" not in log.read_text()

    def test_who_is_logged_in_stays_offline(self, fit, tmp_path, monkeypatch):
        modes = []

        def spying(run_dir, config, *, mode, **options):
            modes.append(mode)
            return make_loggers(run_dir, config, mode="disabled", **options)

        monkeypatch.setattr("lightning_dp.cli.fit.make_loggers", spying)
        assert fit(*self.FLAGS, "--wandb", "auto").code == 0
        assert modes == ["offline"]

    def test_an_online_logger_of_the_caller_is_refused(self, tmp_path):
        privatizer, accountant = callbacks_for()
        trainer = trainer_for(tmp_path, [privatizer, accountant], 2, logger=WandbLogger(save_dir=str(tmp_path)))
        privatizer.check_trainer(trainer)
        privatizer.raw_telemetry = True
        with pytest.raises(ConfigurationError, match="W&B online would send them away"):
            privatizer.check_trainer(trainer)


class TestRest:
    def test_the_resolved_configuration_runs_again(self, cli, fit, tmp_path):
        assert fit("--mechanism", "NoPrivacy", *QUICK).code == 0
        again = cli("fit", "--config", tmp_path / "run" / "config.yaml", "--run_dir", tmp_path / "again")
        assert again.code == 0
        released = "release/generator.safetensors"
        assert (tmp_path / "again" / released).read_bytes() == (tmp_path / "run" / released).read_bytes()

    def test_null_for_an_option_of_an_option(self, fit, tmp_path):
        """The parser would hand it on as the text None."""
        assert fit("--trainer.max_steps", "1", "--model.generator.window", "null", *QUICK).code == 0
        options = config_of(tmp_path / "run")["model"]["init_args"]["generator"]["init_args"]
        assert options["window"] is None
        assert options["image_shape"] == [1, 28, 28]

    def test_callbacks_of_the_user(self, fit, tmp_path):
        """One alone need not stand in a list; its learning rate is public."""
        assert fit("--trainer.callbacks", "LearningRateMonitor", "--trainer.max_steps", "2", *QUICK).code == 0
        assert any("lr-Adam" in name for row in read_metrics(tmp_path / "run") for name in row)

    def test_seed_everything_is_the_public_seed(self, fit, tmp_path):
        weights = []
        for seed in ("1", "2"):
            fit("--run_dir", tmp_path / seed, "--seed_everything", seed, "--mechanism", "NoPrivacy", *QUICK)
            weights.append((tmp_path / seed / "release" / "generator.safetensors").read_bytes())
        assert weights[0] != weights[1]

    def test_default_run_folder_is_named_after_the_experiment(self, cli, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        flags = ("--config", TINY, "--trainer.max_steps", "1", *QUICK)
        assert cli("fit", *flags, "--name", "mine").code == 0
        (folder,) = (tmp_path / "runs" / "mine").iterdir()
        assert (folder / "claim.json").exists()
        # The newest run of the name is the one that 'last' means.
        assert cli("fit", *flags, "--name", "mine", "--ckpt_path", "last").code == 0
        assert [path for path in (tmp_path / "runs" / "mine").iterdir()] == [folder]

    def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(run_dirs, "datetime", SimpleNamespace(datetime=StoppedClock))
        folders = [run_dirs.resolve_run("mine", None, None)[0] for _ in range(3)]
        assert [folder.name for folder in folders] == ["now", "now-2", "now-3"]
        run_dirs.drop_if_empty(folders[0])
        assert (tmp_path / "runs" / "mine" / "now-2").is_dir()  # another's

    def test_a_run_that_is_refused_late_leaves_no_folder(self, cli, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(step_memory, "free_memory", lambda device: 1000)
        assert "memory that are free" in cli("fit", "--config", TINY, *QUICK).error()
        assert list(tmp_path.iterdir()) == []

    def test_the_help_of_fit_is_short_and_names_what_runs(self, cli, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        texts = []
        for flag in ("--help", "--help.all"):
            with pytest.raises(SystemExit):
                cli("fit", flag)
            texts.append(capsys.readouterr().out)
        short, long = (text.splitlines() for text in texts)
        assert len(short) < len(long) / 4
        assert max(map(len, short)) <= 80
        for word in ("TopAgg", "DPGAN", "semi_dual", "--privacy.target_epsilon", "--telemetry.raw", "--help.all"):
            assert word in texts[0]
        assert "--trainer.profiler" in texts[1]
        assert "SUPPRESS" not in texts[0]
        # Every flag of ours is in it, but for those that are nobody's business on an ordinary day.
        ours = set(re.findall(r"^  --((?!trainer|print|help|evaluation.training)[\w.]+)", texts[1], re.M))
        ours = {name for name in ours if not name.endswith(".help")} - {"privacy", "dataset_budget", "evaluation"}
        assert ours - set(re.findall(r"^  --([\w.]+)", texts[0], re.M)) == {
            "privacy.insecure_seed",
            "dataset_budget.reservation",
        }

    @pytest.mark.parametrize("command", ["fit", "sample", "evaluate", "account", "data"])
    def test_help(self, cli, capsys, command):
        with pytest.raises(SystemExit) as ended:
            cli(command, "--help")
        assert ended.value.code in (0, None)
        assert "usage" in capsys.readouterr().out.lower()

    def test_help_without_a_command(self, cli):
        outcome = cli("--help")
        assert (outcome.code, outcome.err) == (0, "")
        for command in ("fit", "sample", "evaluate", "account", "data fetch"):
            assert f"lightning-dp {command}" in outcome.out

    def test_version(self, cli):
        assert cli("--version").out.startswith("lightning-dp ")

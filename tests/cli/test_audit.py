"""The command `audit`: reports, exit codes, mistakes in one line."""

import json
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_dp.auditing.plots import audit_plot
from lightning_dp.auditing.result import AuditResult, Line, Plot, Verdict
from lightning_dp.cli.audit_table import END, START, _known_rows, _one_of_each, _table_text
from tests.cli.runs import TINY, read_json
from tests.policy.sources import ROOT


def test_a_mechanism(cli, tmp_path):
    outcome = cli(
        "audit", "mechanism", "Gaussian", "--mechanism.max_grad_norm", "2", "--calls", "100", "--out", tmp_path
    )
    assert outcome.code == 0, outcome.err
    report = read_json(tmp_path / "audit.json")
    assert {found["audit"] for found in report["audits"]} >= {
        "protocol",
        "sensitivity",
        "noise",
        "two worlds",
        "sampler",
    }
    assert all(found["finds"] and found["misses"] for found in report["audits"])
    assert report["verdict"] in ("consistent", "inconclusive")
    page = (tmp_path / "audit.html").read_text()
    assert page.count("data:image/png;base64,") >= 5
    assert "| two worlds |" in (tmp_path / "audit.md").read_text()


def test_a_method(cli):
    outcome = cli("audit", "method", TINY, "--steps", "2", "--model.images_per_step", "10")
    assert outcome.code == 0, outcome.err
    assert "verdict: consistent" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mechanism", "Gaussia"), "Did you mean Gaussian"),
        (("mechanism", "NoPrivacy"), "claims nothing"),
        (("mechanism", "GNMax", "--rows", "joint"), "Expected --rows to be one of teacher"),
        (("mechanism", "Gaussian", "--delta", "2"), "Expected 0 < --delta < 1"),
        (("mechanism", "Gaussian", "--calls", "2"), "Expected --calls >= 16"),
        (("mechanism", "Gaussian", "--relation", "remove_all"), "neighboring_relation"),
        (("method", "nowhere.yaml"), "Expected a configuration"),
        (("method", TINY, "--steps", "0"), "Expected --steps >= 1"),
        (("nowhere",), "Expected a run folder"),
    ],
    ids=lambda value: "-".join(map(str, value))[-30:] if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_line(cli, arguments, message):
    assert message in cli("audit", *arguments).error()


def test_help(cli):
    assert "audit mechanism NAME" in cli("audit").out


@pytest.fixture
def run_dir(fit, tmp_path):
    assert fit("--evaluate", "false").code == 0
    return tmp_path / "run"


def test_a_run(cli, run_dir):
    """Attacks read private records: the report lies beside the teachers, shut to others, and says so."""
    outcome = cli("audit", run_dir, "--num", "50")
    assert outcome.code == 0, outcome.out
    assert "private itself" in " ".join(outcome.out.split())
    report = run_dir / "private" / "audit" / "audit.json"
    assert stat.S_IMODE(report.stat().st_mode) == 0o600
    found = {one["audit"]: one for one in json.loads(report.read_text())["audits"]}
    assert found["ledger"]["claimed_epsilon"] == pytest.approx(5.0, abs=1e-3)
    nearest = found["membership by the nearest sample"]["measured"]
    assert nearest["auc_low"] <= nearest["auc"] <= nearest["auc_high"]
    assert {"tpr_at_0.01", "tpr_at_0.001_high"} <= nearest.keys()
    assert "membership by generator loss" in found


def test_a_claim_that_the_ledger_does_not_prove_is_a_violation(cli, run_dir):
    path = run_dir / "claim.json"
    claim = read_json(path)
    path.write_text(json.dumps({**claim, "epsilon": claim["epsilon"] / 2}))
    outcome = cli("audit", run_dir, "--attacks", "false")
    assert outcome.code == 1
    assert "claim.json states another claim" in " ".join(outcome.out.replace("│", " ").split())


def test_a_teacher_among_the_published_is_a_violation(cli, run_dir):
    path = run_dir / "release" / "generator.safetensors"
    assert cli("audit", run_dir, "--attacks", "false").code == 0
    (run_dir / "release" / "teachers.pt").write_bytes(b"0")
    assert cli("audit", run_dir, "--attacks", "false").code == 1
    (run_dir / "release" / "teachers.pt").unlink()
    save_file(load_file(path), path, metadata={"votes": "1"})
    outcome = cli("audit", run_dir, "--attacks", "false", "--out", run_dir / "audit")
    assert outcome.code == 1
    assert "metadata" in (run_dir / "audit" / "audit.md").read_text()


def test_samples_that_are_records_are_found(tmp_path):
    """A generator that remembers has a true positive rate that no finite epsilon near the claim allows."""
    from lightning_dp.auditing.membership import audit_membership, nearest_sample_scores

    stream = torch.Generator().manual_seed(0)
    members, others = (torch.rand(400, 1, 6, 6, generator=stream) for _ in range(2))
    copied = nearest_sample_scores(members, members, others, name="the nearest sample")
    fresh = nearest_sample_scores(
        torch.rand(400, 1, 6, 6, generator=stream), members, others, name="the nearest sample"
    )
    found = audit_membership(copied, subject="a copier", claimed_epsilon=1.0, delta=1e-5)
    assert found.verdict is Verdict.VIOLATED
    assert found.measured["auc"] == 1.0
    assert found.measured["tpr_at_0.001"] == 1.0
    right = audit_membership(fresh, subject="a stranger", claimed_epsilon=1.0, delta=1e-5)
    assert right.verdict is not Verdict.VIOLATED
    assert 0.4 < right.measured["auc"] < 0.6
    assert audit_membership(copied, subject="no claim", claimed_epsilon=None, delta=1e-5).verdict is Verdict.CONSISTENT


def test_plots_of_single_and_constant_values():
    plot = Plot(
        x_label="x", y_label="y", lines=(Line(label="one", x=(0.0,), y=(0.0,)),), histograms={"same": (1.0, 1.0)}
    )
    facts = {"lower_bound": None, "confidence": 1.0, "claimed_epsilon": None, "delta": 0.1}
    words = {"audit": "a", "subject": "s", "summary": "m", "finds": "f", "misses": "m"}
    result = AuditResult(**facts, **words, verdict=Verdict.CONSISTENT, plot=plot)
    assert audit_plot(result).startswith(b"\x89PNG")


class TestTable:
    """`audit --table` rewrites what stands between the markers, and keeps what it did not measure again."""

    def test_rows_are_read_back(self):
        rows = {(f"method {n}", "Gaussian", "replace_one", *"abcdefg", "2026-01-01") for n in range(3)}
        text = _table_text(rows, delta=1e-5, calls=16)
        assert set(_known_rows(text).values()) == rows

    def test_a_file_without_markers_is_refused(self, cli, tmp_path):
        (tmp_path / "page.md").write_text("words\n")
        error = cli("audit", "--table", "--configs", tmp_path, "--out", tmp_path / "page.md").error()
        assert "Expected the markers" in error

    def test_one_configuration_of_each_method(self):
        paths = sorted((ROOT / "configs" / "experiment").glob("*.yaml"))
        chosen = {path.stem for path in _one_of_each(paths, None)}
        assert {"datalens_fashion_mnist", "datalens_mnist_cpu", "dpsgd_mnist", "gswgan_mnist"} <= chosen
        assert "datalens_mnist" not in chosen  # the same method with the same kind of teachers
        assert [path.stem for path in _one_of_each(paths, "dpsgd")] == ["dpsgd_mnist"]

    @pytest.mark.slow
    def test_a_pair_is_measured_and_others_are_kept(self, cli, tmp_path, monkeypatch):
        # Mechanisms that other tests have broken are known in this process too.
        monkeypatch.setattr("lightning_dp.cli.messages.subclass_names", lambda _: ["Gaussian", "NoPrivacy", "TopAgg"])
        out = tmp_path / "page.md"
        old = "| old | Gaussian | replace_one | a | b | c | d | e | f | g | 2026-01-01 |"
        out.write_text(f"before\n{START}\n{old}\n{END}\nafter\n")
        done = cli("audit", "--table", "--only", "moments_mnist", "--calls", "50", "--out", out)
        assert done.code == 0, done.out
        text = out.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert old in text
        assert "| MomentsModule (`moments_mnist`) | Gaussian | add_or_remove_one | PROVED | 4.377 |" in text

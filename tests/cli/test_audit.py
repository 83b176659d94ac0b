"""The command `audit`: reports, exit codes, mistakes in one line."""

import contextlib
import json
import stat
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_dp.auditing.membership import audit_membership, generator_loss_scores, nearest_sample_scores
from lightning_dp.auditing.plots import audit_plot
from lightning_dp.auditing.result import AuditResult, Line, Plot, Verdict
from lightning_dp.cli import (
    audit_table,
    plugins,  # noqa: F401  (names of mechanisms)
)
from lightning_dp.cli.audit import small_run
from lightning_dp.cli.audit_pairs import TableOptions, TableRow
from lightning_dp.cli.audit_table import (
    END,
    START,
    _known_rows,
    _one_of_each,
    _parts,
    _Progress,
    _table_text,
)
from lightning_dp.cli.matrix import _mechanism_class, _own_mechanism, _variants
from lightning_dp.cli.messages import subclass_names
from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.base import ContributionSpec, Mechanism, ReleasePlan
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


@pytest.mark.filterwarnings("ignore")  # of libraries, which the command line keeps quiet
@pytest.mark.parametrize(("whole", "coefficients"), [(False, 10), (True, 144)])
def test_a_generator_and_the_warm_start_that_fits_it_shrink_together(whole, coefficients, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-dp"])  # Lightning warns of a second command line
    config = ROOT / "configs" / "experiment" / "datalens_mnist_warm_moments.yaml"
    run = small_run(config, steps=2, whole=whole)()
    assert run.module.generator.num_coefficients == coefficients


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


class Remembers(torch.nn.Module):
    """A generator whose latents choose among the records that it was trained on."""

    def __init__(self, records):
        super().__init__()
        self.records = torch.nn.Parameter(records)

    def sample_latent(self, num, stream):
        return torch.randn(num, len(self.records), generator=stream)

    def forward(self, latent, labels):
        return ((4 * latent).softmax(1) @ self.records.flatten(1)).unflatten(1, self.records.shape[1:])


def test_a_generator_that_remembers_is_found_by_its_latents():
    stream = torch.Generator().manual_seed(0)
    members, others = (torch.rand(60, 1, 6, 6, generator=stream) for _ in range(2))
    labels = torch.zeros(60, dtype=torch.int64)

    def attacked(generator):
        scores = generator_loss_scores(generator, (members, labels), (others, labels))
        return audit_membership(scores, subject="a generator", claimed_epsilon=1.0, delta=1e-5)

    found = attacked(Remembers(members))
    assert found.measured["auc"] > 0.95
    assert found.measured["tpr_at_0.01"] > 0.5
    assert found.lower_bound > 1
    fresh = attacked(Remembers(torch.rand(60, 1, 6, 6, generator=stream)))
    assert 0.3 < fresh.measured["auc"] < 0.7
    assert fresh.verdict is not Verdict.VIOLATED


def test_a_run_without_privacy_claims_nothing_that_could_be_refuted(cli, fit, tmp_path):
    assert fit("--mechanism", "NoPrivacy", "--evaluate", "false").code == 0
    outcome = cli("audit", tmp_path / "run", "--attacks", "false")
    assert outcome.code == 0
    assert "no epsilon is claimed" in outcome.out


def test_plots_of_single_and_constant_values():
    plot = Plot(
        x_label="x", y_label="y", lines=(Line(label="one", x=(0.0,), y=(0.0,)),), histograms={"same": (1.0, 1.0)}
    )
    facts = {"lower_bound": None, "confidence": 1.0, "claimed_epsilon": None, "delta": 0.1}
    words = {"audit": "a", "subject": "s", "summary": "m", "finds": "f", "misses": "m"}
    result = AuditResult(**facts, **words, verdict=Verdict.CONSISTENT, plot=plot)
    assert audit_plot(result).startswith(b"\x89PNG")


OPTIONS = TableOptions(calls=16, draws=1000, confidence=0.95, delta=1e-5)


def row(name: str) -> TableRow:
    return TableRow((name, "Gaussian", "replace_one", *"abcdefgh", "2026-01-01"), "consistent")


def has_proof(mechanism: Mechanism, spec: ContributionSpec) -> bool:
    """Whether one release of such rows has a price under any relation."""
    for relation in spec.changes:
        with contextlib.suppress(ConfigurationError):
            mechanism.check(spec)
            mechanism.step_event(ReleasePlan(spec=spec, relation=relation, noise_multiplier=1.0))
            return True
    return False


class TestTable:
    """`audit --table` rewrites what stands between the markers, and keeps what it did not measure again."""

    def test_rows_are_read_back(self):
        rows = {row(f"method {number}").cells for number in range(3)}
        assert set(_known_rows(_table_text(rows, OPTIONS)).values()) == rows

    def test_an_interrupted_table_goes_on(self, tmp_path):
        out = tmp_path / "page.md"
        _Progress(out, OPTIONS).add(row("one"))
        assert _Progress(out, OPTIONS).keys == {("one", "Gaussian")}
        with (tmp_path / "page.partial.jsonl").open("a") as file:
            file.write('{"cells": ["two", "Gauss')  # killed while it wrote
        again = _Progress(out, OPTIONS)
        again.add(row("three"))
        assert _Progress(out, OPTIONS).rows == [row("one"), row("three")]
        assert _Progress(out, TableOptions(calls=17, draws=1000, confidence=0.95, delta=1e-5)).rows == []

    @pytest.mark.filterwarnings("ignore")  # of libraries, which the command line keeps quiet
    def test_who_interrupts_it_is_told_what_is_kept(self, cli, tmp_path, monkeypatch):
        def rows(*_, **__):
            yield row("one")
            raise KeyboardInterrupt

        monkeypatch.setattr(audit_table, "_rows", rows)
        outcome = cli("audit", "--table", "--configs", tmp_path, "--out", tmp_path / "page.md")
        assert outcome.code == 130
        assert "1 row kept in" in outcome.err
        assert "page.partial.jsonl; the same command goes on from there" in outcome.err

    def test_every_pair_that_runs_has_a_row(self, monkeypatch):
        """A new method or mechanism has to be audited; the table has no row of a pair that is gone."""
        monkeypatch.setattr("sys.argv", ["lightning-dp"])
        configs = sorted((ROOT / "configs" / "experiment").glob("*.yaml"))
        known = {path: _own_mechanism(path) for path in configs}
        names = subclass_names(Mechanism)  # other tests make broken ones
        ours = [name for name in names if _mechanism_class(name).__module__.startswith("lightning_dp.")]
        allowed = set()  # one configuration stands for all of a class
        for path in _one_of_each(configs, None):
            run = small_run(path, steps=3)()
            run.module.describe_data(run.data)
            spec = run.module.contribution_spec()
            for name in ours:
                variants = list(_variants(name, known[path], iter(known.values())))
                if variants[0].is_private and any(has_proof(mechanism, spec) for mechanism in variants):
                    allowed.add((type(run.module).__name__, name))
        assert len(allowed) >= 25
        lines = _parts(ROOT / "docs" / "guarantees.md")[1].splitlines()
        cells = [line.split("|") for line in lines if line.startswith("| ")]
        rows = {(method.split()[0], mechanism.strip()) for _, method, mechanism, *_ in cells}
        assert rows - {("method", "mechanism")} == allowed

    @pytest.mark.parametrize(
        ("verdicts", "last"),
        [
            (["inconclusive", "consistent"], "consistent"),
            (["inconclusive"] * 2, "inconclusive"),
            (["violated"], "violated"),
        ],
    )
    def test_doubt_is_repeated_once_and_an_alarm_never(self, monkeypatch, verdicts, last):
        monkeypatch.setattr("sys.argv", ["lightning-dp"])
        left = list(verdicts)
        monkeypatch.setattr(audit_table, "audit_pair", lambda *_, **__: replace(row("one"), verdict=left.pop(0)))
        found = next(
            audit_table._rows(ROOT / "configs" / "experiment", options=OPTIONS, only="dpmerf", done=set())
        )  # other tests make mechanisms as well
        assert (found.verdict, left) == (last, [])

    def test_a_violated_row_shows_in_the_exit_code(self, tmp_path, monkeypatch):
        bad = TableRow((*row("one").cells[:-2], "violated (draws)", "2026-01-01"), "violated")
        for found, code in (([row("one")], 0), ([row("one"), bad], 1)):
            monkeypatch.setattr(audit_table, "_rows", lambda *_, found=found, **__: iter(found))
            assert audit_table.write_table(tmp_path, tmp_path / "page.md", options=OPTIONS, only=None) == code
            assert not (tmp_path / "page.partial.jsonl").exists()

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
        old = f"| {' | '.join(row('old').cells)} |"
        out.write_text(f"before\n{START}\n{old}\n{END}\nafter\n")
        done = cli("audit", "--table", "--only", "moments_mnist", "--calls", "50", "--draws", "20000", "--out", out)
        assert done.code == 0, done.out
        text = out.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert old in text
        assert "| MomentsModule (`moments_mnist`) | Gaussian | add_or_remove_one | PROVED | 4.377 |" in text

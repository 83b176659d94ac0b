"""The report: numbers from cards alone, statements where there is no epsilon, refusals in full, two formats."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_dp.accounting.events import NonPrivateRelease
from lightning_dp.benchmark.document import (
    Bullets,
    Figure,
    Heading,
    Paragraph,
    Strong,
    Table,
    write_markdown,
    write_page,
)
from lightning_dp.benchmark.figures import sample_sheet, utility_plot
from lightning_dp.benchmark.grid_file import load_grid
from lightning_dp.benchmark.records import read_records
from lightning_dp.benchmark.report import report_parts, result_tables, write_report
from lightning_dp.benchmark.rows import RULE, Result, rows_of
from lightning_dp.benchmark.runner import Comparison
from lightning_dp.evaluation.report import RunCard, write_run_card
from tests.benchmark.made_up import DELTA, evaluation, plan_made_up, result, write_grid
from tests.benchmark.test_runner import FakeBackend, Spy, fail

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A comparison of three seeds with a refused and a failed cell, and its report."""
    folder = tmp_path_factory.mktemp("comparison")
    methods = {
        "first": {"config": "base.yaml", "mechanisms": ["Gaussian", "NoPrivacy", "Impossible"]},
        "second": {
            "config": "base.yaml",
            "mechanisms": ["Gaussian"],
            "settings": {"model": {"init_args": {"width": 9}}},
        },
    }
    grid = load_grid(write_grid(folder / "grid", seeds=[1, 2, 3], epsilons=[1, 10], methods=methods))
    found = Comparison(grid, folder / "out", planner=plan_made_up)
    found.plan(Spy())
    found.run(FakeBackend({"second-Gaussian-Digits-eps10-seed3": fail}), Spy())
    spent = write_report(found.folder, list(found.records.values()), name="made_up", delta=DELTA)
    return found.folder, spent


def section(text, title):
    return re.split(r"^## ", text.partition(f"## {title}\n")[2], flags=re.MULTILINE)[0]


def test_one_table_for_each_epsilon(reported):
    text = section((reported[0] / "report.md").read_text(), "Results")
    assert RULE in text
    assert re.findall(r"^### (.*)", text, flags=re.MULTILINE) == [
        "digits, epsilon 1, metric protocol aaaabbbbcccc",
        "digits, epsilon 10, metric protocol aaaabbbbcccc",
    ]
    assert "| first | Gaussian | 0.821 ± 0.010 | 12.0 ± 0.0 | 0.500 ± 0.000 | 0.250 ± 0.000 | 1.0000 | 3 |" in text
    assert "| second | Gaussian | 0.825 ± 0.007 |" in text
    assert "NoPrivacy" not in text
    assert "**" not in text  # nobody leads beyond the spread


def test_runs_without_a_proof_show_their_statement_and_no_epsilon(reported):
    text = section((reported[0] / "report.md").read_text(), "Not ranked")
    assert "hold no bound on any record: NONPRIVATE" in text
    assert not re.search(r"epsilon[ =]\d", text)


def test_numbers_come_from_the_cards_alone(reported, tmp_path):
    """Whatever the records say besides where the cards are: the report is the same."""
    folder, spent = reported
    records = read_records(folder)
    forged = [replace(r, epsilon=0.1, metrics={"accuracy/cnn": 1.0}) if r.level == "PROVED" else r for r in records]
    results = [Result(RunCard.from_dict(_card(folder, r)), (folder / r.card).parent) for r in records if r.card]
    assert report_parts("x", forged, results, spent)[3:] == report_parts("x", records, results, spent)[3:]
    title, table = result_tables(folder, forged)[0]
    assert title == "digits, epsilon 1, metric protocol aaaabbbbcccc"
    assert table.rows[0][2] == "0.821 ± 0.010"


def _card(folder: Path, record):
    import json

    return json.loads((folder / record.card).read_text())


def test_every_claim_in_full(reported):
    text = section((reported[0] / "report.md").read_text(), "Every claim in full")
    for record in read_records(reported[0]):
        if record.statement is not None:
            assert record.statement in text
    assert "not covered: the choice of hyper-parameters" in text
    assert "seed policy" in text
    assert "### first, Gaussian, digits, seeds 1, 2, 3" in text


def test_what_everything_spent(reported):
    text = section((reported[0] / "report.md").read_text(), "What the whole comparison spent")
    (spent,) = reported[1]
    assert spent.whole.statement() in text
    assert spent.proved.statement() in text
    assert spent.num_runs == 14
    assert "runs outside this comparison's folder" in text
    assert (reported[0] / "spending.json").exists()


def test_cells_without_a_result(reported):
    text = section((reported[0] / "report.md").read_text(), "Cells without a result")
    assert "refused | --mechanism Impossible has no proof for these rows." in text
    assert "failed | RuntimeError: not enough memory: 8 GB" in text


def test_cost_and_protocols(reported):
    text = (reported[0] / "report.md").read_text()
    assert "| first | Gaussian | 1 | 1.0 s | 2.0 s | 4.0 s | 3.0 s | 512 | 3 |" in section(text, "Cost")
    assert "aaaabbbbcccc: {" in section(text, "Metric protocols")


def test_pictures_are_there(reported):
    folder = reported[0]
    named = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (folder / "report.md").read_text())
    assert len(named) == 3  # accuracy, FID, samples
    for name in named:
        assert (folder / name).read_bytes().startswith(PNG)


def test_the_page_needs_nothing_else(reported):
    page = (reported[0] / "report.html").read_text()
    assert "default-src 'none'" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/png") == 3
    assert "What the whole comparison spent" in page


def test_a_winner_is_bold_in_both(tmp_path):
    runs = [result(tmp_path, method="a", seed=s, judged=evaluation(0.9 + s / 1000)) for s in (1, 2, 3)]
    runs += [result(tmp_path, method="b", seed=s, judged=evaluation(0.5 + s / 1000)) for s in (1, 2, 3)]
    parts = report_parts("x", [], runs, [])
    assert "**0.902 ± 0.001**" in write_markdown(parts, tmp_path / "r.md").read_text()
    assert "<strong>0.902 ± 0.001</strong>" in write_page(parts, tmp_path / "r.html").read_text()


def test_two_protocols_are_two_tables_and_two_plots(tmp_path):
    runs = [result(tmp_path, method="a"), result(tmp_path, method="b", judged=evaluation(protocol="ddddeeeeffff"))]
    parts = report_parts("x", [], runs, [])
    titles = [part.text for part in parts if isinstance(part, Heading) and "metric protocol" in part.text]
    assert len(titles) == 2
    fid = [part.caption for part in parts if isinstance(part, Figure) and "fid" in part.caption]
    assert len(fid) == 2


def test_classifiers_stand_apart(tmp_path):
    judged = {"accuracy": {"test": 0.97}, "num_test": 10, "wall_time_s": 1.0}
    runs = [result(tmp_path), result(tmp_path, method="classifier", judged=judged)]
    text = write_markdown(report_parts("x", [], runs, []), tmp_path / "r.md").read_text()
    assert "### digits, epsilon 1, released classifiers on the test split" in text
    assert "| classifier | Gaussian | 0.970 |" in text


def test_nothing_finished(tmp_path):
    text = write_markdown(report_parts("x", [], [], []), tmp_path / "r.md").read_text()
    assert "No run with a PROVED claim has finished." in text
    assert "Nothing was released." in text


def test_plots_leave_out_what_has_no_epsilon(tmp_path):
    private = result(tmp_path)
    other = [result(tmp_path, unverified=["x"]), result(tmp_path, event=NonPrivateRelease(), mechanism="NoPrivacy")]
    assert utility_plot(rows_of(other), "fid") is None
    assert utility_plot(rows_of([private, *other]), "fid").startswith(PNG)
    assert utility_plot(rows_of([private]), "accuracy/svm") is None


def test_samples_of_runs_that_have_none(tmp_path):
    assert sample_sheet([result(tmp_path)]) is None


def test_text_of_users_is_escaped(tmp_path):
    parts = [Heading("<b>", 1), Paragraph("a & b"), Bullets(["<i>"]), Table(["<x>"], [["a|b"], [Strong("<y>")]])]
    page = write_page(parts, tmp_path / "r.html").read_text()
    for raw in ("<b>", "<i>", "<x>", "<y>", "a & b"):
        assert raw not in page
    assert "| a\\|b |" in write_markdown(parts, tmp_path / "r.md").read_text()


def test_a_title_like_a_formula_is_drawn_as_text(tmp_path):
    assert utility_plot(rows_of([result(tmp_path, method="a$_x$b$")]), "fid").startswith(PNG)


def test_a_run_folder_is_found_beside_its_card(tmp_path):
    found = result(tmp_path)
    card, _ = write_run_card(tmp_path / "runs" / "x", found.card)
    assert card.exists()

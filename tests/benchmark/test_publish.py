"""What may be shown of a comparison, and nothing else."""

import json
import re
from pathlib import Path

import pytest

from lightning_dp.benchmark.publish import publish
from lightning_dp.benchmark.records import read_records
from lightning_dp.benchmark.report import write_report
from lightning_dp.errors import ConfigurationError
from lightning_dp.evaluation.report import read_run_card
from tests.benchmark.made_up import DELTA
from tests.benchmark.test_runner import comparison, run


@pytest.fixture
def published(tmp_path):
    settings = {"model": {"init_args": {"state_dir": str(tmp_path / "states")}}}
    found, *_ = run(tmp_path, settings=settings)
    write_report(found.folder, list(found.records.values()), name="x", delta=DELTA)
    (found.folder / "figures" / "of-an-earlier-report.png").write_bytes(b"")
    publish(found.folder, tmp_path / "shown")
    return found.folder, tmp_path / "shown"


def test_report_records_and_cards_belong_together(published):
    folder, shown = published
    for name in ("report.md", "report.html", "spending.json"):
        assert (shown / name).read_bytes() == (folder / name).read_bytes()
    named = re.findall(r"\]\((figures/[^)]+)\)", (shown / "report.md").read_text())
    assert named
    assert {path.name for path in (shown / "figures").iterdir()} == {Path(name).name for name in named}
    for record, original in zip(read_records(shown), read_records(folder), strict=True):
        card = read_run_card(shown / record.card)
        assert card.claim == read_run_card(folder / original.card).claim
        assert record.epsilon == original.epsilon


def test_nothing_private_and_no_path_of_the_machine_is_shown(published):
    folder, shown = published
    assert {path.suffix for path in shown.rglob("*") if path.is_file()} <= {".md", ".html", ".json", ".jsonl", ".png"}
    assert not list(shown.rglob("*ledger*"))
    texts = [path.read_text() for path in shown.rglob("*.json*")]
    assert not any(str(folder.parent) in text for text in texts)
    config = json.loads((shown / read_records(shown)[0].card).read_text())["config"]
    assert config["model"]["init_args"] == {"width": 3, "state_dir": None}


def test_published_again_it_is_replaced(published):
    folder, shown = published
    (shown / "cards" / "old.json").write_text("{}")
    publish(folder, shown)
    assert not (shown / "cards" / "old.json").exists()


def test_it_needs_a_report_and_a_place_of_its_own(tmp_path):
    with pytest.raises(ConfigurationError, match="Expected --publish outside of"):
        publish(tmp_path, tmp_path / "inside")
    found = comparison(tmp_path)
    found.folder.mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="Expected the report of a comparison in"):
        publish(found.folder, tmp_path / "shown")

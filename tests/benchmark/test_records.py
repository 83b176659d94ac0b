"""A record says what became of a cell, and holds no epsilon that is not proved."""

import pytest

from lightning_dp.accounting.events import NonPrivateRelease
from lightning_dp.benchmark.grid_file import load_grid
from lightning_dp.benchmark.records import (
    CellRecord,
    card_metrics,
    finished_record,
    open_record,
    protocol_of,
    read_records,
    write_records,
)
from lightning_dp.errors import ConfigurationError
from tests.benchmark.made_up import card_of, gaussian, ledger_at, result, write_grid


@pytest.fixture
def cell(tmp_path):
    return load_grid(write_grid(tmp_path / "grid")).cells()[0]


def test_they_are_read_back(cell, tmp_path):
    done = finished_record(cell, result(tmp_path).card, tmp_path / "runs" / "x", tmp_path)
    records = [open_record(cell, "failed", reason="out of memory\nat once"), done]
    write_records(tmp_path, records)
    assert read_records(tmp_path) == records
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 2
    assert done.card == "runs/x/run_card.json"
    assert done.metrics["accuracy/cnn"] == 0.9


@pytest.mark.parametrize(
    "changes",
    [{"event": NonPrivateRelease()}, {"unverified": ["x"]}, {"conditional_on": ["x"]}],
    ids=["nonprivate", "unverified", "conditional"],
)
def test_no_epsilon_without_a_proof(cell, tmp_path, changes):
    record = finished_record(cell, result(tmp_path, **changes).card, tmp_path / "runs" / "x", tmp_path)
    assert (record.epsilon, record.target_epsilon) == (None, None)
    assert record.level in record.statement


def test_a_record_refuses_one(cell, tmp_path):
    record = finished_record(cell, result(tmp_path).card, tmp_path / "runs" / "x", tmp_path)
    values = {name: getattr(record, name) for name in record.__dataclass_fields__}
    with pytest.raises(ConfigurationError, match="Expected no epsilon in a record of level UNVERIFIED"):
        CellRecord(**{**values, "level": "UNVERIFIED"})
    with pytest.raises(ConfigurationError, match="Expected status out of waiting"):
        CellRecord(**{**values, "status": "done"})


def test_metrics_of_a_classifier():
    judged = {"accuracy": {"test": 0.97}, "num_test": 10, "wall_time_s": 1.0}
    card = card_of(ledger_at(None, gaussian(5.0)), {}, evaluation=judged)
    assert card_metrics(card) == {"accuracy/test": 0.97}
    assert protocol_of(card) is None


def test_metrics_of_a_run_that_was_not_judged():
    card = card_of(ledger_at(None, gaussian(5.0)), {}, evaluation=None)
    assert card_metrics(card) == {}
    assert protocol_of(card) is None


@pytest.mark.parametrize("text", ["{", '{"cell": "x"}\n', "[1]\n"])
def test_a_file_that_holds_no_records(tmp_path, text):
    (tmp_path / "records.jsonl").write_text(text)
    with pytest.raises(ConfigurationError, match="Expected the records of a comparison"):
        read_records(tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(ConfigurationError, match="Expected the records"):
        read_records(tmp_path)

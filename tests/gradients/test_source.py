import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients import source as module
from lightning_dp.gradients.per_record import per_record_rows
from lightning_dp.gradients.record_gradients import RecordGradients, rows_of
from lightning_dp.gradients.source import GradientSource
from lightning_dp.gradients.teachers import RowChunk


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))


def coupling_free(net, image, label):
    return F.cross_entropy(net(image), label)


def with_decay(net, image, label):
    return coupling_free(net, image, label) + net[3].weight.square().sum()


RECORDS = (torch.rand(5, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 3)
IDS = torch.tensor([4, 7, 8, 20, 21])


def gradients(source, loss=coupling_free):
    return list(source.gradients(network(), loss, RECORDS, ids=IDS))


@pytest.mark.parametrize("mode", ["auto", "ghost", "materialize", "functorch"])
def test_all_modes_make_the_same_rows(mode):
    wanted = torch.cat([c.values for c in per_record_rows(network(), coupling_free, RECORDS, chunk_size=5)])
    chunks = [rows for chunk in gradients(GradientSource(mode, None)) for rows in rows_of(chunk)]
    torch.testing.assert_close(torch.cat([c.values for c in chunks]), wanted, check_dtype=False)
    assert torch.equal(torch.cat([c.teacher_ids for c in chunks]), IDS)


@pytest.mark.parametrize(("mode", "kind"), [("auto", RecordGradients), ("functorch", RowChunk)])
def test_a_mode_is_what_it_says(mode, kind):
    assert all(isinstance(chunk, kind) for chunk in gradients(GradientSource(mode, None)))


def test_auto_falls_back_with_one_line(caplog):
    source = GradientSource("auto", None)
    with caplog.at_level(logging.INFO, logger=module.__name__):
        first, second = gradients(source, with_decay), gradients(source, with_decay)
    assert [record.getMessage() for record in caplog.records] == [
        "Per-record gradients are taken by functorch: 3.weight is used by another operation than a supported layer."
    ]
    wanted = torch.cat([c.values for c in per_record_rows(network(), with_decay, RECORDS, chunk_size=5)])
    for found in (first, second):
        torch.testing.assert_close(torch.cat([chunk.values for chunk in found]), wanted)


@pytest.mark.parametrize("mode", ["ghost", "materialize"])
def test_a_mode_that_cannot_be_had_is_refused(mode):
    with pytest.raises(ConfigurationError, match=rf"model\.gradients={mode} cannot be had: 3\.weight is used by"):
        gradients(GradientSource(mode, None), with_decay)


def test_unknown_modes_are_refused():
    with pytest.raises(ConfigurationError, match=r"Expected model\.gradients in auto, ghost, materialize, functorch"):
        GradientSource("hooks", None)  # type: ignore[arg-type]


def test_no_records_have_no_gradients():
    empty = tuple(tensor[:0] for tensor in RECORDS)
    assert list(GradientSource("auto", None).gradients(network(), coupling_free, empty, ids=IDS[:0])) == []


def test_records_at_once_follow_memory_and_no_value(monkeypatch):
    found = []
    for records in (RECORDS, (RECORDS[0] * 1e9, RECORDS[1] * 0)):
        monkeypatch.setattr(module, "_CPU_BUDGET", 100_000)
        found.append(GradientSource("auto", None).records_at_once(network(), coupling_free, records))
    assert found[0] == found[1]
    assert 10 < found[0] < 500  # a record takes under a kilobyte of activations, and its few rows
    monkeypatch.setattr(module, "_CPU_BUDGET", 1)
    monkeypatch.setattr(module, "_BUDGET_PER_PARAMETER", 0)
    assert GradientSource("auto", None).records_at_once(network(), coupling_free, RECORDS) == 32
    monkeypatch.setattr(module, "_FEW_BUDGET", 1)
    assert GradientSource("auto", None).records_at_once(network(), coupling_free, RECORDS) == 1
    assert GradientSource("auto", 7).records_at_once(network(), coupling_free, RECORDS) == 7


def test_functorch_holds_few_records_at_once():
    for source in (GradientSource("functorch", None), GradientSource("auto", None)):
        assert source.records_at_once(network(), with_decay, RECORDS) <= 64

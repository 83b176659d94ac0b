"""The ledger survives crashes without losing a release, and refuses a file on which one bit was changed."""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_dp
from lightning_dp.accounting import ledger_file
from lightning_dp.accounting.events import (
    GaussianRelease,
    NonPrivateRelease,
    Sampling,
    TernaryRelease,
    ZCDPRelease,
    parse_relation,
)
from lightning_dp.accounting.ledger import LedgerEntry, PrivacyLedger
from lightning_dp.errors import ConfigurationError, LedgerError

ROOT = Path(lightning_dp.__file__).parents[1]
HEADER = {"relation": "replace_one", "unit": "record", "num_records": 4000, "dataset": "digits", "run_id": "a"}
FULL = Sampling(scheme="full")
EVENTS = (
    GaussianRelease(noise_std=5000.0, l2_sensitivity=2 * math.sqrt(200)),
    GaussianRelease(noise_std=0.1 + 0.2, l2_sensitivity=1 / 3),
    ZCDPRelease(rho=1e-3),
    NonPrivateRelease(),
    TernaryRelease(
        noise_std=50.0, l2_sensitivity=2 * math.sqrt(3), threshold=7.0, max_abs_vote=10, changes=((3, 0), (0, 6))
    ),
)
SAMPLINGS = (FULL, Sampling(scheme="poisson", rate=0.01), Sampling(scheme="poisson", rate=0.01, executed=False))
KIND = st.tuples(st.sampled_from(EVENTS), st.sampled_from(SAMPLINGS))


def fill(path, kinds, header=HEADER):
    with PrivacyLedger(header, path, durable=False) as ledger:
        for number, kind in enumerate(kinds, start=1):
            assert ledger.append(*kind) == number
    return path.read_bytes()


def kinds_of(ledger):
    return [(entry.event, entry.sampling) for entry in ledger.entries]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "ledger.jsonl"


@settings(max_examples=30, deadline=None)
@given(kinds=st.lists(KIND, max_size=12))
def test_what_was_appended_is_read_back(tmp_path_factory, kinds):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    fill(path, kinds)
    for ledger in (PrivacyLedger.read(path), PrivacyLedger.reopen(path, durable=False)):
        assert kinds_of(ledger) == kinds
        assert len(ledger) == len(kinds)
        assert ledger.counts() == {kind: kinds.count(kind) for kind in kinds}
        assert ledger.header == HEADER | {"format": 1}
        ledger.close()


def test_entries_know_relation_and_unit(path):
    fill(path, [(EVENTS[0], FULL)])
    (entry,) = PrivacyLedger.read(path).entries
    assert entry == LedgerEntry(1, EVENTS[0], FULL, parse_relation("replace_one"), "record")


def test_lines_are_json(path):
    lines = fill(path, [(EVENTS[4], SAMPLINGS[1])]).decode().splitlines()
    header, entry = map(json.loads, lines)
    assert header["format"] == 1
    assert (entry["number"], entry["event"]["kind"], entry["sampling"]["rate"]) == (1, "ternary", 0.01)


def test_ledger_in_memory():
    ledger = PrivacyLedger(HEADER, None)
    assert ledger.append(EVENTS[0], FULL) == 1
    assert (len(ledger), ledger.path) == (1, None)


def test_counts_are_a_copy():
    ledger = PrivacyLedger(HEADER, None)
    ledger.counts()[EVENTS[0], FULL] = 5
    ledger.header["unit"] = "nobody"
    assert (ledger.counts(), ledger.unit) == ({}, "record")


# --- crashes ----------------------------------------------------------------------------------------------------------


def test_truncation_at_any_byte_loses_no_complete_entry(path):
    kinds = [(EVENTS[0], FULL), (EVENTS[4], SAMPLINGS[1])]
    data = fill(path, kinds)
    header_end = data.index(b"\n")
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        complete = max(data[:cut].count(b"\n") - 1, 0)
        if cut < header_end:
            for open_ledger in (PrivacyLedger.read, PrivacyLedger.reopen):
                with pytest.raises(LedgerError, match=r"ledger\.jsonl, line 1: .*header"):
                    open_ledger(path)
            continue
        read = PrivacyLedger.read(path)
        assert complete <= len(read) <= complete + 1
        assert kinds_of(read)[:complete] == kinds[:complete]
        with PrivacyLedger.reopen(path, durable=False) as ledger:
            assert kinds_of(ledger) == kinds_of(read)
        # mended: what follows is an ordinary file
        assert path.read_bytes().endswith(b"\n")
        assert kinds_of(PrivacyLedger.read(path)) == kinds_of(read)


@settings(max_examples=60, deadline=None)
@given(kinds=st.lists(KIND, min_size=1, max_size=6), data=st.data())
def test_a_torn_line_is_charged_as_the_one_before_it(tmp_path_factory, kinds, data):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    whole = fill(path, kinds)
    lines = whole.splitlines(keepends=True)
    keep = data.draw(st.integers(1, len(lines) - 1))
    part = data.draw(st.integers(1, len(lines[keep]) - 2))
    path.write_bytes(b"".join(lines[:keep]) + lines[keep][:part])
    expected = kinds[: keep - 1] + kinds[keep - 2 : keep - 1] * (keep > 1)
    with PrivacyLedger.reopen(path, durable=False) as ledger:
        assert kinds_of(ledger) == expected
        ledger.append(EVENTS[2], FULL)
    assert kinds_of(PrivacyLedger.read(path)) == [*expected, (EVENTS[2], FULL)]


def test_a_tail_of_zero_bytes_is_a_torn_line(path):
    data = fill(path, [(EVENTS[0], FULL)] * 2)
    path.write_bytes(data + b"\0" * 300)
    assert len(PrivacyLedger.read(path)) == 3


APPEND_FOREVER = """
    import sys
    from lightning_dp.accounting.events import GaussianRelease, Sampling
    from lightning_dp.accounting.ledger import PrivacyLedger
    ledger = PrivacyLedger({"relation": "replace_one", "unit": "record"}, sys.argv[1])
    while True:
        number = ledger.append(GaussianRelease(noise_std=1.0, l2_sensitivity=1.0), Sampling(scheme="full"))
        print(number, flush=True)
"""


def start(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_a_killed_process_leaves_every_acknowledged_entry(path):
    with start(APPEND_FOREVER, path) as process:
        for _ in islice(process.stdout, 40):
            pass
        with pytest.raises(LedgerError, match="in use by another process"):
            PrivacyLedger.reopen(path)
        os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read().split()
    acknowledged = int(rest[-1]) if rest else 40
    with PrivacyLedger.reopen(path) as ledger:
        assert acknowledged <= len(ledger) <= acknowledged + 2


def test_append_returns_after_the_flush(path, monkeypatch):
    flushed = []
    monkeypatch.setattr(ledger_file.os, "fsync", lambda descriptor: flushed.append(path.stat().st_size))
    with PrivacyLedger(HEADER, path) as ledger:
        created = len(flushed)
        assert created >= 2  # the file and its name in the folder
        ledger.append(EVENTS[0], FULL)
        assert flushed[created:] == [path.stat().st_size]
    flushed.clear()
    # the broken twin would pass the same steps without a flush
    with PrivacyLedger.reopen(path, durable=False) as ledger:
        ledger.append(EVENTS[0], FULL)
    assert not flushed


def test_a_full_disk_refuses_the_release_and_everything_after(path, monkeypatch):
    ledger = PrivacyLedger(HEADER, path, durable=False)
    ledger.append(EVENTS[0], FULL)
    real_write, calls = os.write, []

    def full_disk(descriptor, data):
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real_write(descriptor, bytes(data[:20]))

    with monkeypatch.context() as patch:
        patch.setattr(ledger_file.os, "write", full_disk)
        with pytest.raises(LedgerError, match=r"No space left on device.*nothing was released"):
            ledger.append(EVENTS[0], FULL)
    with pytest.raises(LedgerError, match="takes no more entries"):
        ledger.append(EVENTS[0], FULL)
    assert len(ledger) == 1
    ledger.close()
    with PrivacyLedger.reopen(path, durable=False) as mended:
        assert len(mended) == 2


def cut(path):
    os.truncate(path, path.stat().st_size - 5)


def put_back(path):
    """As editors, rsync and git do: another file of the same name."""
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    os.replace(copy, path)


def write_without_a_lock(path):
    """A second machine whose file system keeps locks to itself."""
    with path.open("ab") as file:
        file.write(b"{}\n")


@pytest.mark.parametrize("happens", [cut, put_back, write_without_a_lock, Path.unlink], ids=lambda f: f.__name__)
def test_a_file_that_changed_under_a_run_takes_no_more_releases(path, happens):
    ledger = PrivacyLedger(HEADER, path, durable=False)
    ledger.append(EVENTS[0], FULL)
    happens(path)
    for match in ("while the run went on; nothing was released", "takes no more entries"):
        with pytest.raises(LedgerError, match=match):
            ledger.append(EVENTS[0], FULL)
    assert len(ledger) == 1
    ledger.close()


def test_without_that_check_releases_would_be_lost(path, monkeypatch):
    """The broken twin writes on where nobody will read: its releases are free."""
    monkeypatch.setattr(ledger_file.LedgerFile, "_check_untouched", lambda self: None)
    with PrivacyLedger(HEADER, path, durable=False) as ledger:
        put_back(path)
        ledger.append(EVENTS[0], FULL)
        assert len(ledger) == 1
    assert len(PrivacyLedger.read(path)) == 0


def test_a_run_may_change_its_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with PrivacyLedger(HEADER, "ledger.jsonl", durable=False) as ledger:
        monkeypatch.chdir(tmp_path.parent)
        ledger.append(EVENTS[0], FULL)
    assert len(PrivacyLedger.read(tmp_path / "ledger.jsonl")) == 1


# --- tampering --------------------------------------------------------------------------------------------------------


def test_missing_file_folder_and_existing_file(path, tmp_path):
    for open_ledger in (PrivacyLedger.read, PrivacyLedger.reopen):
        with pytest.raises(LedgerError, match="no such file"):
            open_ledger(path)
        with pytest.raises(LedgerError, match="cannot be"):
            open_ledger(tmp_path)
    fill(path, [])
    with pytest.raises(LedgerError, match="already exists"):
        PrivacyLedger(HEADER, path)
    with pytest.raises(LedgerError, match="cannot be created"):
        PrivacyLedger(HEADER, path / "ledger.jsonl")


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({}, "'relation' and 'unit'"),
        ({"relation": "replace_one"}, "'relation' and 'unit'"),
        ({"unit": "record"}, "neighboring_relation"),
        ({"relation": "swap", "unit": "record"}, "neighboring_relation"),
        (HEADER | {"format": 2}, "format 1"),
        (HEADER | {"value": math.nan}, "JSON"),
        (HEADER | {"value": object()}, "JSON"),
    ],
)
def test_headers_are_checked(path, header, match):
    with pytest.raises(ConfigurationError, match=match):
        PrivacyLedger(header, path)
    assert not path.exists()


def test_reopen_refuses_another_data_set(path):
    fill(path, [(EVENTS[0], FULL)])
    with pytest.raises(LedgerError, match="dataset='digits', got dataset='faces'"):
        PrivacyLedger.reopen(path, expected_header=HEADER | {"dataset": "faces"})
    PrivacyLedger.reopen(path, expected_header=HEADER | {"run_id": "b"}).close()


# --- one writer -------------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused(path):
    ledger = PrivacyLedger(HEADER, path, durable=False)
    code = """
        import sys
        from lightning_dp.accounting.ledger import PrivacyLedger
        PrivacyLedger.reopen(sys.argv[1])
    """
    with start(code, path) as process:
        assert "in use by another process" in process.stderr.read()
    assert process.returncode != 0
    with pytest.raises(LedgerError, match="in use by another process"):
        PrivacyLedger.reopen(path)
    assert len(PrivacyLedger.read(path)) == 0  # reading needs no lock
    ledger.close()
    PrivacyLedger.reopen(path).close()


def test_forks_copies_and_closed_ledgers_do_not_append(path, monkeypatch):
    ledger = PrivacyLedger(HEADER, path, durable=False)
    with pytest.raises(LedgerError, match="cannot be copied or pickled"):
        pickle.dumps(ledger)
    with monkeypatch.context() as patch:
        patch.setattr(ledger_file.os, "getpid", lambda: -1)
        with pytest.raises(LedgerError, match="a fork may not write"):
            ledger.append(EVENTS[0], FULL)
    ledger.append(EVENTS[0], FULL)
    ledger.close()
    ledger.close()
    for closed in (ledger, PrivacyLedger.read(path)):
        with pytest.raises(LedgerError, match="read-only or closed"):
            closed.append(EVENTS[0], FULL)
        with pytest.raises(LedgerError, match="read-only or closed"):
            closed.merge(PrivacyLedger(HEADER, None).state_dict())
    assert len(PrivacyLedger.read(path)) == 1


# --- checkpoints ------------------------------------------------------------------------------------------------------

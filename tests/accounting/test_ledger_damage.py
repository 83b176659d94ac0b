"""Files that are no ledger any more: refused in one line, or never charged for less."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dp.accounting import ledger_file
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import LedgerError
from tests.accounting.test_ledger import EVENTS, FULL, SAMPLINGS, fill


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def test_every_flipped_bit_is_refused(path):
    data = fill(path, [(EVENTS[0], FULL), (EVENTS[4], SAMPLINGS[2])])
    for place in range(len(data)):
        for bit in range(8):
            flipped = data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]
            with pytest.raises(LedgerError, match=r"ledger\.jsonl, line \d+: [^\n]*$"):
                ledger_file.parse_ledger(flipped, path)
    assert len(ledger_file.parse_ledger(data, path).entries) == 2


def damage(lines, how):
    header, first, second, third = lines
    return {
        "removed": [header, first, third],
        "reordered": [header, second, first, third],
        "repeated": [header, first, first, second, third],
        "no header": [first, second, third],
        "another header": [header.replace(b"record", b"nobody"), first, second, third],
        "cheaper": [header, first.replace(b"5000.0", b"9000.0"), second, third],
        "blank line": [header, first, b"\n", second, third],
        "not text": [header, first, b"\xff\xfe\n", second],
        "other file": [b"PK\x03\x04\n", b"\n"],
        "json": [b"{}\n", b"[]\n"],
        "nested": [header, b"[" * 100_000 + b"\n"],
    }[how]


HOW = ["removed", "reordered", "repeated", "no header", "another header", "cheaper", "blank line", "not text"]


HOW += ["other file", "json", "nested"]


@pytest.mark.parametrize("how", HOW)
def test_damaged_files_are_refused_in_one_line(path, how):
    lines = fill(path, [(EVENTS[0], FULL), (EVENTS[1], FULL), (EVENTS[0], FULL)]).splitlines(keepends=True)
    path.write_bytes(b"".join(damage(lines, how)))
    before = path.read_bytes()
    for open_ledger in (PrivacyLedger.read, PrivacyLedger.reopen):
        with pytest.raises(LedgerError, match=r"ledger\.jsonl, line \d: ") as caught:
            open_ledger(path)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_a_refused_file_is_not_left_locked(path):
    data = fill(path, [(EVENTS[0], FULL)] * 2)
    path.write_bytes(data.replace(b"5000", b"6000"))
    with pytest.raises(LedgerError):
        PrivacyLedger.reopen(path)
    path.write_bytes(data)
    PrivacyLedger.reopen(path).close()


@settings(max_examples=100, deadline=None)
@given(garbage=st.binary(max_size=400))
def test_garbage_never_gives_a_traceback(tmp_path_factory, garbage):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    path.write_bytes(garbage)
    with pytest.raises(LedgerError):
        PrivacyLedger.read(path)

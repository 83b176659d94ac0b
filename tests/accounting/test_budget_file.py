"""The file of a data set's budget: nothing reserved is ever lost, and two processes cannot both take the last of it."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lightning_dp
from lightning_dp.accounting import budget_file
from lightning_dp.accounting.dataset_budget import DatasetBudget
from lightning_dp.errors import BudgetExceededError, LedgerError
from tests.accounting.budgets import budget, flags, request, reserve, room_for

__all__ = ["budget"]

ROOT = Path(lightning_dp.__file__).parents[1]


class TestFile:
    def lines(self, budget):
        reserve(budget, request("a"))
        reserve(budget, request("b", 4))
        return budget._file.path, budget._file.path.read_bytes()

    def test_every_flipped_bit_is_refused(self, budget):
        path, data = self.lines(budget)
        for place in range(0, len(data), 23):
            flipped = data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :]
            path.write_bytes(flipped)
            with pytest.raises(LedgerError, match=r"budget\.jsonl[^\n]*$"):
                budget.state()
            with pytest.raises(LedgerError):
                reserve(budget, request("c", 1))
        path.write_bytes(data)
        assert list(budget.state().runs) == ["a", "b"]

    def test_a_cut_at_any_byte_is_refused(self, budget):
        path, data = self.lines(budget)
        for cut in range(0, len(data), 37):
            path.write_bytes(data[:cut])
            with pytest.raises(LedgerError, match="cut off"):
                budget.state()
            with pytest.raises(LedgerError, match="cut off"):
                reserve(budget, request("c", 1))
        path.unlink()
        with pytest.raises(LedgerError, match="no such file"):
            reserve(budget, request("c", 1))

    def test_a_torn_reservation_never_counted_and_is_mended(self, budget):
        path, data = self.lines(budget)
        path.write_bytes(data + b'{"kind":"reserve","ru')
        assert list(budget.state().runs) == ["a", "b"]
        reserve(budget, request("c", 1))
        assert list(budget.state().runs) == ["a", "b", "c"]
        assert path.read_bytes().startswith(data)

    def test_a_line_that_is_whole_counts_though_its_process_died_before_the_head_followed(self, budget):
        self.lines(budget)
        head = (budget.folder / "budget.head").read_bytes()
        reserve(budget, request("c", 1))
        (budget.folder / "budget.head").write_bytes(head)
        assert list(budget.state().runs) == ["a", "b", "c"]

    def test_whole_lines_cut_off_together_with_the_head_are_noticed(self, budget):
        """Without it, an older state of the file would be had by deleting lines in an editor."""
        path, data = self.lines(budget)
        (budget.folder / "budget.head").unlink()
        for kept in (data, data[: data.rindex(b"\n", 0, -1) + 1]):
            path.write_bytes(kept)
            for look in (budget.state, lambda: reserve(budget, request("c", 1))):
                with pytest.raises(LedgerError, match=r"budget\.head.* is gone"):
                    look()

    def test_a_crash_between_the_first_line_and_its_head_is_mended(self, budget):
        self.lines(budget)
        first = budget._file.path.read_bytes().splitlines(keepends=True)[0]
        budget._file.path.write_bytes(first)
        (budget.folder / "budget.head").unlink()
        reserve(budget, request("a"))
        assert list(budget.state().runs) == ["a"]

    def test_a_torn_header_is_begun_anew(self, budget):
        budget.folder.mkdir()
        budget._file.path.write_bytes(b'{"dataset":"di')
        reserve(budget, request("a"))
        assert list(budget.state().runs) == ["a"]

    @pytest.mark.parametrize("garbage", [b"\xff\n", b"{}\n", b"[]\n", b"\n\n", b"PK\x03\x04\n"])
    def test_other_files_are_refused_in_one_line(self, budget, garbage):
        budget.folder.mkdir()
        budget._file.path.write_bytes(garbage)
        with pytest.raises(LedgerError, match=r"budget\.jsonl, line 1") as caught:
            reserve(budget, request("a"))
        assert "\n" not in str(caught.value)
        assert budget._file.path.read_bytes() == garbage

    def test_sealed_lines_of_another_kind_are_refused(self, budget):
        reserve(budget, request("a"))
        for line in (
            {"kind": "gift"},
            {"kind": "reserve"},
            {"kind": "seen", "run": "z", "writers": {}},
            {"kind": "return", "run": "z"},
        ):
            with budget._file.locked() as file:
                size = budget._file.path.stat().st_size
                head = (budget.folder / "budget.head").read_bytes()
                file.append(line)
            with pytest.raises(LedgerError, match=r"line 3: no line of a data set's budget"):
                budget.state()
            os.truncate(budget._file.path, size)
            (budget.folder / "budget.head").write_bytes(head)

    def test_a_full_disk_reserves_nothing(self, budget, monkeypatch):
        path, data = self.lines(budget)
        for name in ("write", "fsync"):
            calls = []

            def full(*arguments, calls=calls):
                calls.append(arguments)
                raise OSError(28, "No space left on device")

            with monkeypatch.context() as patch:
                patch.setattr(budget_file.os, name, full)
                with pytest.raises(LedgerError, match="No space left on device"):
                    reserve(budget, request("c", 1))
            assert calls
            assert path.read_bytes() == data
        assert list(budget.state().runs) == ["a", "b"]

    def test_a_reservation_is_on_the_disk_before_it_counts(self, budget, monkeypatch):
        flushed = []
        real = os.fsync
        monkeypatch.setattr(budget_file.os, "fsync", lambda fd: (flushed.append(os.fstat(fd).st_size), real(fd)))
        reserve(budget, request("a"))
        assert budget._file.path.stat().st_size in flushed

    def test_a_folder_that_cannot_be(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(LedgerError, match="cannot be written"):
            DatasetBudget(tmp_path / "file").reserve(flags(tmp_path / "file"), [request("a")])


RACE = """
    import os, sys, time
    from pathlib import Path
    sys.path.insert(0, os.getcwd())
    from tests.accounting.budgets import DatasetBudget, flags, request, room_for
    from lightning_dp.errors import BudgetExceededError
    folder, start = Path(sys.argv[1]), time.time() + 0.3
    children = []
    for number in range(int(sys.argv[2])):
        child = os.fork()
        if not child:
            while time.time() < start:
                pass
            try:
                DatasetBudget(folder).reserve(flags(folder, room_for(12)), [request(f"run{number}")])
                os._exit(0)
            except BudgetExceededError:
                os._exit(9)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(*codes)
"""


def test_racing_processes_cannot_both_take_the_last_of_it(tmp_path):
    """Twelve processes at once, room for two of them: two get in, found one budget, and ten are refused."""
    folder = tmp_path / "budget"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RACE), str(folder), "12"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    codes = sorted(map(int, done.stdout.split()))
    assert codes == [0, 0, *[9] * 10]
    state = DatasetBudget(folder).state()
    assert len(state.runs) == 2
    assert state.spent <= 1
    lines = [json.loads(line)["kind"] for line in (folder / "budget.jsonl").read_text().splitlines()]
    assert lines == ["dataset budget", "reserve", "reserve"]


def test_without_the_lock_they_could(tmp_path, monkeypatch):
    """The broken twin: two processes that read before either writes."""
    folder = tmp_path / "budget"
    epsilon = room_for(7)
    budget = DatasetBudget(folder)
    reserve(budget, request("a", 1), epsilon=epsilon)
    stale = budget._file.read()
    reserve(budget, request("b", 5), epsilon=epsilon)
    from lightning_dp.accounting.budget_shortage import shortage_of
    from lightning_dp.accounting.budget_state import state_of

    assert shortage_of(state_of(stale, budget._file.path), [request("c", 5).needed]) is None
    with pytest.raises(BudgetExceededError):
        reserve(budget, request("c", 5), epsilon=epsilon)

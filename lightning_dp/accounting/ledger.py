"""The append-only record of every release, on disk before the noise of a release is drawn.

A file of JSON lines: one header, then one line per release. Each line carries the SHA-256 of itself chained to the line
before it, so a changed, missing or reordered line is noticed; whoever rewrites the whole chain, or cuts whole lines
off its end, is not (a checkpoint's copy of the ledger restores those by `PrivacyLedger.merge`).

Every process that appends is a *writer* with a random name in its lines. A ledger holds each writer's releases in
their order, so two copies of a ledger that went separate ways are told from one copy that is merely older.
"""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from dp_accounting import NeighboringRelation

from lightning_dp.accounting.events import ReleaseEvent, Sampling, parse_relation
from lightning_dp.accounting.ledger_file import LedgerContents, LedgerFile, read_ledger_file
from lightning_dp.accounting.ledger_header import check_same_claim, check_same_data, checked_header
from lightning_dp.accounting.ledger_lines import Line
from lightning_dp.accounting.ledger_state import Run, make_state, parse_state, runs_beyond, runs_of
from lightning_dp.errors import ConfigurationError, LedgerError


@dataclass(frozen=True)
class LedgerEntry:
    """One release.

    Attributes:
        number: Its place in the ledger, from 1.
        event: What it cost.
        sampling: How records entered it.
        relation: The neighbouring relation of the event's sensitivity.
        unit: The privacy unit in words.
    """

    number: int
    event: ReleaseEvent
    sampling: Sampling
    relation: NeighboringRelation
    unit: str


class PrivacyLedger:
    """The releases of one run, append-only.

    Guarantee: when `append` returned, the entry survives a crash of the process and of the machine. A line torn by a
    crash during `append` is charged as one more copy of the release before it; its noise had not been drawn.

    Not covered: whoever cuts whole lines off the end of the file, or computes the chain anew.

    Args:
        header: What is common to all entries: "relation" (a name), "unit", and freely "num_records", "dataset",
            "fingerprint", "run_id" and other JSON values.
        path: File to create, None to keep the ledger in memory only.
        durable: False skips the flush to the disk; for tests of other things only.

    Raises:
        LedgerError: The file exists (use `reopen`), cannot be written, or is in use by another process.
        ConfigurationError: The header lacks the relation or the unit, or is not JSON.
    """

    _file: LedgerFile | None
    _header: dict[str, Any]

    def __init__(self, header: Mapping[str, Any], path: Path | str | None, *, durable: bool = True) -> None:
        self._set_up(checked_header(header))
        if path is not None:
            self._file = LedgerFile.create(Path(path), self._header, durable=durable)

    def _set_up(self, header: dict[str, Any]) -> None:
        self._file = None
        self._header = header
        self._relation = parse_relation(header["relation"])
        self._runs: list[Run] = []
        self._counts: dict[tuple[ReleaseEvent, Sampling], int] = {}
        self._length = 0
        self._writer = secrets.token_hex(8)
        self._is_read_only = False
        self._on_append: Callable[[], None] | None = None
        self._made = 0

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Return a read-only view of a ledger file, verified line by line; takes no lock.

        Args:
            path: The file.

        Returns:
            The ledger; `append` and `merge` are refused.

        Raises:
            LedgerError: The file is missing, incomplete in its header, or altered.
        """
        ledger = cls.__new__(cls)
        ledger._load(Path(path))
        ledger._is_read_only = True
        return ledger

    @classmethod
    def reopen(
        cls, path: Path | str, *, expected_header: Mapping[str, Any] | None = None, durable: bool = True
    ) -> Self:
        """Continue a ledger file after a stop or a crash, under the lock, mending a torn last line.

        Args:
            path: The file.
            expected_header: The header this run would have written; refused if it is about other records, another
                relation or another unit. None skips the check.
            durable: As in the constructor.

        Returns:
            The ledger, ready to append, as a new writer.

        Raises:
            LedgerError: As in `read`, the header is another one, or the file is in use by another process.
        """
        file = LedgerFile.open(Path(path), durable=durable)
        ledger = cls.__new__(cls)
        try:
            contents = ledger._load(Path(path))
            if expected_header is not None:
                check_same_data(ledger._header, checked_header(expected_header))
            file.continue_from(contents)
        except BaseException:
            file.close()
            raise
        ledger._file = file
        if contents.torn_at is not None and ledger._runs:
            torn = ledger._forget_last()  # counted by `_load`; now written properly
            ledger.append(torn.event, torn.sampling)
        return ledger

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], path: Path | str | None = None) -> Self:
        """Return a new ledger with the header and the releases of a checkpoint.

        Args:
            state: What `state_dict` returned.
            path: File to create, None for memory only.

        Returns:
            The ledger.

        Raises:
            LedgerError: The state is altered or incomplete, or the file exists.
        """
        header, _ = parse_state(state)
        ledger = cls(header, path)
        ledger.merge(state)
        return ledger

    @property
    def header(self) -> dict[str, Any]:
        """A copy of the header."""
        return dict(self._header)

    @property
    def relation(self) -> NeighboringRelation:
        """The neighbouring relation of every entry."""
        return self._relation

    @property
    def unit(self) -> str:
        """The privacy unit of every entry, in words."""
        return str(self._header["unit"])

    @property
    def path(self) -> Path | None:
        """The file, None for a ledger in memory or a read-only one."""
        return self._file.path if self._file else None

    @property
    def entries(self) -> tuple[LedgerEntry, ...]:
        """All releases in order; built on each call, prefer `counts` for accounting."""
        kinds = [(run.event, run.sampling) for run in self._runs for _ in range(run.count)]
        return tuple(
            LedgerEntry(number, event, sampling, self._relation, self.unit)
            for number, (event, sampling) in enumerate(kinds, start=1)
        )

    def __len__(self) -> int:
        return self._length

    def counts(self) -> dict[tuple[ReleaseEvent, Sampling], int]:
        """Return how often each (event, sampling) was released.

        Returns:
            A new dictionary, as `compute_epsilon` takes it.
        """
        return dict(self._counts)

    def writers(self) -> dict[str, int]:
        """Return how many releases each process has made, by its random name."""
        made: dict[str, int] = {}
        for run in self._runs:
            made[run.writer] = made.get(run.writer, 0) + run.count
        return made

    def append(self, event: ReleaseEvent, sampling: Sampling) -> int:
        """Record one release; call it before its noise is drawn.

        Args:
            event: What the release will cost.
            sampling: How records enter it.

        Returns:
            The number of the entry, from 1. When this returns, the entry is on disk.

        Raises:
            LedgerError: The ledger is read-only or closed, belongs to another process, or could not be written; then
                nothing may be released.
        """
        return self.append_all({(event, sampling): 1})

    def append_all(self, counts: Mapping[tuple[ReleaseEvent, Sampling], int]) -> int:
        """Record releases that are charged together, in one write; as `append`.

        Args:
            counts: How often each (event, sampling) will be released.

        Returns:
            The number of the last entry.
        """
        self._append([Run(self._writer, event, sampling, count) for (event, sampling), count in counts.items()])
        self._made += sum(counts.values())
        if self._on_append is not None:
            self._on_append()
        return self._length

    def charge_lost(self, writer: str, event: ReleaseEvent, sampling: Sampling, count: int) -> None:
        """Record releases that another process may have made, of which no line is here; as that process's own.

        Args:
            writer: Its name, as in `writers`.
            event: What each cost.
            sampling: How records entered it.
            count: How many, >= 1.
        """
        self._append([Run(writer, event, sampling, count)])

    @property
    def writer(self) -> str:
        """The random name of this process."""
        return self._writer

    @property
    def made(self) -> int:
        """How many releases this process has charged."""
        return self._made

    def on_append(self, action: Callable[[], None]) -> None:
        """Call `action` whenever this process has charged a release, before anything of it is drawn.

        Args:
            action: What raises stops the release; it stays charged.
        """
        self._on_append = action

    def _append(self, runs: list[Run]) -> None:
        if self._is_read_only:
            raise LedgerError("This ledger is read-only or closed; use PrivacyLedger.reopen(path) to continue it.")
        if self._file is not None:
            kinds = [run for run in runs for _ in range(run.count)]
            lines = (
                Line(number, run.writer, run.event, run.sampling)
                for number, run in enumerate(kinds, start=self._length + 1)
            )
            self._file.append(*lines)
        for run in runs:
            self._remember(run)

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger as plain JSON-able values for a checkpoint, equal releases compressed.

        Returns:
            Header, runs, and a checksum over both.
        """
        return make_state(self._header, self._runs)

    def merge(self, state: Mapping[str, Any]) -> int:
        """Take in what another copy of this ledger has spent beyond this one.

        Releases are the same only if one writer made them at the same place, so copies that went separate ways are both
        charged in full, and merging the same state twice changes nothing. The result never costs less than either side.

        Args:
            state: What the other copy's `state_dict` returned (a checkpoint's, say).

        Returns:
            How many entries were appended.

        Raises:
            LedgerError: The state is altered or incomplete, or about other records, another relation or another unit,
                or its claim would rest on something else (noise that was not secret, another partition).
        """
        header, theirs = parse_state(state)
        check_same_data(self._header, header)
        check_same_claim(self._header, header)
        missing = [
            run
            for writer in dict.fromkeys(run.writer for run in theirs)
            for run in runs_beyond(runs_of(writer, self._runs), runs_of(writer, theirs))
        ]
        before = self._length
        self._append(missing)
        return self._length - before

    def close(self) -> None:
        """Release the file and its lock; reading goes on, appending is refused."""
        if self._file is not None:
            self._file.close()
            self._is_read_only = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, path: Path) -> LedgerContents:
        """Fill the ledger from a file, a torn last line charged as one more copy of the line before."""
        contents = read_ledger_file(path)
        try:
            self._set_up(checked_header(contents.header))
        except ConfigurationError as error:
            raise LedgerError(f"{path}, line 1: {error}") from error
        for line in contents.entries:
            self._remember(Run(line.writer, line.event, line.sampling, 1))
        if contents.torn_at is not None and self._runs:
            self._remember(replace(self._runs[-1], count=1))
        return contents

    def _remember(self, run: Run) -> None:
        if self._runs and self._runs[-1].is_like(run):
            self._runs[-1].count += run.count
        else:
            self._runs.append(replace(run))
        self._counts[run.event, run.sampling] = self._counts.get((run.event, run.sampling), 0) + run.count
        self._length += run.count

    def _forget_last(self) -> Run:
        last = self._runs[-1]
        last.count -= 1
        self._counts[last.event, last.sampling] -= 1
        self._length -= 1
        return last

"""The file that several runs share: one process at a time, sealed lines, every line on the disk before it counts."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_dp.accounting.ledger_lines import canonical_json, seal, unseal
from lightning_dp.errors import LedgerError

try:
    import fcntl
except ImportError:  # no such lock on this system: the file then refuses to be used
    fcntl = None  # type: ignore[assignment]

BUDGET_FILE = "budget.jsonl"
_HEAD_FILE = "budget.head"
_LOCK_FILE = ".lock"
_PATIENCE_S = 60.0
_POLL_S = 0.02


class BudgetFile:
    """Append-only JSON lines in a folder, chained by checksums; a second file holds how many there are.

    Each line is written before the second file follows it, so a crash leaves lines beyond the head at most. Lines that
    the head names and the file lacks were cut off by somebody, and the file is refused.

    Not covered: whoever computes the whole chain and the head anew, or puts back both from an older copy.

    Args:
        folder: The folder; made by the first append.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / BUDGET_FILE

    def exists(self) -> bool:
        """Tell whether a first line was ever written."""
        return self.path.exists() or (self.folder / _HEAD_FILE).exists()

    def read(self) -> list[dict[str, Any]]:
        """Return all lines, verified; takes no lock, and leaves out what is being written.

        Raises:
            LedgerError: Missing, unreadable, altered or cut.
        """
        return self._verified()[0]

    @contextmanager
    def locked(self) -> Iterator["LockedBudgetFile"]:
        """Hold the file for this process alone, mended where a crash tore its last line.

        Raises:
            LedgerError: As in `read`; or another process holds it for a minute, or the folder cannot be written.
        """
        if fcntl is None:
            raise LedgerError("Data set budgets need POSIX file locks (Linux or macOS); this system has none.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise LedgerError(f"The data set budget {self.folder} cannot be written: {error.strerror}.") from None
        try:
            self._wait_for(descriptor)
            lines, head, size = self._verified() if self._has_begun() else ([], "", 0)
            if self.path.exists() and self.path.stat().st_size > size:
                os.truncate(self.path, size)  # a torn line: whoever wrote it was never told that it counts
            yield LockedBudgetFile(self, lines, head, size)
        finally:
            os.close(descriptor)  # gives the lock back

    def _has_begun(self) -> bool:
        """Tell whether anything was ever reserved: not if a crash tore the very first line."""
        return (self.folder / _HEAD_FILE).exists() or (self.path.exists() and b"\n" in self.path.read_bytes())

    def _wait_for(self, descriptor: int) -> None:
        end = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                if time.monotonic() > end:
                    raise LedgerError(
                        f"The data set budget {self.folder} is in use by another process, for {_PATIENCE_S:.0f} s now. "
                        "Try again when it has ended."
                    ) from None
                time.sleep(_POLL_S)

    def _verified(self) -> tuple[list[dict[str, Any]], str, int]:
        """Return the lines, the digest that the next one continues from, and how many bytes they take."""
        expected = self._read_head()
        try:
            data = self.path.read_bytes()
        except OSError as error:
            reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)
            raise LedgerError(f"Expected the budget of a data set at {self.path}, but {reason}.") from None
        *complete, tail = data.split(b"\n")
        lines: list[dict[str, Any]] = []
        head, size = "", 0
        for number, line in enumerate(complete, start=1):
            opened = unseal(head, line)
            if opened is None:
                raise LedgerError(
                    f"{self.path}, line {number}: it or a line before it was changed, removed or moved. What was spent "
                    "on this data set cannot be told; restore the file from a copy."
                )
            text, head = opened
            lines.append(_json_object(text, self.path, number))
            size += len(line) + 1
            if number == expected[0] and head != expected[1]:
                raise LedgerError(f"{self.path}, line {number}: it is not the line that {_HEAD_FILE} names.")
        if len(lines) > 1 and not expected[0]:  # it follows the first line before a second is written
            raise LedgerError(
                f"{self.path} holds {len(lines)} lines, but {_HEAD_FILE}, which says how many there were, is gone: its "
                "end may have been cut off. What was spent on this data set cannot be told; restore both from a copy."
            )
        if len(lines) < expected[0]:
            torn = " and a torn one" if tail else ""
            raise LedgerError(
                f"{self.path} holds {len(lines)} lines{torn}, but {_HEAD_FILE} names {expected[0]}: its end was cut "
                "off. What was spent on this data set cannot be told; restore the file from a copy."
            )
        if not lines:
            raise LedgerError(f"{self.path} is empty: nothing was reserved in it. Delete it.")
        return lines, head, size

    def _read_head(self) -> tuple[int, str]:
        path = self.folder / _HEAD_FILE
        try:
            number, digest = path.read_text(encoding="ascii").split()
            return int(number), digest
        except FileNotFoundError:
            return 0, ""
        except (OSError, ValueError) as error:
            raise LedgerError(f"{path} cannot be read as the head of a data set's budget ({error}).") from None


class LockedBudgetFile:
    """What a process may do while it holds the file; made by `BudgetFile.locked`.

    Attributes:
        lines: All lines so far, the first being the header.
    """

    def __init__(self, file: BudgetFile, lines: list[dict[str, Any]], head: str, size: int) -> None:
        self.lines = lines
        self._file, self._head, self._size = file, head, size

    def append(self, line: dict[str, Any]) -> None:
        """Write one line and return when it is on the disk.

        Raises:
            LedgerError: The disk refused; the file is as before then.
        """
        sealed, head = seal(self._head, canonical_json(line))
        data = sealed + b"\n"
        try:
            self._write(data)
            draft = self._drafted_head(len(self.lines) + 1, head)
        except OSError as error:
            with contextlib.suppress(OSError):  # else it counts though nobody was told
                os.truncate(self._file.path, self._size)
            raise self._failed(error) from None
        try:
            os.replace(draft, self._file.folder / _HEAD_FILE)
            self._flush_folder()
        except OSError as error:  # the line stays: the head may name it already
            raise self._failed(error) from None
        self.lines.append(json.loads(canonical_json(line)))
        self._head, self._size = head, self._size + len(data)

    def _write(self, data: bytes) -> None:
        is_new = not self._file.path.exists()
        descriptor = os.open(self._file.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if is_new:
            self._flush_folder()

    def _failed(self, error: OSError) -> LedgerError:
        return LedgerError(
            f"The data set budget {self._file.path} could not be written ({error.strerror}); free the disk. "
            "Nothing was released."
        )

    def _drafted_head(self, number: int, digest: str) -> Path:
        draft = self._file.folder / f"{_HEAD_FILE}.part"
        with draft.open("w", encoding="ascii") as file:
            file.write(f"{number} {digest}\n")
            file.flush()
            os.fsync(file.fileno())
        return draft

    def _flush_folder(self) -> None:
        folder = os.open(self._file.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _json_object(text: str, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise LedgerError(f"{path}, line {number}: no line of a data set's budget.")
    return value

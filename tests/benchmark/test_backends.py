"""Processes and Ray tasks: started, told apart, interrupted, and their last words."""

import importlib.util
import os
import signal
import time
from pathlib import Path

import pytest

from lightning_dp.benchmark.backends import (
    Backend,
    LocalBackend,
    RayBackend,
    Task,
    available_cpus,
    check_reachable,
    checked_jobs,
    last_words,
    run_to_end,
)
from lightning_dp.errors import ConfigurationError

PATIENCE_S = 120.0


def task(tmp_path, name="a", *arguments):
    return Task(name=name, arguments=tuple(arguments), folder=tmp_path, log=tmp_path / "logs" / name)


def drain(backend: Backend, expected: int):
    ended, start = [], time.monotonic()
    while len(ended) < expected and time.monotonic() - start < PATIENCE_S:
        ended += backend.collect()
    return {each.name: code for each, code in ended}


def test_processes_end_with_their_codes_and_words(tmp_path):
    """The public command line, once well and once wrong, at the same time."""
    backend = LocalBackend(2)
    well, wrong = task(tmp_path, "well", "--version"), task(tmp_path, "wrong", "fti")
    backend.start(well)
    backend.start(wrong)
    assert drain(backend, 2) == {"well": 0, "wrong": 2}
    assert (tmp_path / "logs" / "well.out").read_text().startswith("lightning-dp ")
    assert last_words(wrong, 2).startswith("Unknown command 'fti'; choose from fit")


def stand_in(tmp_path):
    """Return a task that sleeps until it is interrupted; the working directory comes first on the path of -m."""
    (tmp_path / "lightning_dp").mkdir()
    (tmp_path / "lightning_dp" / "__init__.py").touch()  # without it, a package further down the path would win
    (tmp_path / "lightning_dp" / "__main__.py").write_text(
        "import pathlib, time\n"
        "try:\n    pathlib.Path('started').touch(); time.sleep(600)\n"
        "except KeyboardInterrupt:\n    pathlib.Path('interrupted').touch()\n"
    )
    return task(tmp_path)


def wait_for(path):
    start = time.monotonic()
    while not path.exists():
        assert time.monotonic() - start < PATIENCE_S, path
        time.sleep(0.02)


def test_an_interrupt_reaches_the_processes(tmp_path):
    """They run in groups of their own, so Ctrl-C is passed on."""
    backend = LocalBackend(1)
    backend.start(stand_in(tmp_path))
    wait_for(tmp_path / "started")
    backend.interrupt()
    assert (tmp_path / "interrupted").exists()
    assert backend.collect() == []


def test_an_interrupt_reaches_them_from_a_background_job(tmp_path):
    """A shell starts those with SIGINT ignored, which children inherit."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        test_an_interrupt_reaches_the_processes(tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_environment_of_a_run(tmp_path, monkeypatch):
    """Threads are its own; the seed of planning is not."""
    (tmp_path / "lightning_dp").mkdir()
    (tmp_path / "lightning_dp" / "__init__.py").touch()  # without it, a package further down the path would win
    (tmp_path / "lightning_dp" / "__main__.py").write_text(
        "import os\nprint(os.environ['OMP_NUM_THREADS'], os.environ.get('PL_GLOBAL_SEED'))\n"
    )
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert run_to_end(task(tmp_path)) == 0
    assert (tmp_path / "logs" / "a.out").read_text() == "1 None\n"


@pytest.mark.parametrize(
    ("said", "code", "expected"),
    [
        ("Traceback\nRuntimeError: can't allocate memory\n\n", 1, "RuntimeError: can't allocate memory"),
        ("lightning-dp: error: Missing: model.\n", 2, "Missing: model."),
        ("", 1, "it said nothing on standard error"),
        (
            "step 3\n",
            -signal.SIGKILL,
            "killed by SIGKILL, as the system does when memory runs out; its last line: step 3",
        ),
        ("", -signal.SIGSEGV, "killed by SIGSEGV; its last line: it said nothing"),
        ("", -999, "killed by signal 999"),
    ],
)
def test_last_words(tmp_path, said, code, expected):
    failed = task(tmp_path)
    failed.log.parent.mkdir()
    Path(f"{failed.log}.err").write_text(said)
    assert last_words(failed, code).startswith(expected)


def test_last_words_of_what_never_began(tmp_path):
    assert last_words(task(tmp_path), 1) == "it said nothing on standard error"


def test_jobs():
    assert checked_jobs(3) == 3
    with pytest.raises(ConfigurationError, match="Expected --jobs >= 1, got 0"):
        checked_jobs(0)
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_ray_that_is_not_installed():
    with pytest.raises(ConfigurationError, match=r"needs the package ray.*pip install 'lightning-dp\[ray\]'"):
        RayBackend("auto")


@pytest.fixture
def ray():
    """Ray, shut down when the test is over."""
    module = pytest.importorskip("ray")
    yield module
    module.shutdown()


@pytest.mark.slow
def test_a_local_ray_cluster(ray, tmp_path):
    backend = RayBackend("local", jobs=2)
    backend.start(task(tmp_path, "well", "--version"))
    backend.start(task(tmp_path, "wrong", "fti"))
    assert drain(backend, 2) == {"well": 0, "wrong": 2}
    assert (tmp_path / "logs" / "well.out").read_text().startswith("lightning-dp ")


@pytest.mark.slow
def test_an_interrupt_reaches_a_ray_task(ray, tmp_path):
    backend = RayBackend("local", jobs=1)
    backend.start(stand_in(tmp_path))
    wait_for(tmp_path / "started")
    backend.interrupt()
    wait_for(tmp_path / "interrupted")


@pytest.mark.slow
def test_no_ray_cluster_on_this_machine(ray):
    with pytest.raises(ConfigurationError, match=r"Expected a Ray cluster at --address auto.*ray start --head"):
        RayBackend()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_nobody_answers_at_an_address(address):
    with pytest.raises(ConfigurationError, match=f"Expected a Ray cluster at --address {address}, got: "):
        check_reachable(address)


@pytest.mark.parametrize("address", [None, "auto", "local"])
def test_names_are_left_to_ray(address):
    check_reachable(address)

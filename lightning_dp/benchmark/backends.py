"""Where the runs of a comparison are made: processes on this machine, or tasks of a Ray cluster."""

import contextlib
import importlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from typing_extensions import override

from lightning_dp.errors import ConfigurationError

_PATIENCE_S = 60.0  # for an interrupted run to write its last words
_PATIENCE_CONNECT_S = 5.0
_POLL_S = 0.2
_NOT_FOR_CHILDREN = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")  # planning in this process sets them


@dataclass(frozen=True, kw_only=True)
class Task:
    """One call of the public command line.

    Attributes:
        name: Name of the cell.
        arguments: What follows `lightning-dp`.
        folder: Working directory.
        log: Log files without ending: `.out` and `.err` are written.
        threads: Threads that the run may use.
    """

    name: str
    arguments: tuple[str, ...]
    folder: Path
    log: Path
    threads: int = 1


# A shell's background jobs ignore SIGINT, Ray's workers block it, and so do their children: runs that could not be
# interrupted would be lost.
_BOOT: Final = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT]); "
    "runpy.run_module('lightning_dp', run_name='__main__', alter_sys=True)"
)


def start(task: Task) -> "subprocess.Popen[bytes]":
    """Start the process of a task on the machine that calls this."""
    kept = {key: value for key, value in os.environ.items() if key not in _NOT_FOR_CHILDREN}
    threads = {"OMP_NUM_THREADS": str(task.threads)}
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{task.log}.out", "ab") as out, open(f"{task.log}.err", "ab") as err:
        return subprocess.Popen(
            [sys.executable, "-c", _BOOT, *task.arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=task.folder,
            env={**kept, **threads},
            # A process group of its own: on Ctrl-C the comparison tells its runs once, in order.
            start_new_session=True,
        )


class Backend(ABC):
    """Runs tasks, `slots` at a time.

    Attributes:
        slots: Tasks that may run at once.
    """

    slots: int

    @abstractmethod
    def start(self, task: Task) -> None:
        """Start a task; it must not be called for more than `slots` at once."""

    @abstractmethod
    def collect(self) -> list[tuple[Task, int]]:
        """Wait a moment and return the tasks that ended since the last call, with their exit codes."""

    @abstractmethod
    def interrupt(self) -> None:
        """Interrupt all running tasks as Ctrl-C does, and wait for them to end."""


@final
class LocalBackend(Backend):
    """Processes on this machine.

    Args:
        jobs: Processes at once, >= 1.
    """

    def __init__(self, jobs: int) -> None:
        self.slots = checked_jobs(jobs)
        self._running: list[tuple[Task, subprocess.Popen[bytes]]] = []

    @override
    def start(self, task: Task) -> None:
        self._running.append((task, start(task)))

    @override
    def collect(self) -> list[tuple[Task, int]]:
        time.sleep(_POLL_S)
        ended = [(task, process.returncode) for task, process in self._running if process.poll() is not None]
        self._running = [(task, process) for task, process in self._running if process.returncode is None]
        return ended

    @override
    def interrupt(self) -> None:
        for _, process in self._running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
        end = time.monotonic() + _PATIENCE_S
        for _, process in self._running:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running = []


@final
class RayBackend(Backend):
    """Tasks of an existing Ray cluster; every node must see the comparison's folder and the data.

    Args:
        address: Address of the cluster; "auto" finds the one on this machine, "local" starts one.
        jobs: Tasks at once; None lets the cluster's processors decide.
        threads: Processors that one run asks for.

    Raises:
        ConfigurationError: Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(self, address: str | None = None, *, jobs: int | None = None, threads: int = 1) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigurationError(
                "--backend ray needs the package ray, which is not installed. Run: pip install 'lightning-dp[ray]'"
            )
        self._ray: Any = importlib.import_module("ray")
        ray = self._ray
        check_reachable(address)
        try:
            ray.init(address=address or "auto", log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # Ray's own, those of its parts, and bare ones
            # At HOST:PORT somebody answered above.
            is_there = ":" in (address or "")
            mend = (
                "It has to be a cluster of the same Ray version; if it asks for a token, set RAY_AUTH_MODE=token, and "
                "RAY_AUTH_TOKEN unless the token lies in ~/.ray."
                if is_there
                else "Start one with 'ray start --head', or give --address local."
            )
            raise ConfigurationError(
                f"Expected a Ray cluster at --address {address or 'auto'}, got: {' '.join(str(error).split())} {mend}"
            ) from None
        cpus = int(ray.cluster_resources().get("CPU", 1))
        self.slots = max(1, cpus // threads) if jobs is None else checked_jobs(jobs)
        self._remote = ray.remote(num_cpus=threads, max_retries=0)(run_to_end)
        self._running: dict[Any, Task] = {}

    @override
    def start(self, task: Task) -> None:
        self._running[self._remote.remote(task)] = task

    @override
    def collect(self) -> list[tuple[Task, int]]:
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=_POLL_S)
        return [(self._running.pop(ref), self._code(ref)) for ref in ready]

    @override
    def interrupt(self) -> None:
        for ref in self._running:
            self._ray.cancel(ref)  # raises KeyboardInterrupt in the task, which passes it on to its process
        self._ray.wait(list(self._running), num_returns=max(1, len(self._running)), timeout=_PATIENCE_S)
        self._running = {}

    def _code(self, ref: Any) -> int:
        try:
            return int(self._ray.get(ref))
        except self._ray.exceptions.RayError:
            return -int(signal.SIGKILL)  # the worker died: out of memory, or its node is gone


def check_reachable(address: str | None) -> None:
    """Refuse the address of a cluster at which nobody answers; Ray itself would try for minutes and end the process.

    Args:
        address: `HOST:PORT`, `ray://HOST:PORT`, or a name that Ray resolves ("auto", "local"), which is not checked.

    Raises:
        ConfigurationError: Nobody answers.
    """
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigurationError(
            f"Expected a Ray cluster at --address {address}, got: {error}. Start one with 'ray start --head', or give "
            "--address local."
        ) from None


def run_to_end(task: Task) -> int:
    """Run a task to its end on the machine that calls this, and return its exit code."""
    process = start(task)
    try:
        # Polled: Ray's interrupt is seen between two bytecodes only, not inside a wait.
        while process.poll() is None:
            time.sleep(_POLL_S)
        return int(process.returncode)
    except BaseException:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
        raise


def checked_jobs(jobs: int) -> int:
    """Return the number of jobs if there can be so many."""
    if jobs < 1:
        raise ConfigurationError(f"Expected --jobs >= 1, got {jobs}.")
    return jobs


def available_cpus() -> int:
    """Return the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def last_words(task: Task, code: int) -> str:
    """Return why a task failed, in one line: the last line of its standard error, or the signal that ended it."""
    try:
        lines = Path(f"{task.log}.err").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing on standard error")
    if code >= 0:
        return said.removeprefix("lightning-dp: error: ")
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
    hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"killed by {name}{hint}; its last line: {said}"

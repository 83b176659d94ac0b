"""Real processes over gloo, forked so that they start at once; each is set up as torchrun would."""

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PATIENCE_S = 280.0


@dataclass(frozen=True)
class Ending:
    """How a process ended.

    Attributes:
        value: What its function returned, or the error that it raised.
        error: Its traceback, "" if it returned, "killed" if it never answered.
    """

    value: Any
    error: str

    @property
    def is_error(self) -> bool:
        return bool(self.error)


def endings(size: int, function: Callable[..., Any], *args: Any, killed: tuple[int, ...] = ()) -> list[Ending]:
    """Run a function on every process of a group.

    Args:
        size: Number of processes.
        function: Called as `function(*args)` in each, with the group set up.
        args: Its arguments.
        killed: Processes that will kill themselves, and need not answer.
    """
    context, port = multiprocessing.get_context("fork"), free_port()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of a fork beside threads
        children = []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=_child, args=(theirs, rank, size, port, folder, function, args))
            child.start()
            theirs.close()
            children.append((child, ours))
        deadline, found = time.monotonic() + PATIENCE_S, []
        try:
            for rank, (_, pipe) in enumerate(children):
                found.append(_answer(pipe, deadline, rank, rank in killed))
        finally:
            for child, pipe in children:
                child.join(timeout=5)
                if child.is_alive():
                    child.kill()
                    child.join()
                pipe.close()
    return found


def values(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what each process returned; fail with the first traceback if one raised."""
    found = endings(size, function, *args)
    for ending in found:
        assert not ending.is_error, ending.error
    return [ending.value for ending in found]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _answer(pipe: Any, deadline: float, rank: int, may_die: bool) -> Ending:
    try:
        while not pipe.poll(0.05):
            if time.monotonic() > deadline:
                raise AssertionError(f"Process {rank} neither returned nor raised: it waits without end.")
        value, error = pickle.loads(pipe.recv_bytes())
    except EOFError:
        assert may_die, f"Process {rank} died without a word."
        return Ending(None, "killed")
    return Ending(value, error)


def _child(pipe: Any, rank: int, size: int, port: int, folder: str, function: Callable[..., Any], args: Any) -> None:
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(size)}
        | {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        | {"TORCHELASTIC_RUN_ID": "test"}
    )
    torch.set_num_threads(1)
    os.chdir(folder)
    try:
        if size > 1:
            store = torch.distributed.FileStore(str(Path(folder) / "store"), size)
            torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
        answer: tuple[Any, str] = function(*args), ""
    except BaseException as error:  # whatever it is, the parent is to know
        answer = _plain(error), traceback.format_exc()
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()
    os._exit(0)  # no clean-up of the parent's: pytest is in this process too


def _plain(error: BaseException) -> BaseException:
    try:
        pickle.dumps(error)
    except Exception:
        return RuntimeError(repr(error))
    return error

"""SLURM and torchrun over several machines, played on this one: the same variables, the same rendezvous."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy

from callbacks.private_ddp import check_strategy
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import ConfigurationError
from tests.cli.runs import TINY, read_json
from tests.conftest import TinyData, callbacks_for, tiny_gan, trainer_for
from tests.distributed.group import free_port
from tests.distributed.test_command_line import (
    PYTHON,
    clean_environment,
    command,
    end_group,
    is_anyone_left,
    wait_until,
)


def slurm_variables(task: int, *, nodes: int, tasks_per_node: int) -> dict[str, str]:
    """What srun tells a task of itself, as far as Lightning reads it."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": str(nodes * tasks_per_node),
        "SLURM_NTASKS_PER_NODE": str(tasks_per_node),
        "SLURM_NNODES": str(nodes),
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NODEID": str(task // tasks_per_node),
        "SLURM_LOCALID": str(task % tasks_per_node),
        "SLURM_PROCID": str(task),
    }


class AtStart(pl.Callback):
    """Notes who hears a signal while a run trains."""

    heard_by: object = None

    def on_train_batch_start(self, *_) -> None:
        self.heard_by = signal.getsignal(signal.SIGUSR1)


def test_a_job_that_slurm_takes_back_leaves_no_checkpoint(tmp_path, monkeypatch):
    """Lightning would write one, with all teachers, to the working folder, in the midst of a step."""
    for name, value in slurm_variables(0, nodes=1, tasks_per_node=1).items():
        monkeypatch.setenv(name, value)
    privatizer, accountant = callbacks_for()
    note = AtStart()
    trainer = trainer_for(tmp_path, [privatizer, accountant, note], 2)
    assert trainer._accelerator_connector.cluster_environment.auto_requeue  # what plain Lightning would do
    trainer.fit(tiny_gan(), datamodule=TinyData())
    assert note.heard_by in (signal.SIG_DFL, signal.SIG_IGN)


def all_end_well(starts: list[tuple[list[str], dict[str, str]]], folder: Path) -> None:
    """Start programs side by side, and see that each ends without an error.

    They write into files: a pipe would stay open as long as any child of theirs holds it. Whoever is not done in time
    says where each of its threads stands.
    """
    said = [folder / f"output{number}.txt" for number in range(len(starts))]
    running = []
    for (one, environment), file in zip(starts, said, strict=True):
        environment = {**environment, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        with file.open("w") as out:
            running.append(
                subprocess.Popen(one, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
            )

    def all_said() -> str:
        return "\n".join(f"{file.name}:\n{file.read_text()}" for file in said)

    try:
        ended = wait_until(lambda: all(p.poll() is not None for p in running) or any(p.poll() for p in running))
        for process in running:
            if not ended and is_anyone_left(process):
                os.killpg(process.pid, signal.SIGABRT)
                wait_until(lambda process=process: not is_anyone_left(process), 10)
        assert [process.poll() for process in running] == [0] * len(running), all_said()
    finally:
        for process in running:
            end_group(process)
            process.wait()


def made_by(run_dir, processes: int) -> bool:
    card = read_json(run_dir / "run_card.json")
    claim = read_json(run_dir / "claim.json")
    assert claim["level"] == "PROVED"
    assert len(PrivacyLedger.read(run_dir / "ledger.jsonl")) == claim["num_releases"] == 5
    return card["cost"]["processes"] == processes


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("nodes", "tasks_per_node"), [(2, 1), (1, 2)])
def test_slurm(tmp_path, nodes, tasks_per_node):
    run_dir = tmp_path / "run"
    flags = ("--config", TINY, "--run_dir", run_dir, "--evaluate", "false")
    flags = (*flags, "--trainer.devices", tasks_per_node, "--trainer.num_nodes", nodes)
    shared = clean_environment()
    tasks = [slurm_variables(task, nodes=nodes, tasks_per_node=tasks_per_node) for task in range(2)]
    all_end_well([(command(*flags, launcher=PYTHON), {**shared, **task}) for task in tasks], tmp_path)
    assert made_by(run_dir, 2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_on_two_machines(tmp_path):
    run_dir, port = tmp_path / "run", free_port()
    flags = ("--config", TINY, "--run_dir", run_dir, "--evaluate", "false")
    flags = (*flags, "--trainer.devices", 1, "--trainer.num_nodes", 2)
    where = ("--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}")
    torchrun = (sys.executable, "-m", "torch.distributed.run", *where)
    agents = [(*torchrun, f"--node_rank={node}", "-m", "lightning_dp") for node in range(2)]
    all_end_well([(command(*flags, launcher=agent), dict(os.environ)) for agent in agents], tmp_path)
    assert made_by(run_dir, 2)


@pytest.mark.parametrize("strategy", [DDPStrategy, FSDPStrategy])
def test_strategies_that_average_or_cut_are_refused(strategy):
    """Also on one process: what they do to gradients does not depend on it."""
    trainer = SimpleNamespace(strategy=strategy(parallel_devices=[torch.device("cpu")]), world_size=1)
    with pytest.raises(ConfigurationError, match=f"private_ddp.*{strategy.__name__}"):
        check_strategy(trainer)

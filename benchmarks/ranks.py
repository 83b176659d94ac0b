"""Measure what a step costs on 1, 2 and 4 processes, and the constants from which docs/scaling.md computes.

    python -m benchmarks.ranks [--quick] [--json PATH] [--write docs/performance.md]

Processes meet over gloo on this machine, one thread each. A step is one of `lightning-dp fit`: Lightning, ledger, noise
and all. On a machine with fewer cores than processes the clock says nothing, so CPU time is reported: of the busiest
process, which is what a step would take with a core for each, and of all together, whose growth is the overhead.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning_dp.evaluation.peak_memory import peak_resident_bytes

HEADING = "## Processes"
METHODS = ("records", "two optimizers", "energy teachers", "trained teachers", "joint")
SIZES = (1, 2, 4)
SUMMED = (1_000, 100_000, 1_000_000, 10_000_000)
PATIENCE_S = 900
_PLANNED = 2000  # a long run, of which a few steps are made: epsilon is computed now and then only


def _module(name: str) -> tuple[Any, Any, str]:
    """Return a method, its mechanism and its relation; sizes of real runs on a few thousand records."""
    import torch

    from lightning_dp.gradients.discriminator_teachers import DiscriminatorTeachers
    from lightning_dp.gradients.energy_teachers import EnergyTeachers
    from lightning_dp.mechanisms.gaussian import Gaussian
    from lightning_dp.mechanisms.topagg import TopAgg
    from lightning_dp.modules.dpgan import DPGAN
    from lightning_dp.modules.dpsgd import DPSGDClassifier
    from lightning_dp.modules.sinkhorn import DPSinkhorn
    from lightning_dp.modules.teacher_gan import TeacherEnsembleGAN
    from lightning_dp.networks.basis import LowFrequencyDCT
    from lightning_dp.networks.dct import DCTGenerator
    from lightning_dp.networks.small import MLPDiscriminator
    from lightning_dp.networks.tempered import TemperedCNN

    torch.manual_seed(0)
    shape = (1, 28, 28)
    if name == "records":
        return (
            DPSGDClassifier(TemperedCNN(activation="relu"), expected_batch_size=1024),
            Gaussian(),
            "add_or_remove_one",
        )
    generator = DCTGenerator(shape)
    if name == "two optimizers":
        critic = MLPDiscriminator(shape, num_classes=10, width=256)
        return DPGAN(generator, critic, expected_batch_size=1024, critic_ladder=(2,)), Gaussian(), "add_or_remove_one"
    if name == "joint":
        return DPSinkhorn(generator, expected_batch_size=100), Gaussian(), "add_or_remove_one"
    if name == "energy teachers":
        gan = TeacherEnsembleGAN(generator, EnergyTeachers(), LowFrequencyDCT(shape, 78), images_per_step=100)
        return gan, TopAgg(rotate=True, output="votes"), "replace_one"
    teachers = DiscriminatorTeachers("mlp", num_teachers=200, batch_size=20)
    return TeacherEnsembleGAN(generator, teachers, images_per_step=30), TopAgg(top_k=200), "replace_one"


def step_seconds(name: str, steps: int) -> dict[str, float]:
    """Return CPU seconds of a step on this process, as one of its group: the median of `steps`."""
    return _timed(*_module(name), steps=steps)


def _timed(module: Any, mechanism: Any, relation: str, *, steps: int) -> dict[str, float]:
    import pytorch_lightning as pl

    from callbacks import GradientPrivatizer, PrivacyAccountant
    from callbacks.private_ddp import STRATEGY
    from datamodules import EmbeddedDigits
    from lightning_dp.accounting.settings import PrivacySettings

    taken: list[float] = []

    class Clock(pl.Callback):
        """Notes the CPU time at the beginning of each step, and ends the run after a few."""

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            taken.append(time.process_time())
            trainer.should_stop = len(taken) > steps + 1

    settings = PrivacySettings(neighboring_relation=relation, target_epsilon=None, noise_multiplier=10.0)
    with tempfile.TemporaryDirectory() as folder:
        accountant = PrivacyAccountant(privacy=settings, ledger_path=Path(folder) / "ledger.jsonl")
        privatizer = GradientPrivatizer(mechanism=mechanism, accountant=accountant)
        size = int(os.environ["WORLD_SIZE"])
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=size,
            strategy=STRATEGY if size > 1 else "auto",
            max_steps=_PLANNED,
            max_epochs=-1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[privatizer, accountant, Clock()],
        )
        trainer.fit(module, datamodule=EmbeddedDigits())
    steps_taken = [after - before for before, after in pairwise(taken[1:])]  # the first one pretrains
    return {"cpu_s": statistics.median(steps_taken), "peak_bytes": float(peak_resident_bytes())}


def constants(repeats: int) -> dict[str, float]:
    """Return rates: draws and checksums of one process; sums and words of a group."""
    import torch

    from lightning_dp.gradients.poisson import PoissonSampler
    from lightning_dp.gradients.ranks import Ranks, checksum
    from lightning_dp.mechanisms.noise import NoiseSource

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ranks, found = Ranks(rank, size), {}
    if size == 1:
        noise, values = NoiseSource(), torch.rand(1_000_000)
        found["noise_per_s"] = 1e6 / _fastest(lambda: noise.gaussian((1_000_000,), std=1.0, release_number=1), repeats)
        found["checksum_bytes_per_s"] = 4e6 / _fastest(lambda: checksum([values]), repeats)
        sampler = PoissonSampler(1_000_000, rate=1e-3)
        found["coins_per_s"] = 1e6 / _fastest(sampler.draw, repeats)
        doubles = torch.rand(1_000_000, dtype=torch.float64)
        found["copy_bytes_per_s"] = 16e6 / _fastest(lambda: doubles.clone(), repeats)
        return found
    import torch.distributed as dist

    dist.init_process_group("gloo")
    found["word_s"] = _fastest(lambda: ranks.same([torch.zeros(1)]), 10 * repeats)
    for number in SUMMED:
        total = torch.zeros(number, dtype=torch.float64)
        found[f"sum_{number}_s"] = _fastest(lambda total=total: ranks.sum(total), repeats)
    return found


def dense_step(width: int, batch: int) -> dict[str, float]:
    """Return parameters, peak memory and CPU seconds of a DP-SGD step (Adam) of a dense network on this process."""
    import torch
    from torch import nn

    from lightning_dp.mechanisms.gaussian import Gaussian
    from lightning_dp.modules.dpsgd import DPSGDClassifier
    from lightning_dp.networks.classifier import Classifier

    class Dense(Classifier):
        """Two hidden layers of one width."""

        def __init__(self) -> None:
            super().__init__()
            self.image_shape, self.num_classes = (1, 28, 28), 10
            hidden = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
            self.body = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))

        def forward(self, images: Any) -> Any:
            return self.body(images)

    torch.manual_seed(0)
    module = DPSGDClassifier(Dense(), expected_batch_size=batch, optimizer="adam")
    found = _timed(module, Gaussian(), "add_or_remove_one", steps=4)
    return {**found, "parameters": float(sum(p.numel() for p in module.network.parameters()))}


def _fastest(function: Callable[[], Any], repeats: int) -> float:
    """Return seconds: of CPU on one process, by the clock in a group, whose processes wait for each other."""
    clock = time.process_time if os.environ["WORLD_SIZE"] == "1" else time.perf_counter
    taken = []
    for _ in range(repeats):
        start = clock()
        function()
        taken.append(clock() - start)
    return min(taken)


def in_group(size: int, task: list[Any]) -> list[dict[str, float]]:
    """Return what each process of a group finds."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "GROUP_RANK": "0"}
    shared |= {"MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "benchmark", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.ranks", "--worker", json.dumps(task)]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    found = []
    for process in processes:
        out, err = process.communicate(timeout=PATIENCE_S)
        if process.returncode:
            raise RuntimeError(f"{task} on {size} processes: {err.strip().splitlines()[-1]}")
        found.append(json.loads(out.splitlines()[-1]))
    return found


def measure(*, quick: bool) -> dict[str, Any]:
    """Return all numbers of the section."""
    steps, sizes = (6, (1, 2)) if quick else (12, SIZES)
    lines = []
    for name in METHODS:
        for size in sizes:
            found = in_group(size, ["step", name, steps])
            busiest, together = max(f["cpu_s"] for f in found), sum(f["cpu_s"] for f in found)
            peak = max(f["peak_bytes"] for f in found)
            lines.append({"method": name, "size": size, "busiest_s": busiest, "all_s": together, "peak_bytes": peak})
            print(f"{name}, {size} processes: {1e3 * busiest:.1f} ms", file=sys.stderr, flush=True)
    rates = {str(size): in_group(size, ["constants", 5 if quick else 20])[0] for size in sizes}
    widths = (300, 1000) if quick else (300, 5000)
    small, large = (in_group(1, ["dense", width, 16])[0] for width in widths)
    few, many = (in_group(1, ["dense", 1000, batch])[0] for batch in (32, 512))
    added = large["parameters"] - small["parameters"]
    rates["1"] |= {
        "bytes_per_parameter": (large["peak_bytes"] - small["peak_bytes"]) / added,
        "s_per_parameter": (large["cpu_s"] - small["cpu_s"]) / added,
        "s_per_record_and_parameter": (many["cpu_s"] - few["cpu_s"]) / 480 / many["parameters"],
    }
    return {"lines": lines, "constants": rates}


def section(found: dict[str, Any], when: str) -> str:
    """Return the section of docs/performance.md."""
    out = [
        HEADING,
        "",
        f"`python -m benchmarks.ranks` ({when}). CPU ms of a step, Lightning, ledger and noise included:",
        "",
    ]
    sizes = sorted({line["size"] for line in found["lines"]})
    out += ["| method | " + " | ".join(f"{s} (all together)" for s in sizes) + " | peak MB of one process |"]
    out += ["|---" * (len(sizes) + 2) + "|"]
    for name in dict.fromkeys(line["method"] for line in found["lines"]):
        mine = {line["size"]: line for line in found["lines"] if line["method"] == name}
        cells = [f"{1e3 * mine[s]['busiest_s']:.1f} ({1e3 * mine[s]['all_s']:.1f})" for s in sizes]
        peaks = " / ".join(f"{mine[s]['peak_bytes'] / 1e6:.0f}" for s in sizes)
        out.append(f"| {name} | " + " | ".join(cells) + f" | {peaks} |")
    alone = found["constants"]["1"]
    out += ["", "| constant (one process: CPU time; more: by the clock) | |", "|---|---|"]
    out += [f"| noise, float64 draws | {alone['noise_per_s'] / 1e6:.0f} million/s |"]
    out += [f"| coins of records | {alone['coins_per_s'] / 1e6:.0f} million/s |"]
    out += [f"| checksum | {alone['checksum_bytes_per_s'] / 1e9:.2f} GB/s |"]
    out += [f"| a step of DP-SGD with Adam, memory per parameter | {alone['bytes_per_parameter']:.0f} bytes |"]
    out += [f"| the same, time per parameter (16 records) | {1e9 * alone['s_per_parameter']:.0f} ns |"]
    per_record = 1e12 * alone["s_per_record_and_parameter"]
    out += [f"| gradient, norm and sum of a record, per parameter of dense layers | {per_record:.0f} ps |"]
    out += [f"| copy | {alone['copy_bytes_per_s'] / 1e9:.1f} GB/s |"]
    for size in sizes[1:]:
        rates = found["constants"][str(size)]
        sums = ", ".join(f"{n:,}: {1e3 * rates[f'sum_{n}_s']:.2f}" for n in SUMMED)
        out += [f"| {size} processes: one word from each, ms | {1e3 * rates['word_s']:.2f} |"]
        out += [f"| {size} processes: sum of so many doubles, ms | {sums} |"]
    return "\n".join(out) + "\n"


def write_section(path: Path, text: str) -> None:
    """Replace the section in a file, or append it; notes below its last table stay, for whoever wrote them to mend."""
    before, found, after = path.read_text().partition(HEADING)
    own, heading, rest = after.partition("\n## ")
    lines = own.split("\n")
    tables = [number for number, line in enumerate(lines) if line.startswith("|")]
    notes = "\n".join(lines[tables[-1] + 1 :]).strip("\n") if tables else ""
    text += f"\n{notes}\n" if notes else ""
    path.write_text((before if found else before.rstrip("\n") + "\n\n") + text + heading + rest)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two processes at most, six steps")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    parser.add_argument("--write", type=Path, metavar="PATH", help="replace the section in this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        kind, *task = json.loads(options.worker)
        print(json.dumps({"step": step_seconds, "dense": dense_step, "constants": constants}[kind](*task)))
        return 0
    found = measure(quick=options.quick)
    text = section(found, time.strftime("%Y-%m-%d") + f", {os.cpu_count()} cores, one thread a process")
    print(text)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    if options.write:
        write_section(options.write, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

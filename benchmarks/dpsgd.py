"""Compare a step of DP-SGD with Opacus and with plain SGD: samples per CPU second and peak memory.

    python -m benchmarks.dpsgd [--quick] [--json PATH] [--networks small_cnn,mlp] [--batch N] [--device cpu]

A step is: per-record gradients of a batch, flat clipping, one sum, Gaussian noise, SGD. Ours is what `DPSGDClassifier`
does by default, double-precision sums and noise from the operating system's secret included. `hooks` and `ghost` are
Opacus' modes on the whole batch, `sgd` is one backward pass of the mean loss. Each method runs in processes of its own,
with one thread, whose peak resident memory is reported; memory that is freed stays with it, as under the command line.
Processes of the methods alternate, and the fastest step of each counts. Compare numbers of one run only: other work on
the machine moves them.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.clock import now, peak_bytes
from benchmarks.tables import Table

METHODS = ("sgd", "ours", "hooks", "ghost")
# Records of a step: what Opacus' hooks hold of the largest networks in a few GB.
NETWORKS = {"small_cnn": 512, "conv": 512, "mlp": 512, "wrn_16_4": 64}
MAX_GRAD_NORM, NOISE_MULTIPLIER, LEARNING_RATE = 1.0, 1.0, 0.05
SECONDS_PER_PROCESS = 4.0
RATIOS = {
    "ours, times SGD": "times_sgd",
    "speed to the best peer": "speed_to_best_peer",
    "memory to the leanest peer": "memory_to_leanest_peer",
}


def _network(name: str) -> tuple[Any, tuple[int, int, int]]:
    from torch import nn

    from lightning_dp.networks.classifiers import ConvClassifier
    from lightning_dp.networks.tempered import TemperedCNN
    from lightning_dp.networks.wide_resnet import WideResNet

    if name == "wrn_16_4":
        return WideResNet(), (3, 32, 32)
    if name == "conv":
        return ConvClassifier((1, 28, 28), 10), (1, 28, 28)
    if name == "mlp":
        layers = [nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10)]
        return nn.Sequential(nn.Flatten(), *layers), (1, 28, 28)
    return TemperedCNN(activation="relu"), (1, 28, 28)


def _plain(network: Any, images: Any, labels: Any) -> Callable[[], None]:
    import torch
    import torch.nn.functional as F

    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def _ours(network: Any, images: Any, labels: Any, mode: str = "auto") -> Callable[[], None]:
    import torch
    from dp_accounting import NeighboringRelation

    from lightning_dp.gradients.per_record import row_segments
    from lightning_dp.gradients.source import GradientSource
    from lightning_dp.mechanisms.base import ContributionSpec, ReleasePlan
    from lightning_dp.mechanisms.gaussian import Gaussian
    from lightning_dp.mechanisms.noise import NoiseSource
    from lightning_dp.modules.dpsgd import mean_cross_entropy
    from lightning_dp.modules.release import rows_where_needed

    segments = row_segments(network)
    spec = ContributionSpec.records(expected_batch_size=len(images), vector_dim=sum(segments), segments=segments)
    plan = ReleasePlan(spec=spec, relation=NeighboringRelation.ADD_OR_REMOVE_ONE, noise_multiplier=NOISE_MULTIPLIER)
    mechanism, noise = Gaussian(max_grad_norm=MAX_GRAD_NORM), NoiseSource()
    source = GradientSource(mode, None)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)
    parameters = list(network.parameters())
    views, steps = images.unsqueeze(1), iter(range(1, 10**6))

    def step() -> None:
        optimizer.zero_grad()
        total = torch.zeros(1, spec.vector_dim, dtype=torch.float64, device=images.device)
        at_once = source.records_at_once(network, mean_cross_entropy, (views, labels))
        for ids in torch.arange(len(images), device=images.device).split(at_once):
            chunks = source.gradients(network, mean_cross_entropy, (views[ids], labels[ids]), ids=ids)
            if next(rows_where_needed(chunks, mechanism, spec, total), None) is not None:
                raise RuntimeError("Flat clipping needs norms alone, but rows were formed.")
        number = next(steps)
        released = mechanism.release(total, plan, noise, release_number=number, public_seed=0, may_overwrite=True)
        for parameter, part in zip(parameters, released.flatten().split(list(segments)), strict=True):
            parameter.grad = part.view_as(parameter)
        optimizer.step()

    return step


def _opacus(network: Any, images: Any, labels: Any, mode: str) -> Callable[[], None]:
    import torch
    from opacus.grad_sample.utils import wrap_model
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    is_ghost = mode == "ghost"
    options = {"max_grad_norm": MAX_GRAD_NORM} if is_ghost else {}
    wrapped = wrap_model(network, grad_sample_mode=mode, loss_reduction="mean", **options)
    inner = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)
    optimizer = (DPOptimizerFastGradientClipping if is_ghost else DPOptimizer)(
        inner,
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=MAX_GRAD_NORM,
        expected_batch_size=len(images),
        loss_reduction="mean",
    )
    loss: Any = torch.nn.CrossEntropyLoss()
    if is_ghost:
        loss = DPLossFastGradientClipping(wrapped, optimizer, loss, "mean")

    def step() -> None:
        optimizer.zero_grad()
        loss(wrapped(images), labels).backward()
        optimizer.step()

    return step


def measure(name: str, method: str, batch: int, seconds: float, device: str = "cpu") -> dict[str, Any]:
    """Return the fastest step and the peak memory of one method in this process."""
    import warnings

    import torch

    from lightning_dp.cli.memory import keep_freed_memory

    keep_freed_memory()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network, shape = _network(name)
    network = network.to(device)
    images, labels = torch.rand(batch, *shape, device=device), torch.arange(batch, device=device) % 10
    if method == "sgd":
        step = _plain(network, images, labels)
    elif method == "ours":
        step = _ours(network, images, labels)
    else:
        step = _opacus(network, images, labels, method)
    start_bytes = peak_bytes(device)
    steps: list[float] = []
    while len(steps) < 3 or (sum(steps) < seconds and len(steps) < 100):
        start = now(device)
        step()
        steps.append(now(device) - start)
    peak = peak_bytes(device)
    best = min(steps)
    return {"samples_per_s": batch / best, "step_s": best, "peak_bytes": peak, "step_bytes": peak - start_bytes}


def measure_apart(name: str, method: str, batch: int, seconds: float, device: str) -> dict[str, Any] | None:
    """Return what `measure` finds in a fresh process with one thread; None where the method refuses the network."""
    task = json.dumps([name, method, batch, seconds, device])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.dpsgd", "--worker", task]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"{name}, {method}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr, flush=True)
        return None
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(name: str, batch: int, *, processes: int, seconds: float, device: str = "cpu") -> dict[str, Any]:
    """Return one line of the table."""
    found: dict[str, dict[str, Any]] = {}
    for _ in range(processes):
        for method in METHODS:
            new = measure_apart(name, method, batch, seconds, device)
            if new is not None and (method not in found or new["step_s"] < found[method]["step_s"]):
                found[method] = new
    peers = [found[method] for method in ("hooks", "ghost") if method in found]
    return {
        "network": name,
        "batch": batch,
        **found,
        "times_sgd": found["ours"]["step_s"] / found["sgd"]["step_s"],
        "speed_to_best_peer": found["ours"]["samples_per_s"] / max(peer["samples_per_s"] for peer in peers),
        "memory_to_leanest_peer": found["ours"]["step_bytes"] / min(peer["step_bytes"] for peer in peers),
    }


def run(*, quick: bool, device: str = "cpu") -> Table:
    """Return the table of all networks."""
    processes, seconds = (1, 1.0) if quick else (2, SECONDS_PER_PROCESS)
    lines = [
        compare(name, batch, processes=processes, seconds=seconds, device=device) for name, batch in NETWORKS.items()
    ]
    return table(lines, device=device)


def table(lines: list[dict[str, Any]], *, device: str = "cpu") -> Table:
    """Return lines of `compare` as a table."""
    return Table(
        name="dpsgd",
        title="A step of DP-SGD, samples per CPU second and the memory that steps add",
        columns=["network", "batch", "plain SGD", "ours", "Opacus hooks", "Opacus ghost", *RATIOS],
        rows=[
            [
                line["network"],
                str(line["batch"]),
                *(
                    f"{line[method]['samples_per_s']:,.0f}, {line[method]['step_bytes'] / 1e6:,.0f} MB"
                    if method in line
                    else "refuses"
                    for method in METHODS
                ),
                *(f"{line[name]:.2f}" for name in RATIOS.values()),
            ]
            for line in lines
        ],
        targets={
            "at least as fast as the best mode of Opacus": all(line["speed_to_best_peer"] >= 1 for line in lines),
            "never above the memory of the leanest": all(line["memory_to_leanest_peer"] <= 1 for line in lines),
        },
        device=device,
    )


def print_table(lines: list[dict[str, Any]]) -> None:
    """Print the lines as a table; a network on which a peer is faster is red."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="A step of DP-SGD: samples per CPU second, and the memory that steps add")
    for heading in ("network", "batch", *METHODS, "times sgd", "to best peer", "memory to leanest"):
        table.add_column(heading, justify="right")
    for line in lines:
        cells = [line["network"], str(line["batch"])]
        for method in METHODS:
            found = line.get(method)
            shown = f"{found['samples_per_s']:,.0f}, {found['step_bytes'] / 1e6:,.0f} MB" if found else "refuses"
            cells.append(shown)
        color = "green" if line["speed_to_best_peer"] >= 1 else "red"
        cells += [f"{line['times_sgd']:.2f}", f"[{color}]{line['speed_to_best_peer']:.2f}[/]"]
        table.add_row(*cells, f"{line['memory_to_leanest_peer']:.2f}")
    Console(width=140).print(table)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit code is 1 when a peer is faster on some network."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dpsgd", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one process of each method, a second each")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--batch", type=int, help="records of a step, instead of the network's own")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(measure(*json.loads(options.worker))))
        return 0
    lines = []
    for name in options.networks.split(","):
        processes, seconds = (1, 1.0) if options.quick else (2, SECONDS_PER_PROCESS)
        batch = options.batch or NETWORKS[name]
        lines.append(compare(name, batch, processes=processes, seconds=seconds, device=options.device))
        print(f"{name}: done", file=sys.stderr, flush=True)
    print_table(lines)
    if options.json:
        options.json.write_text(json.dumps({"lines": lines}, indent=2) + "\n")
    return 0 if all(line["speed_to_best_peer"] >= 1 for line in lines) else 1


if __name__ == "__main__":
    raise SystemExit(main())

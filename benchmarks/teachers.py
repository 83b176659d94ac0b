"""Compare the loop and the stacked backend of discriminator teachers: speed, peak memory, and the automatic choice.

    python -m benchmarks.teachers [--quick] [--json PATH] [--networks mlp,small_conv] [--teachers 50,200] [--device cpu]

One round is one Adam step of every teacher on B real and B fake images, then every teacher's rows for B fakes. Samples
per second count T * B per round; B is that of a full MNIST run, min(30, 60000 // T). Each backend runs in a process of
its own, whose peak resident memory is reported; processes of the two backends alternate, and the fastest round counts
(the first one of a process also builds kernels). Compare numbers of one run only: times are CPU seconds of one thread
(seconds on a GPU), and other work on the machine still moves them.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.clock import now, peak_bytes
from benchmarks.tables import Table

NUM_RECORDS, MAX_BATCH, CLASSES, IMAGE_SHAPE = 60_000, 30, 10, (1, 28, 28)
BACKENDS = ("loop", "stacked")
PROCESSES = {50: 2, 200: 2, 1000: 2, 4000: 1}  # of each backend
SECONDS_PER_PROCESS = 4.0
WITHIN = 2.0  # times what their multiplications take in one large matrix product
TOLERANCE = 0.9  # the automatic choice reaches this share of the better backend's speed


def measure(
    network: str, num_teachers: int, backend: str, batch: int, device_name: str, seconds: float
) -> dict[str, Any]:
    """Return the fastest round and the peak memory of one backend in this process."""
    import torch

    from lightning_dp.gradients.discriminator_teachers import DiscriminatorTeachers
    from lightning_dp.gradients.teachers import TeacherShards

    device, source = torch.device(device_name), torch.Generator().manual_seed(0)
    num_records = num_teachers * batch
    images = torch.randint(0, 256, (num_records, *IMAGE_SHAPE), generator=source, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (num_records,), generator=source)
    shards = TeacherShards(images, labels, torch.arange(num_records) % num_teachers, num_teachers)
    teachers = DiscriminatorTeachers(
        network,  # type: ignore[arg-type]
        num_teachers=num_teachers,
        backend=backend,  # type: ignore[arg-type]
        batch_size=batch,
        pretrain_steps=1,
        train_steps=1,
    )
    teachers.bind(shards, num_classes=CLASSES, image_shape=IMAGE_SHAPE, device=device, seed=0)
    table = torch.rand(batch * CLASSES, *IMAGE_SHAPE, generator=source).to(device)
    queries = (torch.arange(batch) % CLASSES).to(device)
    total = float(num_teachers)  # keeps the rows from being dropped unread
    rounds: list[float] = []
    while len(rounds) < 2 or (sum(rounds) < seconds and len(rounds) < 50):
        start = now(device_name)
        teachers.train(lambda labels: table, step=len(rounds))
        for chunk in teachers.row_chunks(table[:batch], queries):
            total += float(chunk.values[0, 0, 0])
        rounds.append(now(device_name) - start)
    peak, best = peak_bytes(device_name), min(rounds)
    return {"samples_per_s": num_teachers * batch / best, "round_s": best, "peak_bytes": peak, "rounds": len(rounds)}


def measure_apart(
    network: str, num_teachers: int, backend: str, batch: int, device: str, seconds: float
) -> dict[str, Any]:
    """Return what `measure` finds in a fresh process with one thread."""
    task = json.dumps([network, num_teachers, backend, batch, device, seconds])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.teachers", "--worker", task]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(
    network: str, num_teachers: int, batch: int, device: str, *, processes: int, seconds: float
) -> dict[str, Any]:
    """Return one line of the table: both backends, and how near the automatic choice comes to the better."""
    import torch

    from lightning_dp.gradients.discriminator_teachers import choose_backend

    found: dict[str, dict[str, Any]] = {}
    for _ in range(processes):
        for backend in BACKENDS:
            new = measure_apart(network, num_teachers, backend, batch, device, seconds)
            if backend not in found or new["round_s"] < found[backend]["round_s"]:
                found[backend] = new
    chosen = choose_backend(network, torch.device(device))
    best = max(result["samples_per_s"] for result in found.values())
    return {
        "network": network,
        "num_teachers": num_teachers,
        "batch": batch,
        **found,
        "automatic": chosen,
        "automatic_to_better": found[chosen]["samples_per_s"] / best,
    }


def matmul_seconds(network: str, batch: int, device_name: str) -> float:
    """Return the seconds that the multiplications of one teacher's round take in one large matrix product.

    Args:
        network: Of every teacher.
        batch: B.
        device_name: cpu or cuda.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    from benchmarks.releases import fastest
    from lightning_dp.gradients.discriminator_teachers import NETWORKS
    from lightning_dp.gradients.teacher_backends import LoopBackend

    judge = NETWORKS[network](IMAGE_SHAPE, CLASSES)
    own = {name: parameter.detach()[None].clone() for name, parameter in judge.named_parameters()}
    images, one_hot = torch.rand(1, 2 * batch, *IMAGE_SHAPE), torch.eye(CLASSES)[torch.arange(batch) % CLASSES][None]
    counted = [0]

    class Counting(TorchDispatchMode):
        """Adds up operations; FlopCounterMode hooks modules too, which `autograd.grad` does not allow."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket in flop_registry:
                counted[0] += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
            return result

    with Counting():
        LoopBackend(judge).training_gradients(own, images, one_hot)
        LoopBackend(judge).descent_directions(own, images[0, :batch], one_hot[0])
    size = 1024 if device_name == "cpu" else 8192  # smaller ones leave most of a GPU idle
    square = torch.rand(size, size, device=device_name)
    return counted[0] / (2 * size**3) * fastest(lambda: square @ square, seconds=1.0, device=device_name)


def run(*, quick: bool, device: str = "cpu") -> Table:
    """Return the table of both networks at several numbers of teachers."""
    rows, is_near, within = [], True, True
    for network in ("mlp", "small_conv"):
        for num_teachers in (50, 200) if quick else tuple(PROCESSES):
            batch = min(MAX_BATCH, NUM_RECORDS // num_teachers)
            seconds, processes = (2.0, 1) if quick else (SECONDS_PER_PROCESS, PROCESSES[num_teachers])
            line = compare(network, num_teachers, batch, device, processes=processes, seconds=seconds)
            chosen = line[line["automatic"]]
            over = chosen["round_s"] / num_teachers / matmul_seconds(network, batch, device)
            is_near = is_near and line["automatic_to_better"] >= TOLERANCE
            within = within and (network != "mlp" or over <= WITHIN)
            rows.append(
                [
                    network,
                    f"{num_teachers:,}",
                    str(batch),
                    *(f"{line[one]['samples_per_s']:,.0f}, {line[one]['peak_bytes'] / 1e9:.2f} GB" for one in BACKENDS),
                    line["automatic"],
                    f"{line['automatic_to_better']:.2f}",
                    f"{over:.2f}",
                ]
            )
    return Table(
        name="teachers",
        title="Teacher backends, samples per CPU second and peak memory",
        columns=["network", "teachers", "B", *BACKENDS, "automatic", "to the better", "times one large matrix product"],
        rows=rows,
        targets={
            "the automatic choice within 1.1 times the better": is_near,
            f"dense teachers within {WITHIN:g} times the time of one large matrix product": within,
        },
        device=device,
    )


def print_table(lines: list[dict[str, Any]]) -> None:
    """Print the lines as a table; a choice that misses the tolerance is red."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Discriminator teachers on images of {IMAGE_SHAPE}")
    for heading in ("network", "teachers", "B"):
        table.add_column(heading)
    for backend in BACKENDS:
        table.add_column(f"{backend} samples/s", justify="right")
        table.add_column("peak GB", justify="right")
    table.add_column("automatic")
    table.add_column("to better", justify="right")
    for line in lines:
        cells = [line["network"], str(line["num_teachers"]), str(line["batch"])]
        for backend in BACKENDS:
            cells += [f"{line[backend]['samples_per_s']:,.0f}", f"{line[backend]['peak_bytes'] / 1e9:.2f}"]
        ratio = line["automatic_to_better"]
        color = "green" if ratio >= TOLERANCE else "red"
        table.add_row(*cells, line["automatic"], f"[{color}]{ratio:.2f}[/]")
    Console(width=120).print(table)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit code is 1 when an automatic choice misses the tolerance."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.teachers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="50 and 200 teachers, about half a minute")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    parser.add_argument("--networks", default="mlp,small_conv")
    parser.add_argument("--teachers", default=None, help="numbers of teachers, with commas")
    parser.add_argument("--batch", type=int, help="records per teacher and round, instead of min(30, 60000 // T)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(measure(*json.loads(options.worker))))
        return 0
    sizes = options.teachers or ("50,200" if options.quick else ",".join(map(str, PROCESSES)))
    lines = []
    for network in options.networks.split(","):
        for num_teachers in map(int, sizes.split(",")):
            processes = 1 if options.quick else PROCESSES.get(num_teachers, 1)
            seconds = 2.0 if options.quick else SECONDS_PER_PROCESS
            batch = options.batch or min(MAX_BATCH, NUM_RECORDS // num_teachers)
            lines.append(compare(network, num_teachers, batch, options.device, processes=processes, seconds=seconds))
            print(f"{network}, {num_teachers} teachers: done", file=sys.stderr, flush=True)
    print_table(lines)
    if options.json:
        options.json.write_text(json.dumps({"device": options.device, "lines": lines}, indent=2) + "\n")
    return 0 if all(line["automatic_to_better"] >= TOLERANCE for line in lines) else 1


if __name__ == "__main__":
    raise SystemExit(main())

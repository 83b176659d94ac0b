"""Fill the GPU columns of docs/performance.md, and see whether the three aims for a GPU are met, within some minutes.

    python -m benchmarks.gpu [--minutes 13] [--out gpu-results]

Nothing is fetched: MNIST lies in `data/` or LIGHTNING_DP_DATA. Steps run one after another, each in processes of its
own, the most telling first; what does not fit the time is left out and said so. A step's numbers are on disk as soon
as it is done, so a run that is cut off keeps them.

1. stacked teachers against the loop, 4000 DataLens teachers: aim 50 times;
2. `datalens_mnist.yaml`, paper scale, epsilon 1, training alone: aim 3 minutes;
3. `dpgan_mnist.yaml`, some hundred releases of its 174,000, computed on: aim 1 hour and 8 GB of GPU memory;
4. short runs of every method on this GPU and on its host: how far parameters are apart;
5. `python -m benchmarks --device cuda --quick`, one table after another, into a copy of docs/performance.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEACHERS, BATCH = 4000, 15
DPGAN_STEPS, DPGAN_PLANNED = 600, 174_000
AIMS = {"loop": 50.0, "datalens_s": 180.0, "dpgan_s": 3600.0, "dpgan_gb": 8.0}
TABLES = ("teachers", "dpsgd", "releases", "sinkhorn", "overhead", "growth")
LEAST_S = 20.0  # less is not worth a start

Numbers = dict[str, Any]


def teachers_against_loop(patience_s: float) -> Numbers:
    """Return seconds of a round of 4000 DataLens teachers, stacked and one by one."""
    found = {}
    for backend in ("stacked", "loop"):
        task = json.dumps(["datalens", TEACHERS, backend, BATCH, "cuda", 5.0])
        out = _python(["-m", "benchmarks.teachers", "--worker", task], patience_s)
        found[backend] = json.loads(out.splitlines()[-1])
    ratio = found["loop"]["round_s"] / found["stacked"]["round_s"]
    return {**found, "times_the_loop": ratio, "met": ratio >= AIMS["loop"]}


def fit(config: str, patience_s: float, *flags: str) -> Numbers:
    """Return cost and claim of a run of the command line on the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--trainer.accelerator", "gpu", "--evaluate", "false", "--checkpoint_every", "1000000"]
        where = ["--config", f"configs/experiment/{config}", "--run_dir", f"{folder}/run", "--wandb", "disabled"]
        _python(["-m", "lightning_dp", "fit", *where, *fixed, *flags], patience_s)
        card = json.loads((Path(folder) / "run" / "run_card.json").read_text())
        return {"cost": card["cost"], "claim": card["claim_statement"], "releases": card["budget"]["releases"]}


def datalens(patience_s: float) -> Numbers:
    """Return the time of DataLens at the scale of its paper."""
    found = fit("datalens_mnist.yaml", patience_s)
    return {**found, "met": found["cost"]["train_time_s"] <= AIMS["datalens_s"]}


def dpgan(patience_s: float) -> Numbers:
    """Return what DP-GAN of the paper's scale would take, from some of its releases, and its memory."""
    found = fit("dpgan_mnist.yaml", patience_s, "--trainer.max_steps", str(DPGAN_STEPS))
    whole_s = found["cost"]["train_time_s"] / found["releases"] * DPGAN_PLANNED
    gigabytes = found["cost"]["peak_device_memory_mb"] / 1e3
    is_met = whole_s <= AIMS["dpgan_s"] and gigabytes <= AIMS["dpgan_gb"]
    return {**found, "whole_run_s": whole_s, "peak_gb": gigabytes, "met": is_met}


def against_host(patience_s: float) -> Numbers:
    """Return how far parameters are apart after a few releases on GPU and CPU, by method."""
    out = _python(["-m", "tests.devices.play", "--device", "cuda"], patience_s)
    differences: Numbers = json.loads(out.splitlines()[-1])
    return differences


def tables(name: str, out: Path) -> Callable[[float], Numbers]:
    """Return what makes one table of the document."""

    def make(patience_s: float) -> Numbers:
        where = ["--json", str(out / f"table_{name}.json"), "--docs", str(out / "performance.md")]
        options = ["--device", "cuda", "--quick", "--only", name, *where]
        _python(["-m", "benchmarks", *options], patience_s, codes=(0, 1))
        return {"table": json.loads((out / f"table_{name}.json").read_text())}

    return make


def _python(arguments: list[str], patience_s: float, codes: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=max(1.0, patience_s))
    if done.returncode not in codes:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])
    return done.stdout


def measure(steps: dict[str, Callable[[float], Numbers]], out: Path, minutes: float) -> dict[str, Numbers]:
    """Run steps while there is time, and write what each found.

    Args:
        steps: By name; called with the seconds that are left.
        out: A folder.
        minutes: In all.
    """
    end, found = time.monotonic() + 60 * minutes, {}
    for name, step in steps.items():
        left = end - time.monotonic()
        start = time.monotonic()
        try:
            found[name] = step(left) if left >= LEAST_S else {"left_out": "no time"}
        except subprocess.TimeoutExpired:
            found[name] = {"left_out": f"not done after {left:.0f} s"}
        except Exception as error:  # the others are worth having
            found[name] = {"failed": str(error)}
        found[name]["wall_s"] = time.monotonic() - start
        (out / "gpu.json").write_text(json.dumps(found, indent=2) + "\n")
        print(f"{name}: {json.dumps({k: v for k, v in found[name].items() if k != 'table'})}", flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run all steps; the exit code is 1 when an aim is missed or a step failed."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=13.0, help="in all")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), metavar="DIR", help="where numbers go")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no GPU that this PyTorch can use")
    options.out.mkdir(parents=True, exist_ok=True)
    shutil.copy("docs/performance.md", options.out / "performance.md")
    steps: dict[str, Callable[[float], Numbers]] = {
        "teachers against the loop": teachers_against_loop,
        "datalens": datalens,
        "dpgan": dpgan,
        "against the host": against_host,
        **{f"table {name}": tables(name, options.out) for name in TABLES},
    }
    found = measure(steps, options.out, options.minutes)
    return int(any("failed" in numbers or numbers.get("met") is False for numbers in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())

"""Compute docs/scaling.md's table: a run too large for this machine, from constants measured on it.

    python -m benchmarks.ranks --json ranks.json && python -m benchmarks.scaling ranks.json

Formulae, for N records, D parameters, B records expected in a step and W processes (docs/scaling.md explains them):

    gradients   B / W * D * g            g: seconds per record and parameter, dense layers
    replicated  D * f                    f: seconds per parameter: noise, optimizer, guard, totals
    checksums   8 D / c                  c: bytes per second; of the released value and of the gradients
    coins       N / W / u                u: uniform draws per second
    sum         2 (W - 1) / W * 8 D / b  b: bytes per second and direction of a link; a ring in float64
    memory      m D + N * r              m: bytes per parameter; r: bytes per record, on every process
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Constants:
    """What a process and a link can do.

    Attributes:
        g: Seconds per record and parameter.
        f: Seconds per parameter.
        c: Bytes per second of checksums.
        u: Uniform draws per second.
        b: Bytes per second of a link.
        m: Bytes per parameter.
    """

    g: float
    f: float
    c: float
    u: float
    b: float
    m: float


def step(of: Constants, *, records: float, parameters: float, batch: float, size: int) -> dict[str, float]:
    """Return seconds of the parts of one step on one of `size` processes."""
    return {
        "gradients": batch / size * parameters * of.g,
        "replicated": parameters * of.f,
        "checksums": 8 * parameters / of.c if size > 1 else 0.0,
        "coins": records / size / of.u,
        "sum": 2 * (size - 1) / size * 8 * parameters / of.b,
    }


def memory(of: Constants, *, records: float, parameters: float, record_bytes: float) -> float:
    """Return bytes of one process, whatever their number."""
    return of.m * parameters + records * record_bytes


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("ranks", type=Path, help="numbers of python -m benchmarks.ranks --json")
    parser.add_argument("--records", type=float, default=1e7)
    parser.add_argument("--parameters", type=float, default=1e8)
    parser.add_argument("--batch", type=float, default=16_384)
    parser.add_argument("--record_bytes", type=float, default=3072.0)
    parser.add_argument("--link", type=float, help="bytes per second; what gloo did on this machine if left out")
    parser.add_argument("--gradient_s", type=float, help="seconds per record and parameter; measured if left out")
    options = parser.parse_args(arguments)
    found = json.loads(options.ranks.read_text())["constants"]
    alone, pair = found["1"], found["2"]
    size_of_sum = max(int(key.split("_")[1]) for key in pair if key.startswith("sum_"))
    of = Constants(
        g=options.gradient_s or alone["s_per_record_and_parameter"],
        f=alone["s_per_parameter"],
        c=alone["checksum_bytes_per_s"],
        u=alone["coins_per_s"],
        b=options.link or 8 * size_of_sum / pair[f"sum_{size_of_sum}_s"],  # a ring of two sends each byte once
        m=alone["bytes_per_parameter"],
    )
    print("| W | gradients | replicated | checksums | coins | sum | s per step |\n|---|---|---|---|---|---|---|")
    for size in (1, 8, 64, 512):
        parts = step(of, records=options.records, parameters=options.parameters, batch=options.batch, size=size)
        cells = " | ".join(f"{part:.3g}" for part in parts.values())
        print(f"| {size} | {cells} | {sum(parts.values()):.3g} |")
    held = memory(of, records=options.records, parameters=options.parameters, record_bytes=options.record_bytes)
    of_records = options.records * options.record_bytes
    print(f"\nMemory of one process: {held / 1e9:.1f} GB, of which records {of_records / 1e9:.1f}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

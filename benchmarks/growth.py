"""How cost grows: with teachers and their batch, with the records of a step, and with the numbers that are released.

Exponents are slopes on a doubly logarithmic scale between the ends: 1 is proportional. Growth with processes is
`python -m benchmarks.ranks`.
"""

import math
from collections.abc import Callable, Iterable

from benchmarks import dpsgd, releases, teachers
from benchmarks.tables import Table

TEACHERS, TEACHER_BATCHES = (50, 200, 800), (8, 16, 32)
RECORDS, DIMS = (128, 512, 2048), (10_000, 100_000, 1_000_000)


def _line(what: str, unit: str, sizes: Iterable[int], seconds: Callable[[int], float]) -> list[str]:
    found = {size: seconds(size) for size in sizes}
    ends = min(found), max(found)
    exponent = math.log(found[ends[1]] / found[ends[0]]) / math.log(ends[1] / ends[0])
    shown = ", ".join(f"{size:,}: {1e3 * time:,.1f}" for size, time in found.items())
    return [what, unit, shown, f"{exponent:.2f}"]


def run(*, quick: bool, device: str = "cpu") -> Table:
    """Return the table."""
    seconds = 0.3 if quick else 3.0
    rows = [
        _line(
            "teachers, dense, batch 16",
            "a round of all",
            TEACHERS,
            lambda num: teachers.measure("mlp", num, "stacked", 16, device, seconds)["round_s"],
        ),
        _line(
            "their batch, 200 dense teachers",
            "a round of all",
            TEACHER_BATCHES,
            lambda batch: teachers.measure("mlp", 200, "stacked", batch, device, seconds)["round_s"],
        ),
        _line(
            "records of a step, small CNN",
            "a step of DP-SGD",
            RECORDS,
            lambda batch: dpsgd.measure("small_cnn", "ours", batch, seconds, device)["step_s"],
        ),
        _line(
            "numbers released",
            "a Gaussian release",
            DIMS,
            lambda dim: releases.measure("Gaussian", dim, seconds=seconds, device=device)[1],
        ),
    ]
    return Table(
        name="growth",
        title="Growth, milliseconds of CPU time",
        columns=["of", "what is timed", "size: milliseconds", "exponent"],
        rows=rows,
        device=device,
    )

"""Time what a mechanism does with rows of one vector of d numbers: encode and sum a row, and release once.

Rows are those of teachers for the votes of TopAgg and GNMax, and for the Gaussian and von Mises-Fisher as well. The
release draws its noise from the operating system's secret, in double precision. Seconds are CPU time of one thread, the
fastest of a few; on a GPU they are those of the clock.
"""

from collections.abc import Callable
from typing import Any

from benchmarks.clock import now
from benchmarks.tables import Table

DIMS = (784, 12_288, 1_000_000)
NUM_TEACHERS = 200
MECHANISMS = ("TopAgg", "GNMax", "VonMisesFisher", "Gaussian")


def fastest(step: Callable[[], Any], *, seconds: float, device: str = "cpu") -> float:
    """Return the seconds of the fastest of at least three calls, after one that is not counted.

    Args:
        step: What is timed.
        seconds: How long to go on.
        device: cpu counts CPU time, cuda the clock.
    """
    step()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 1000):
        start = now(device)
        step()
        times.append(now(device) - start)
    return min(times)


def mechanism(name: str) -> Any:
    """Return a mechanism with the options of its paper, where it has some."""
    from lightning_dp.mechanisms.gaussian import Gaussian
    from lightning_dp.mechanisms.gnmax import GNMax
    from lightning_dp.mechanisms.topagg import TopAgg
    from lightning_dp.mechanisms.von_mises_fisher import VonMisesFisher

    return {"TopAgg": TopAgg, "GNMax": GNMax, "VonMisesFisher": VonMisesFisher, "Gaussian": Gaussian}[name]()


def measure(name: str, dim: int, *, seconds: float, device: str = "cpu") -> tuple[float, float]:
    """Return the seconds that a row takes and those that a release takes.

    Args:
        name: Of the mechanism.
        dim: Numbers of a vector.
        seconds: How long to go on.
        device: Where rows live.
    """
    import torch
    from dp_accounting import NeighboringRelation

    from lightning_dp.mechanisms.base import ContributionSpec, EncodeContext, ReleasePlan
    from lightning_dp.mechanisms.noise import NoiseSource

    spec = ContributionSpec.teachers(num_teachers=NUM_TEACHERS, vectors_per_row=1, vector_dim=dim)
    plan = ReleasePlan(spec=spec, relation=NeighboringRelation.REPLACE_ONE, noise_multiplier=1.0)
    tried, noise, numbers = mechanism(name), NoiseSource(), iter(range(1, 10**9))
    tried.check(spec)
    rows = torch.randn(max(1, min(NUM_TEACHERS, 2**22 // dim)), 1, dim, device=device)
    ids = torch.arange(len(rows), device=device)
    total = torch.zeros(1, tried.encoded_dim(spec), dtype=tried.total_dtype, device=device)
    context = EncodeContext(release_number=1, public_seed=0, noise=noise, row_ids=ids)

    def encode() -> None:
        total.add_(tried.encode(rows, spec, context).sum(0, dtype=tried.total_dtype))

    def release() -> None:
        tried.release(total, plan, noise, release_number=next(numbers), public_seed=0)

    return (
        fastest(encode, seconds=seconds, device=device) / len(rows),
        fastest(release, seconds=seconds, device=device),
    )


def run(*, quick: bool, device: str = "cpu") -> Table:
    """Return the table."""
    rows = []
    for name in MECHANISMS:
        cells = [name]
        for dim in DIMS:
            row, release = measure(name, dim, seconds=0.2 if quick else 2.0, device=device)
            cells.append(f"{1e6 * row:,.0f} / {1e3 * release:,.2f}")
        rows.append(cells)
    return Table(
        name="releases",
        title="Releases, microseconds to encode and add a row / milliseconds of the release itself",
        columns=["mechanism", *(f"d = {dim:,}" for dim in DIMS)],
        rows=rows,
        device=device,
    )

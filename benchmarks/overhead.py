"""Time a private step under Lightning against the same arithmetic in plain PyTorch.

Both draw a Poisson batch, form clipped per-record gradients, add noise once and take a step of SGD. The framework adds
hooks of the Trainer, callbacks, the guard over released parameters, the accountant, and a ledger that is on disk before
noise is drawn. Steps alternate in one process with one thread, and their times are compared twice: by medians, and by
sums, in which the steps after which epsilon is computed count as well.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.clock import now
from benchmarks.tables import Table

BATCHES = (512, 64)
PLANNED, TARGET = 2000, 1.1  # a run of usual length; and what the framework may cost


def bare_step(network: Any, images: Any, labels: Any, size: int) -> Callable[[], None]:
    """Return a step in plain PyTorch with this project's gradients and mechanism, and nothing around them."""
    import torch
    from dp_accounting import NeighboringRelation

    from lightning_dp.gradients.per_record import row_segments
    from lightning_dp.gradients.poisson import PoissonSampler
    from lightning_dp.gradients.source import GradientSource
    from lightning_dp.mechanisms.base import ContributionSpec, ReleasePlan
    from lightning_dp.mechanisms.gaussian import Gaussian
    from lightning_dp.mechanisms.noise import NoiseSource
    from lightning_dp.modules.dpsgd import mean_cross_entropy
    from lightning_dp.modules.release import rows_where_needed

    segments = row_segments(network)
    spec = ContributionSpec.records(expected_batch_size=size, vector_dim=sum(segments), segments=segments)
    plan = ReleasePlan(spec=spec, relation=NeighboringRelation.ADD_OR_REMOVE_ONE, noise_multiplier=1.0)
    mechanism, noise, source = Gaussian(), NoiseSource(), GradientSource("auto", None)
    sampler, device = PoissonSampler(len(images), size / len(images)), images.device
    optimizer, numbers = torch.optim.SGD(network.parameters(), lr=0.05), iter(range(1, 10**9))

    def batch(ids: Any) -> tuple[Any, Any]:
        return images[ids].float().div(255).unsqueeze(1), labels[ids]

    def step() -> None:
        optimizer.zero_grad()
        total = torch.zeros(1, spec.vector_dim, dtype=torch.float64, device=device)
        drawn = sampler.draw().to(device)
        for ids in drawn.split(source.at_once or source.records_at_once(network, mean_cross_entropy, batch(drawn[:1]))):
            chunks = source.gradients(network, mean_cross_entropy, batch(ids), ids=ids)
            next(rows_where_needed(chunks, mechanism, spec, total), None)
        released = mechanism.release(
            total, plan, noise, release_number=next(numbers), public_seed=0, may_overwrite=True
        ).flatten()
        for parameter, part in zip(network.parameters(), released.split(list(segments)), strict=True):
            parameter.grad = part.view_as(parameter)
        optimizer.step()

    return step


def framed_run(size: int, data: Any, callback: Any, device: str) -> None:
    """Train under Lightning with everything that the command line adds, until the callback stops it."""
    import pytorch_lightning as pl
    from pytorch_lightning.loggers import CSVLogger

    from callbacks import GradientPrivatizer, PrivacyAccountant
    from lightning_dp.accounting.settings import PrivacySettings
    from lightning_dp.mechanisms.gaussian import Gaussian
    from lightning_dp.modules.dpsgd import DPSGDClassifier
    from lightning_dp.networks.tempered import TemperedCNN

    settings = PrivacySettings(neighboring_relation="add_or_remove_one", noise_multiplier=1.0, target_delta=1e-5)
    module = DPSGDClassifier(TemperedCNN(activation="relu"), expected_batch_size=size, learning_rate=0.05)
    with tempfile.TemporaryDirectory() as folder:
        accountant = PrivacyAccountant(privacy=settings, ledger_path=Path(folder) / "ledger.jsonl")
        privatizer = GradientPrivatizer(mechanism=Gaussian(), accountant=accountant)
        trainer = pl.Trainer(
            max_steps=PLANNED,
            max_epochs=-1,
            accelerator=device,
            devices=1,
            logger=CSVLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[privatizer, accountant, callback],
        )
        trainer.fit(module, datamodule=data)


def alternating(size: int, steps: int, device: str = "cpu") -> dict[str, list[float]]:
    """Return seconds of steps alone and of framed ones, taken in turn, and those by the wall of the latter.

    Args:
        size: Expected records of a step.
        steps: How many of each.
        device: cpu or cuda.
    """
    import pytorch_lightning as pl
    import torch

    from datamodules import EmbeddedDigits
    from lightning_dp.networks.tempered import TemperedCNN

    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = EmbeddedDigits(steps_per_epoch=PLANNED)
    data.setup("fit")
    bare = bare_step(
        TemperedCNN(activation="relu").to(device), data.train_images.to(device), data.train_labels.to(device), size
    )
    found: dict[str, list[float]] = {"alone": [], "framed": [], "clock": []}

    class Turns(pl.Callback):
        """Takes the time between batches, and lets the other program have its turn then."""

        last: tuple[float, float] | None = None

        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            done = now(device), time.perf_counter()
            if self.last is not None:
                found["framed"].append(done[0] - self.last[0])
                found["clock"].append(done[1] - self.last[1])
            start = now(device)
            bare()
            found["alone"].append(now(device) - start)
            trainer.should_stop = len(found["framed"]) >= steps
            self.last = now(device), time.perf_counter()

    framed_run(size, data, Turns(), device)
    return {name: times[-steps:] for name, times in found.items()}


def run(*, quick: bool, device: str = "cpu") -> Table:
    """Return the table."""
    rows, is_met = [], True
    for size in BATCHES:
        found = alternating(size, 20 if quick else 100 * max(BATCHES) // size, device)
        alone, framed, clock = (1e3 * median(found[name]) for name in ("alone", "framed", "clock"))
        whole = sum(found["framed"]) / sum(found["alone"])
        is_met = is_met and whole <= TARGET
        shown = f"{alone:.1f}", f"{framed:.1f}", f"{framed / alone:.2f}", f"{whole:.2f}", f"{clock:.1f}"
        rows.append([f"TemperedCNN, batch {size}", *shown])
    return Table(
        name="overhead",
        title="A private step under Lightning and alone, milliseconds",
        columns=["step", "alone", "framed", "framed to alone", "all steps with epsilon", "framed, by the wall"],
        rows=rows,
        targets={f"at most {TARGET} times the bare steps, epsilon included": is_met},
        device=device,
    )

"""Runs of a method in one of two neighbouring worlds, with all that is said at the door written down."""

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from callbacks import GradientPrivatizer, PrivacyAccountant
from datamodules import ImageDataModule
from lightning_dp.accounting.events import ReleaseEvent, Sampling
from lightning_dp.accounting.settings import PrivacySettings
from lightning_dp.auditing.door import Tap
from lightning_dp.auditing.worlds import Played, RecordChange
from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.base import EncodeContext, Mechanism, ReleasePlan
from lightning_dp.modules.base import PrivateModule
from lightning_dp.modules.release import ReleaseSession
from lightning_dp.modules.warm_start import WarmPlan, WarmStart

_SEED = 20_261_128  # of coins and noise, equal in both worlds
_PUBLIC = ("privacy/", "eval/", "public/")
_SKETCH = 8  # numbers that stand for a row
_ROW_TOLERANCE = 1e-5  # kernels may sum in another order when a batch has another size, or a row another place in it,
_ROW_FLOOR = 1e-9  # of the bound; and what is left of a row where nearly all cancels may be rounding alone


@dataclass(frozen=True, kw_only=True)
class MethodRun:
    """All that a method's run is made of; made anew, and equal, for every world.

    Attributes:
        module: The method.
        data: Its records, small.
        mechanism: The mechanism.
        privacy: Relation, delta and noise multiplier; with a warm start a target epsilon, of which it takes its share.
        callbacks: Further callbacks.
        warm_start: What is released first, or None.
    """

    module: PrivateModule
    data: ImageDataModule
    mechanism: Mechanism
    privacy: PrivacySettings
    callbacks: tuple[pl.Callback, ...] = ()
    warm_start: WarmStart | None = None


@dataclass
class Overheard:
    """What was overheard of the releases of one mechanism: those of the method, or the one of its warm start.

    Attributes:
        mechanism: The mechanism itself.
        rows: By release, a sketch of every private row, by id and place.
        measured: What noise was added to.
        noisy: What it became; empty in a world whose releases were handed out.
        released: What left.
        plan: Rows, relation and noise.
        event: What one release is charged.
        sampling: How records enter.
    """

    mechanism: Mechanism
    rows: list[dict[tuple[int, int], Tensor]] = field(default_factory=list)
    measured: list[Tensor] = field(default_factory=list)
    noisy: list[Tensor] = field(default_factory=list)
    released: list[Tensor] = field(default_factory=list)
    plan: ReleasePlan = field(init=False)
    event: ReleaseEvent = field(init=False)
    sampling: Sampling = field(init=False)

    def state(self, plan: ReleasePlan, sampling: Sampling) -> None:
        """Note what was planned.

        Args:
            plan: Rows, relation and noise.
            sampling: How records enter.
        """
        self.plan, self.sampling, self.event = plan, sampling, self.mechanism.step_event(plan)

    def shifts(self, other: "Overheard") -> list[float]:
        """Return how far each release is from that of another world, before noise."""
        return [float((one - two).norm()) for one, two in zip(self.measured, other.measured, strict=True)]

    def changed_rows(self, other: "Overheard") -> int:
        """Return how many rows of a release differ between two worlds, at most."""
        most, bound = 0, self.mechanism.row_bound(self.plan.spec)
        floor = _ROW_FLOOR * bound if math.isfinite(bound) else 0.0
        for left, right in zip(self.rows, other.rows, strict=False):
            silent = torch.zeros(_SKETCH, dtype=torch.float64)
            pairs = ((left.get(key, silent), right.get(key, silent)) for key in {*left, *right})
            differs = (
                float((a - b).norm()) > max(floor, _ROW_TOLERANCE * float(torch.maximum(a.norm(), b.norm())))
                for a, b in pairs
            )
            most = max(most, sum(differs))
        return most


@dataclass
class Transcript:
    """What was overheard of a run.

    Attributes:
        own: Releases of the method.
        warm: The release of its warm start, or None.
        networks: Released parameters and buffers, by name.
        logged: Numbers under public names.
        ledger_length: Releases in the ledger.
    """

    own: Overheard
    warm: Overheard | None = None
    networks: dict[str, Tensor] = field(default_factory=dict)
    logged: dict[str, float] = field(default_factory=dict)
    ledger_length: int = 0

    @property
    def parts(self) -> tuple[Overheard, ...]:
        """What was released in the order in which it was."""
        return (self.own,) if self.warm is None else (self.warm, self.own)

    def differences(self, other: "Transcript") -> list[str]:
        """Return what left in one world and is another thing in the other, by name."""
        found = [
            name
            for name, value in self.networks.items()
            if name not in other.networks or not torch.equal(value, other.networks[name])
        ]
        return found + [name for name, value in self.logged.items() if other.logged.get(name) != value]


def play(
    run: MethodRun,
    steps: int,
    change: RecordChange,
    forced: Transcript | None,
    privatizer_class: type[GradientPrivatizer],
    *,
    present: tuple[int, ...],
    with_rows: bool = False,
) -> Transcript:
    """Train in one world and return its transcript.

    Args:
        run: What is trained.
        steps: Releases of the method.
        change: What is different in this world.
        forced: What every release must hand out; None lets them be drawn.
        privatizer_class: Class of the callback that opens the door.
        present: Records that take part in every release, unless they are gone.
        with_rows: Form rows also where their norms would do.
    """
    transcript = Transcript(Overheard(run.mechanism))
    tap = _tapped(transcript.own, None if forced is None else forced.own, with_rows=with_rows)
    target = run.privacy.target_epsilon if run.warm_start is not None else None
    accountant = PrivacyAccountant(privacy=replace(run.privacy, insecure_seed=_SEED, target_epsilon=target))
    warm_start = None
    if run.warm_start is not None:
        warm_start = _tapped_warm_start(run.warm_start, transcript, forced, change, with_rows=with_rows)
    privatizer = privatizer_class(mechanism=tap, accountant=accountant, warm_start=warm_start)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[privatizer, accountant, *run.callbacks, Played(change, present)],
    )
    run.data.setup("fit")
    change.apply(run.data, change.record)
    trainer.fit(run.module, datamodule=run.data)
    if privatizer.plan is None:
        raise ConfigurationError("Expected a GradientPrivatizer that plans the run, got one without a plan.")
    transcript.own.state(privatizer.plan, run.module.sampling)
    for part, network in {**run.module.released_networks(), "model": run.module.released_model()}.items():
        transcript.networks |= {f"{part}.{name}": value.clone() for name, value in network.state_dict().items()}
    transcript.logged = {
        name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(_PUBLIC)
    }
    transcript.ledger_length = len(accountant.ledger)
    return transcript


def _tapped(heard: Overheard, forced: Overheard | None, *, with_rows: bool = False) -> Mechanism:
    """Return a copy of the mechanism that writes down what passes, and hands out what it must."""
    tap = Tap(heard.mechanism)
    _spy_on_rows(tap, heard, is_silent=forced is not None, with_rows=with_rows)
    _spy_on_releases(tap, heard, forced)
    return tap.mechanism


def _tapped_warm_start(
    warm_start: WarmStart,
    transcript: Transcript,
    forced: Transcript | None,
    change: RecordChange,
    *,
    with_rows: bool,
) -> WarmStart:
    """Return a copy of the warm start whose mechanism is tapped, and which does not see a record that is gone."""
    copied = copy.copy(warm_start)
    real_plan, real_samples = copied.plan_release, copied.released_samples

    def plan_release(module: PrivateModule, settings: PrivacySettings, mechanism: Mechanism) -> WarmPlan:
        planned = real_plan(module, settings, mechanism)
        transcript.warm = heard = Overheard(planned.mechanism)
        heard.state(planned.plan, planned.sampling)
        return replace(planned, mechanism=_tapped(heard, None if forced is None else forced.warm, with_rows=with_rows))

    def released_samples(
        session: ReleaseSession, images: Tensor, labels: Tensor, records: range, *, seed: int
    ) -> tuple[Tensor, Tensor]:
        if change.is_absent:
            if change.record != records[-1] and not change.moves_up:
                raise ConfigurationError(f"Before a warm start the last record goes, {records[-1]}; leave record out.")
            # One that was at the front fills the last place; the others keep their names.
            images, labels = images[:-1], labels[:-1]
            records = records[1:] if change.moves_up else records[:-1]
        return real_samples(session, images, labels, records, seed=seed)

    vars(copied).update(plan_release=plan_release, released_samples=released_samples)
    return copied


def _spy_on_rows(tap: Tap, heard: Overheard, *, is_silent: bool, with_rows: bool) -> None:
    """Keep a sketch of every private row: `perturb_rows` meets those, and no public ones."""
    mechanism, real = tap.mechanism, tap.mechanism.perturb_rows

    def perturb_rows(encoded: Tensor, plan: ReleasePlan, context: EncodeContext) -> Tensor:
        while len(heard.rows) <= len(heard.measured):
            heard.rows.append({})
        found, slot = heard.rows[-1], context.first_vector // plan.spec.vectors_per_row
        stream = torch.Generator().manual_seed(context.first_vector)
        flat = encoded.detach().cpu().double().flatten(1)
        sketches = flat @ torch.randn(flat.shape[1], _SKETCH, generator=stream, dtype=torch.float64)
        for row_id, sketch in zip(context.row_ids.tolist(), sketches, strict=True):
            found[row_id, slot] = found.get((row_id, slot), torch.zeros(_SKETCH, dtype=torch.float64)) + sketch
        return encoded if is_silent else real(encoded, plan, context)

    vars(mechanism)["perturb_rows"] = perturb_rows
    if with_rows:
        vars(mechanism)["row_scaling"] = lambda norms, spec: None


def _spy_on_releases(tap: Tap, heard: Overheard, forced: Overheard | None) -> None:
    """Let the tapped mechanism report its releases, or hand out those of another world."""
    mechanism, real = tap.mechanism, tap.mechanism.release

    def release(total: Tensor, plan: ReleasePlan, *rest: Any, **named: Any) -> Tensor:
        if forced is None:
            value = real(total, plan, *rest, **named)
            heard.noisy.append(tap.noisy[-1])
        else:
            mechanism.measure(total.to(torch.float64), plan.spec)
            number = len(heard.measured)
            value = forced.released[number].clone()
            mechanism.adapt(forced.noisy[number].reshape(total.shape[0], -1).clone(), plan)
        heard.measured.append(tap.measured[-1])
        heard.released.append(value.clone())
        tap.measured.clear()
        tap.noisy.clear()
        return value

    vars(mechanism)["release"] = release

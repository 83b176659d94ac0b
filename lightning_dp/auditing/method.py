"""Audit of a whole method: train it twice on neighbouring records under equal coins, noise and transcript.

In the second world every release hands out what the first world released, so all that was learned from releases is the
same at every step. What may differ then is what the record itself sends, and it may differ by the charged sensitivity at
most, at every step: a record that reaches another teacher through shared state shows here. And whatever leaves (the
released networks, the numbers that are logged) must be the same to the last bit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from callbacks import GradientPrivatizer, PrivacyAccountant
from datamodules import ImageDataModule
from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.settings import PrivacySettings
from lightning_dp.auditing.bounds import epsilon_of_mu, std_interval
from lightning_dp.auditing.door import Tap
from lightning_dp.auditing.result import ALARM_CONFIDENCE, AuditResult, Line, Plot, judge
from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.base import Mechanism, ReleasePlan
from lightning_dp.modules.base import PrivateModule

FINDS = (
    "a record that reaches more rows than stated (shared optimizer state, duplicates, batch statistics), a bound that is "
    "not kept at some step, anything that leaves past the door: networks, logged numbers, releases that no ledger holds"
)
MISSES = "records and steps that were not tried; what only a run of full length brings about; secrecy of the coins"

_SEED = 20_261_128  # of coins and noise, equal in both worlds
_TOLERANCE = 1e-6
_TINY = 1e-9
_PUBLIC = ("privacy/", "eval/", "public/")


@dataclass(frozen=True, kw_only=True)
class MethodRun:
    """All that a method's run is made of; made anew, and equal, for every world.

    Attributes:
        module: The method.
        data: Its records, small.
        mechanism: The mechanism.
        privacy: Relation, delta and noise multiplier.
        callbacks: Further callbacks.
    """

    module: PrivateModule
    data: ImageDataModule
    mechanism: Mechanism
    privacy: PrivacySettings
    callbacks: tuple[pl.Callback, ...] = ()


@dataclass
class _Transcript:
    """What was overheard of a run."""

    measured: list[Tensor] = field(default_factory=list)
    noisy: list[Tensor] = field(default_factory=list)
    released: list[Tensor] = field(default_factory=list)
    networks: dict[str, Tensor] = field(default_factory=dict)
    logged: dict[str, float] = field(default_factory=dict)
    ledger_length: int = 0


@dataclass(frozen=True)
class _Change:
    """What is different in the second world."""

    name: str
    record: int
    apply: Callable[[ImageDataModule, int], None]
    is_absent: bool = False


def audit_method(
    make_run: Callable[[], MethodRun],
    *,
    steps: int = 3,
    record: int | None = None,
    privatizer: type[GradientPrivatizer] = GradientPrivatizer,
) -> AuditResult:
    """Compare runs of a method on neighbouring records.

    Args:
        make_run: Makes module, data and mechanism of a run, equal at every call.
        steps: Releases of a run.
        record: Which record changes; None takes the last.
        privatizer: Class of the callback that opens the door.

    Raises:
        ConfigurationError: The relation cannot be played out on this method's records.
    """
    first = make_run()
    last = first.data.num_records - 1 if record is None else record
    base, plan, session_sampling, event = _fit(first, steps, _unchanged(last), None, privatizer)
    limit, std = first.mechanism.l2_sensitivity(plan.spec, plan.relation), first.mechanism.noise_std(plan)
    shifts: dict[str, list[float]] = {}
    leaks: list[str] = []
    for change in _changes(plan, last):
        other, *_ = _fit(make_run(), steps, change, base, privatizer)
        pairs = zip(base.measured, other.measured, strict=True)
        shifts[change.name] = [float((one - two).norm()) for one, two in pairs]
        leaks += _differences(base, other)
    largest = max(max(found) for found in shifts.values())
    leaks += [f"{base.ledger_length} releases in the ledger, {len(base.measured)} made"] * (
        base.ledger_length != len(base.measured)
    )
    noise = torch.cat([noisy - measured for noisy, measured in zip(base.noisy, base.measured, strict=True)])
    low, high = (
        std_interval(float(noise.square().sum()), len(noise), ALARM_CONFIDENCE) if std > 0 else (0.0, math.inf)
    )
    is_gaussian = hasattr(event, "noise_std")
    wrong_noise = is_gaussian and not low <= std <= high
    settings = first.privacy
    claimed = compute_epsilon(
        {(event, session_sampling): steps}, delta=settings.target_delta, relation=plan.relation
    ).epsilon
    worst = max(shifts, key=lambda name: max(shifts[name]))
    mu = math.hypot(*shifts[worst]) / std if std > 0 else math.inf
    has_bound = is_gaussian and session_sampling.scheme == "full" and getattr(event, "kind", "") == "gaussian"
    summary = f"{worst}: moved a release by {largest:.6g} at most, {limit:.6g} is charged, over {steps} releases"
    if leaks:
        summary += "; differs in what leaves: " + ", ".join(dict.fromkeys(leaks))
    if wrong_noise:
        summary += f"; noise std in [{low:.4g}, {high:.4g}], {std:.4g} is stated"
    return AuditResult(
        audit="method",
        subject=f"{type(first.module).__name__} with {type(first.mechanism).__name__}, {settings.neighboring_relation}",
        lower_bound=epsilon_of_mu(mu, settings.target_delta) if has_bound else None,
        confidence=1.0,
        claimed_epsilon=claimed,
        delta=settings.target_delta,
        verdict=judge(
            is_alarm=largest > limit * (1 + _TOLERANCE) + _TINY or bool(leaks) or wrong_noise, is_doubt=False
        ),
        summary=summary,
        finds=FINDS,
        misses=MISSES,
        measured={"largest_shift": largest, "sensitivity": limit, "ratio": largest / limit, "leaks": float(len(leaks))},
        plot=Plot(
            x_label="release",
            y_label="shift / sensitivity",
            lines=(
                *(
                    Line(
                        label=name,
                        x=tuple(float(step) for step in range(1, steps + 1)),
                        y=tuple(value / limit for value in found),
                    )
                    for name, found in shifts.items()
                ),
                Line(label="charged", x=(1.0, float(steps)), y=(1.0, 1.0), is_dashed=True),
            ),
        ),
    )


def _fit(
    run: MethodRun,
    steps: int,
    change: _Change,
    forced: _Transcript | None,
    privatizer_class: type[GradientPrivatizer],
) -> tuple[_Transcript, ReleasePlan, Any, Any]:
    """Train in one world; `forced` holds what every release must hand out."""
    transcript = _Transcript()
    tap = Tap(run.mechanism, silent=forced is not None)
    _spy_on_releases(tap, transcript, forced)
    settings = replace(run.privacy, insecure_seed=_SEED, target_epsilon=None)
    accountant = PrivacyAccountant(privacy=settings)
    privatizer = privatizer_class(mechanism=tap.mechanism, accountant=accountant)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[privatizer, accountant, *run.callbacks, _Played(change)],
    )
    run.data.setup("fit")
    change.apply(run.data, change.record)
    trainer.fit(run.module, datamodule=run.data)
    for part, network in {**run.module.released_networks(), "model": run.module.released_model()}.items():
        transcript.networks |= {f"{part}.{name}": value.clone() for name, value in network.state_dict().items()}
    transcript.logged = {
        name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(_PUBLIC)
    }
    transcript.ledger_length = len(accountant.ledger)
    plan = privatizer.plan
    if plan is None:
        raise ConfigurationError("The run made no plan.")
    return transcript, plan, run.module.sampling, run.mechanism.step_event(plan)


def _spy_on_releases(tap: Tap, transcript: _Transcript, forced: _Transcript | None) -> None:
    """Let the tapped mechanism report its releases, or hand out those of another world."""
    mechanism, real = tap.mechanism, tap.mechanism.release

    def release(total: Tensor, plan: ReleasePlan, *rest: Any, **named: Any) -> Tensor:
        if forced is None:
            value = real(total, plan, *rest, **named)
            transcript.noisy.append(tap.noisy[-1])
        else:
            mechanism.measure(total.to(torch.float64), plan.spec)
            number = len(transcript.measured)
            value = forced.released[number].clone()
            mechanism.adapt(forced.noisy[number].reshape(total.shape[0], -1).clone(), plan)
        transcript.measured.append(tap.measured[-1])
        transcript.released.append(value.clone())
        tap.measured.clear()
        tap.noisy.clear()
        return value

    vars(mechanism)["release"] = release


class _Played(pl.Callback):
    """Makes the record that changes take part in every release of both worlds, or in none of the second's."""

    def __init__(self, change: _Change) -> None:
        self.change = change

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        record, is_absent = self.change.record, self.change.is_absent
        if hasattr(pl_module, "draw_records"):
            _shadow(pl_module, "draw_records", lambda drawn: _with(drawn, record, absent=is_absent))
        if getattr(pl_module, "expected_judges", None) is not None:
            teachers: Any = pl_module
            partition = trainer.datamodule.teacher_partition(  # type: ignore[attr-defined]
                teachers._num_teachers, method=teachers.partition, key=teachers.partition_key
            )
            teacher = int(partition.assignment[record])
            _shadow(pl_module, "draw_judges", lambda drawn: _with(drawn, teacher, absent=False))


def _shadow(module: pl.LightningModule, name: str, change: Callable[[Tensor], Tensor]) -> None:
    real = getattr(module, name)
    vars(module)[name] = lambda: change(real())


def _with(drawn: Tensor, index: int, *, absent: bool) -> Tensor:
    """Return the indices with one of them certainly there, or certainly not."""
    others = drawn[drawn != index]
    return others if absent else torch.cat([others, torch.tensor([index])]).sort().values


def _unchanged(record: int) -> _Change:
    return _Change("as it is", record, lambda data, index: None)


def _changes(plan: ReleasePlan, record: int) -> list[_Change]:
    """Return what the relation lets one record do."""
    relation, kind = plan.relation.name, plan.spec.kind
    if relation == "REPLACE_ONE":
        return [
            _Change("another image of another label", record, _inverted_and_relabelled),
            _Change("another image of the same label", record, _inverted),
        ]
    if kind == "teacher":
        raise ConfigurationError(
            "Under replace_special a teacher's record becomes empty, which no image is; audit teachers under "
            "privacy.neighboring_relation=replace_one."
        )
    if kind == "statistic":
        return [_Change("the record gone", record, _removed)]
    return [_Change("the record gone", record, lambda data, index: None, is_absent=True)]


def _inverted(data: ImageDataModule, record: int) -> None:
    images = data.splits.train_images.clone()
    images[record] = 255 - images[record]
    data._splits = replace(data.splits, train_images=images)


def _inverted_and_relabelled(data: ImageDataModule, record: int) -> None:
    _inverted(data, record)
    labels = data.splits.train_labels.clone()
    labels[record] = (labels[record] + 1) % data.num_classes
    data._splits = replace(data.splits, train_labels=labels)


def _removed(data: ImageDataModule, record: int) -> None:
    """Take the record out; the number of records stays the public one, as the claim has it."""
    kept = torch.arange(len(data.train_labels)) != record
    data._splits = replace(
        data.splits, train_images=data.train_images[kept], train_labels=data.train_labels[kept]
    )


def _differences(one: _Transcript, other: _Transcript) -> list[str]:
    """Return what left in one world and is another thing in the other, by name."""
    found = [
        name
        for name, value in one.networks.items()
        if name not in other.networks or not torch.equal(value, other.networks[name])
    ]
    found += [name for name, value in one.logged.items() if other.logged.get(name) != value]
    return found

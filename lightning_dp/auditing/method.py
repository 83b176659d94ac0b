"""Audit of a whole method: train it twice on neighbouring records under equal coins, noise and transcript.

In the second world every release hands out what the first world released, so all that was learned from releases is
the same at every step. What may differ then is what the record itself sends, by the charged sensitivity at most, at
every step: a record that reaches another teacher through shared state shows here. And whatever leaves (the released
networks, the numbers that are logged) must be the same to the last bit.
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
from lightning_dp.accounting.events import AdditiveRelease, GaussianRelease, ReleaseEvent, TernaryRelease
from lightning_dp.accounting.settings import PrivacySettings
from lightning_dp.auditing.bounds import epsilon_of_mu, std_interval
from lightning_dp.auditing.door import NoiseLawOf, Tap
from lightning_dp.auditing.result import ALARM_CONFIDENCE, AuditResult, Line, Plot, judge
from lightning_dp.auditing.worlds import Played, RecordChange, record_changes, unchanged
from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.base import EncodeContext, Mechanism, ReleasePlan
from lightning_dp.modules.base import PrivateModule

FINDS = (
    "a record that reaches more rows than stated (shared optimizer state, duplicates, batch statistics), a bound that "
    "is not kept at some step, anything that leaves past the door: networks, logged numbers, releases that no ledger "
    "holds"
)
MISSES = "records and steps that were not tried; what only a run of full length brings about; secrecy of the coins"

_SEED = 20_261_128  # of coins and noise, equal in both worlds
_TOLERANCE = 1e-6
_TINY = 1e-9
_PUBLIC = ("privacy/", "eval/", "public/")
_SKETCH = 8  # numbers that stand for a row
_ROW_TOLERANCE = 1e-5  # kernels may sum in another order when a batch has another size


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

    rows: list[dict[tuple[int, int], Tensor]] = field(default_factory=list)
    measured: list[Tensor] = field(default_factory=list)
    noisy: list[Tensor] = field(default_factory=list)
    released: list[Tensor] = field(default_factory=list)
    networks: dict[str, Tensor] = field(default_factory=dict)
    logged: dict[str, float] = field(default_factory=dict)
    ledger_length: int = 0
    plan: ReleasePlan = field(init=False)
    event: ReleaseEvent = field(init=False)


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
    base = _fit(first, steps, unchanged(last), None, privatizer)
    limit, std = (
        first.mechanism.l2_sensitivity(base.plan.spec, base.plan.relation),
        first.mechanism.noise_std(base.plan),
    )
    shifts: dict[str, list[float]] = {}
    leaks = [f"{base.ledger_length} releases in the ledger, {len(base.measured)} made"]
    leaks *= base.ledger_length != len(base.measured)
    most_rows = 0
    for change in record_changes(base.plan, last):
        other = _fit(make_run(), steps, change, base, privatizer)
        pairs = zip(base.measured, other.measured, strict=True)
        shifts[change.name] = [float((one - two).norm()) for one, two in pairs]
        leaks += _differences(base, other)
        most_rows = max(most_rows, _changed_rows(base, other))
    if base.plan.spec.kind == "record":  # once more with rows in sight, which ghost clipping never forms
        base_rows = _fit(make_run(), steps, unchanged(last), base, privatizer, with_rows=True)
        for change in record_changes(base.plan, last):
            other = _fit(make_run(), steps, change, base, privatizer, with_rows=True)
            most_rows = max(most_rows, _changed_rows(base_rows, other))
    return _judge(first, base, shifts, leaks, most_rows, limit=limit, std=std)


def _judge(
    run: MethodRun,
    base: "_Transcript",
    shifts: dict[str, list[float]],
    leaks: list[str],
    most_rows: int,
    *,
    limit: float,
    std: float,
) -> AuditResult:
    """Return what follows from the shifts, from what differs in what leaves, and from the noise."""
    settings, plan, event, steps = run.privacy, base.plan, base.event, len(base.measured)
    largest = max(max(found) for found in shifts.values())
    worst = max(shifts, key=lambda name: max(shifts[name]))
    allowed = max(change.num_replaced + change.num_toggled for change in plan.spec.alternatives(plan.relation))
    low, high = _noise_interval(base)
    stated = NoiseLawOf(run.mechanism, plan).std if isinstance(event, AdditiveRelease) else std
    wrong_noise = isinstance(event, AdditiveRelease) and not low <= stated <= high
    mu = math.hypot(*shifts[worst]) / std if std > 0 else math.inf
    is_gaussian = isinstance(event, GaussianRelease) and not isinstance(event, TernaryRelease)
    has_bound = is_gaussian and run.module.sampling.scheme == "full"
    claimed = compute_epsilon(
        {(event, run.module.sampling): steps}, delta=settings.target_delta, relation=plan.relation
    ).epsilon
    summary = f"{worst}: moved a release by {largest:.6g} at most, {limit:.6g} is charged, over {steps} releases"
    if most_rows > allowed:
        summary += f"; {most_rows} rows changed, {allowed} may"
    if leaks:
        summary += "; differs in what leaves: " + ", ".join(dict.fromkeys(leaks))
    if wrong_noise:
        summary += f"; noise std in [{low:.4g}, {high:.4g}], {stated:.4g} is stated"
    is_broken = largest > limit * (1 + _TOLERANCE) + _TINY or most_rows > allowed or bool(leaks) or wrong_noise
    releases = tuple(float(step) for step in range(1, steps + 1))
    lines = [Line(label=name, x=releases, y=tuple(one / limit for one in found)) for name, found in shifts.items()]
    return AuditResult(
        audit="method",
        subject=f"{type(run.module).__name__} with {type(run.mechanism).__name__}, {settings.neighboring_relation}",
        lower_bound=epsilon_of_mu(mu, settings.target_delta) if has_bound else None,
        confidence=1.0,
        claimed_epsilon=claimed,
        delta=settings.target_delta,
        verdict=judge(is_alarm=is_broken, is_doubt=most_rows == 0),  # a record that never took part shows nothing
        summary=summary,
        finds=FINDS,
        misses=MISSES,
        measured={
            "largest_shift": largest,
            "sensitivity": limit,
            "ratio": largest / limit,
            "changed_rows": float(most_rows),
            "leaks": float(len(leaks)),
        },
        plot=Plot(
            x_label="release",
            y_label="shift / sensitivity",
            lines=(*lines, Line(label="charged", x=(1.0, float(steps)), y=(1.0, 1.0), is_dashed=True)),
        ),
    )


def _noise_interval(base: "_Transcript") -> tuple[float, float]:
    """Return the interval of the std of the noise of a run, at the confidence of an alarm."""
    noise = torch.cat(
        [
            noisy - measured
            for noisy, measured in zip(base.noisy, base.measured, strict=True)
            if len(noisy) == len(measured)
        ]
    )
    energy = float(noise.square().sum())
    return std_interval(energy, len(noise), ALARM_CONFIDENCE) if len(noise) else (0.0, math.inf)


def _fit(
    run: MethodRun,
    steps: int,
    change: RecordChange,
    forced: _Transcript | None,
    privatizer_class: type[GradientPrivatizer],
    *,
    with_rows: bool = False,
) -> _Transcript:
    """Train in one world; `forced` holds what every release must hand out."""
    transcript = _Transcript()
    tap = Tap(run.mechanism)
    _spy_on_rows(tap, transcript, is_silent=forced is not None, with_rows=with_rows)
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
        callbacks=[privatizer, accountant, *run.callbacks, Played(change)],
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
    if privatizer.plan is None:
        raise ConfigurationError("Expected a GradientPrivatizer that plans the run, got one without a plan.")
    transcript.plan, transcript.event = privatizer.plan, run.mechanism.step_event(privatizer.plan)
    return transcript


def _spy_on_rows(tap: Tap, transcript: _Transcript, *, is_silent: bool, with_rows: bool) -> None:
    """Keep a sketch of every private row: `perturb_rows` meets those, and no public ones."""
    mechanism, real = tap.mechanism, tap.mechanism.perturb_rows

    def perturb_rows(encoded: Tensor, plan: ReleasePlan, context: EncodeContext) -> Tensor:
        while len(transcript.rows) <= len(transcript.measured):
            transcript.rows.append({})
        found, slot = transcript.rows[-1], context.first_vector // plan.spec.vectors_per_row
        stream = torch.Generator().manual_seed(context.first_vector)
        flat = encoded.detach().cpu().double().flatten(1)
        sketches = flat @ torch.randn(flat.shape[1], _SKETCH, generator=stream, dtype=torch.float64)
        for row_id, sketch in zip(context.row_ids.tolist(), sketches, strict=True):
            found[row_id, slot] = found.get((row_id, slot), torch.zeros(_SKETCH, dtype=torch.float64)) + sketch
        return encoded if is_silent else real(encoded, plan, context)

    vars(mechanism)["perturb_rows"] = perturb_rows
    if with_rows:
        vars(mechanism)["row_scaling"] = lambda norms, spec: None


def _changed_rows(one: _Transcript, other: _Transcript) -> int:
    """Return how many rows of a release differ between two worlds, at most."""
    most = 0
    for left, right in zip(one.rows, other.rows, strict=False):
        silent = torch.zeros(_SKETCH, dtype=torch.float64)
        pairs = ((left.get(key, silent), right.get(key, silent)) for key in {*left, *right})
        most = max(
            most,
            sum(float((a - b).norm()) > _ROW_TOLERANCE * float(torch.maximum(a.norm(), b.norm())) for a, b in pairs),
        )
    return most


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


def _differences(one: _Transcript, other: _Transcript) -> list[str]:
    """Return what left in one world and is another thing in the other, by name."""
    found = [
        name
        for name, value in one.networks.items()
        if name not in other.networks or not torch.equal(value, other.networks[name])
    ]
    found += [name for name, value in one.logged.items() if other.logged.get(name) != value]
    return found

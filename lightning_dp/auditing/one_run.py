"""Audit D: one release with many canaries, each in or out by a fair coin (Steinke, Nasr and Jagielski 2023)."""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from dp_accounting import NeighboringRelation
from numpy.typing import NDArray
from torch import Tensor

from lightning_dp.auditing.bounds import (
    Errors,
    epsilon_of_mu,
    is_refuted,
    middle_errors,
    one_run_epsilon,
    privacy_profile,
)
from lightning_dp.auditing.door import FULL, Door
from lightning_dp.auditing.result import ALARM_CONFIDENCE, AuditResult, Plot, judge
from lightning_dp.auditing.two_worlds import error_summary
from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.teachers import RowChunk
from lightning_dp.mechanisms.base import ContributionSpec

FINDS = "too little noise, missing bounds, a divisor that follows the batch; in one release, so also on large runs"
MISSES = "its bound for any mechanism is loose; noise that is the same every time; canaries that interact"

_CHUNK = 100
_GUESSED = 0.02  # of the canaries on each side, fixed beforehand
_LARGE = 50.0
_WIDTHS = (1, 2, 4, 8, 16, 32, 64)


def audit_one_run(
    door: Door, *, canaries: int = 1000, confidence: float = 0.95, delta: float = 1e-5, coin_seed: int | None = None
) -> AuditResult:
    """Guess from one release which canaries took part.

    The rows are the audit's own: as many as there are canaries, each in a direction of its own, under the mechanism,
    relation and noise multiplier of the door. Under replace-one an absent canary is its opposite.

    Args:
        door: What is audited; its mechanism takes records or teachers.
        canaries: m.
        confidence: Of the lower bounds.
        delta: Of the claim.
        coin_seed: Fixes which canaries take part; None asks the operating system.
    """
    wide = _with_canaries(door, canaries)
    scores, joins = _scores(wide, canaries, coin_seed)
    order = np.argsort(scores)
    per_side = max(1, round(_GUESSED * canaries))
    right = int((~joins[order[:per_side]]).sum() + joins[order[-per_side:]].sum())

    def by_guesses(confidence: float) -> float:
        return one_run_epsilon(
            num_canaries=canaries, guesses=2 * per_side, right=right, delta=delta, confidence=confidence
        )

    errors = middle_errors(scores[~joins], scores[joins])
    mu, claimed, told = errors.mu(confidence=confidence), wide.epsilon(delta), by_guesses(confidence)
    gaussian = epsilon_of_mu(mu, delta) if wide.has_gaussian_noise else 0.0
    is_tight = wide.has_gaussian_noise and wide.charges_noisy_value
    bound = max(told, gaussian if wide.charges_noisy_value else 0.0)
    is_refuted_as_gaussian = is_tight and _refutes(wide, errors, delta, ALARM_CONFIDENCE)
    return AuditResult(
        audit="one run",
        subject=str(wide),
        lower_bound=bound,
        confidence=confidence,
        claimed_epsilon=claimed,
        delta=delta,
        verdict=judge(
            is_alarm=by_guesses(ALARM_CONFIDENCE) > claimed or is_refuted_as_gaussian, is_doubt=bound > claimed
        ),
        summary=(
            f"{right} of {2 * per_side} guesses right among {canaries} canaries: epsilon at least {told:.3g} of any "
            f"mechanism; {error_summary(errors)}: {gaussian:.3g} of a Gaussian one"
        ),
        finds=FINDS,
        misses=MISSES,
        measured={
            "epsilon_any_mechanism": told,
            "epsilon_gaussian": gaussian,
            "mu": mu,
            "right": float(right),
            "guesses": float(2 * per_side),
        },
        plot=_histograms(scores, joins),
    )


def _scores(wide: Door, canaries: int, coin_seed: int | None) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Make the release; return a score for every canary, and whether it took part."""
    width = wide.plan.spec.vector_dim // canaries
    joins = np.random.default_rng(coin_seed).random(canaries) < 0.5
    values = _canary(wide, width)
    # A teacher never falls silent, and a replaced record is another one: both turn into their opposite.
    is_replaced = wide.plan.spec.kind == "teacher" or wide.plan.relation is NeighboringRelation.REPLACE_ONE
    heard = wide.open().release(_rows(joins, values, canaries, opposite=is_replaced))
    seen = heard.noisy[: canaries * width].reshape(canaries, width)
    return (seen * torch.sign(values).double()).mean(dim=1).numpy(), joins


def _histograms(scores: NDArray[np.float64], joins: NDArray[np.bool_]) -> Plot:
    return Plot(
        x_label="score of a canary",
        y_label="density",
        histograms={"out": tuple(scores[~joins].tolist()), "in": tuple(scores[joins].tolist())},
    )


def _refutes(door: Door, errors: Errors, delta: float, confidence: float) -> bool:
    """Tell whether the rates contradict the claim; canaries in directions of their own meet independent noise."""
    profile = privacy_profile({(door.event, FULL): 1}, relation=door.plan.relation)
    return is_refuted([(door.epsilon(delta), delta), *profile], errors, confidence=confidence)


def can_run_once(door: Door) -> bool:
    """Tell whether the audit's own rows fit the mechanism: records or teachers, and coordinates that stay apart."""
    mechanism = door.mechanism
    if not {"record", "teacher"} & mechanism.kinds or getattr(mechanism, "rotate", False):
        return False
    return mechanism.encoded_dim(ContributionSpec.records(expected_batch_size=1, vector_dim=64)) in (64, 65)


def _with_canaries(door: Door, canaries: int) -> Door:
    """Return the door with rows for the canaries, as wide as one of them has to be to come near its bound."""

    def reach(width: int) -> float:
        few = replace(door, plan=replace(door.plan, spec=_spec(door, 8, width)))
        rows = _rows(np.arange(8) == 0, _canary(few, width), 8, opposite=False)
        measured = few.open(seed=0, silent=True).release(rows).measured
        return float(measured.norm()) / few.mechanism.row_bound(few.plan.spec)

    fitting = [width for width in _WIDTHS if _accepts(door, _spec(door, 8, width))]
    width = max(fitting, key=lambda one: round(reach(one), 6))
    return replace(door, plan=replace(door.plan, spec=_spec(door, canaries, width)))


def _accepts(door: Door, spec: ContributionSpec) -> bool:
    try:
        door.mechanism.check(spec)
    except ConfigurationError:
        return False
    return True


def _spec(door: Door, canaries: int, width: int) -> ContributionSpec:
    dim = canaries * width
    if door.plan.spec.kind != "teacher" and "record" in door.mechanism.kinds:
        return ContributionSpec.records(
            expected_batch_size=canaries / 2, vector_dim=dim, segments=(dim // 2, dim - dim // 2)
        )
    return ContributionSpec.teachers(num_teachers=canaries, vectors_per_row=1, vector_dim=dim)


def _canary(door: Door, width: int) -> Tensor:
    """Return the entries of one canary, large ones: they are cut to the bound."""
    scale = door.mechanism.row_bound(door.plan.spec)
    return torch.full((width,), _LARGE * (scale if math.isfinite(scale) else 1.0) / math.sqrt(width))


def _rows(joins: NDArray[np.bool_], values: Tensor, canaries: int, *, opposite: bool) -> Iterator[RowChunk]:
    """Yield the rows of one world, few at a time."""
    width = len(values)
    for start in range(0, canaries, _CHUNK):
        ids = np.arange(start, min(start + _CHUNK, canaries))
        kept = ids if opposite else ids[joins[ids]]
        rows = torch.zeros(len(kept), 1, canaries * width)
        for place, canary in enumerate(kept):
            sign = 1.0 if joins[canary] else -1.0
            rows[place, 0, canary * width : (canary + 1) * width] = sign * values
        yield RowChunk(torch.from_numpy(kept.astype(np.int64)), rows, slice(0, 1))

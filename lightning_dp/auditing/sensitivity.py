"""Audit B: how far one record moves a release, seen with the same noise twice."""

from dataclasses import dataclass

import torch

from lightning_dp.auditing.bounds import epsilon_of_mu
from lightning_dp.auditing.door import Door, Heard
from lightning_dp.auditing.neighbours import Pair, neighbouring_pairs
from lightning_dp.auditing.result import AuditResult, Line, Plot, judge

FINDS = (
    "a missing, per-layer or per-batch bound, clipping after accumulation, a divisor that follows the batch, a release "
    "that depends on the data past its noise, a sensitivity stated for another relation or another number of rows"
)
MISSES = "wrong noise; canaries that are not on its list; what a method does to a record before it becomes a row"

_SEED = 20_261_128
_TIE = 1e-6  # the margin that clipping keeps
_TOLERANCE = 1e-7  # float64 sums of rows of 400 bounds


@dataclass(frozen=True)
class Worst:
    """The pair of neighbours that moved the value furthest.

    Attributes:
        pair: The pair.
        shift: How far.
        left: What was overheard of it.
        right: And of its neighbour.
    """

    pair: Pair
    shift: float
    left: Heard
    right: Heard


def compare(door: Door, pair: Pair) -> tuple[float, Heard, Heard]:
    """Return how far a pair is apart under equal noise, and what was overheard.

    The noisy values count as well as the measured ones where noise is additive: noise that depends on the data would
    not cancel. So do released values that `decode` alone does not explain.
    """
    left = door.open(seed=_SEED, silent=True).release(pair.left)
    right = door.open(seed=_SEED, silent=True).release(pair.right)
    shift = float((left.measured - right.measured).norm())
    if door.has_additive_noise and left.noisy.shape == right.noisy.shape:
        shift = max(shift, float((left.noisy - right.noisy).norm()))
    return shift, left, right


def worst_pair(door: Door) -> tuple[Worst, dict[str, float]]:
    """Return the worst pair of neighbours on the list, and how far each moved the value.

    Of pairs that are about as bad, the one with the fewest rows, which is quickly released again.
    """
    worst: Worst | None = None
    shifts: dict[str, float] = {}
    for pair in neighbouring_pairs(door):
        shift, left, right = compare(door, pair)
        shifts[pair.name] = shift
        is_smaller = worst is not None and shift > worst.shift * (1 - _TIE) and len(pair) < len(worst.pair)
        if worst is None or shift > worst.shift * (1 + _TIE) or is_smaller:
            worst = Worst(pair, shift, left, right)
    assert worst is not None  # every relation with a proof has a change, and the lists of canaries are fixed
    return worst, shifts


def audit_sensitivity(door: Door, *, delta: float = 1e-5) -> AuditResult:
    """Compare neighbours under equal noise, worst canaries against worst bases.

    Args:
        door: What is audited.
        delta: Of the claim.
    """
    worst, shifts = worst_pair(door)
    largest = max(shifts.values())
    limit, std = door.sensitivity, door.mechanism.noise_std(door.plan)
    leaks = _leaks_past_noise(door, worst.pair)
    ratio = largest / limit
    is_broken = ratio > 1 + _TOLERANCE or leaks
    claimed = door.epsilon(delta)
    summary = f"{worst.pair.name} moved the value by {worst.shift:.6g}; {limit:.6g} is charged"
    if leaks:
        summary += "; what left is not what decoding the noisy value gives, so data pass the noise"
    ordered = sorted(value / limit for value in shifts.values())
    return AuditResult(
        audit="sensitivity",
        subject=str(door),
        # With Gaussian noise of the stated std this shift alone costs so much, if all of the noisy value leaves.
        lower_bound=(
            epsilon_of_mu(worst.shift / std, delta)
            if door.has_gaussian_noise and door.charges_noisy_value and std > 0
            else None
        ),
        confidence=1.0,
        claimed_epsilon=claimed,
        delta=delta,
        verdict=judge(is_alarm=is_broken, is_doubt=False),
        summary=summary,
        finds=FINDS,
        misses=MISSES,
        measured={"largest_shift": largest, "sensitivity": limit, "ratio": ratio, "pairs": float(len(shifts))},
        plot=Plot(
            x_label="pairs of neighbours",
            y_label="shift / sensitivity",
            lines=(
                Line(label="measured", x=tuple(map(float, range(len(ordered)))), y=tuple(ordered)),
                Line(label="charged", x=(0.0, float(max(1, len(ordered) - 1))), y=(1.0, 1.0), is_dashed=True),
            ),
        ),
    )


def _leaks_past_noise(door: Door, pair: Pair) -> bool:
    """Tell whether a released value is anything else than a clean copy of the mechanism makes of the noisy one."""
    for world in (pair.left, pair.right):
        heard = door.open(seed=_SEED).release(world)
        clean, noisy = door.open().tap.mechanism, heard.noisy.reshape(door.shape[0], -1).clone()
        expected = clean.decode(noisy, door.plan, 1, door.public_seed).to(torch.float32)
        if not torch.allclose(heard.released, expected.flatten(), rtol=1e-5, atol=0):
            return True
    return False

"""Audit A: the standard deviation of the noise, from many releases of the same rows."""

import math

import torch
from scipy import stats
from torch import Tensor

from lightning_dp.auditing.bounds import epsilon_of_mu, std_interval
from lightning_dp.auditing.door import Door
from lightning_dp.auditing.neighbours import World
from lightning_dp.auditing.result import ALARM_CONFIDENCE, AuditResult, Plot, judge
from lightning_dp.auditing.sensitivity import worst_pair

FINDS = (
    "noise divided by the world size, a variance taken for a standard deviation, noise a few percent low, the same "
    "noise every time, coordinates without noise, noise drawn on every rank"
)
MISSES = "too large a sensitivity; noise that is right in size and wrong in law; noise that is replayed after a resume"

_LEAST_CALLS = 20
_WANTED_DRAWS = 40_000  # the std is then known to 0.35 %
_MOST_COORDINATES = 20_000
_SHOWN = 4000


def audit_noise(door: Door, *, calls: int | None = None, confidence: float = 0.95, delta: float = 1e-5) -> AuditResult:
    """Compare the noise of repeated releases with what the event states, from both sides.

    Args:
        door: What is audited; its event states additive Gaussian noise.
        calls: Releases; None takes enough for the std to be known to a third of a percent.
        confidence: Of the interval that is reported.
        delta: Of the claim.
    """
    worst, _ = worst_pair(door)
    draws = repeated_noise(door, worst.pair.left, calls)  # (calls, coordinates)
    num_calls, num_coordinates = draws.shape
    degrees = (num_calls - 1) * num_coordinates
    energies = (draws - draws.mean(dim=0)).square().sum(dim=0)
    declared, energy = door.law.std, float(energies.sum())
    measured = math.sqrt(energy / degrees)
    low, high = std_interval(energy, degrees, confidence)
    alarm_low, alarm_high = std_interval(energy, degrees, ALARM_CONFIDENCE)
    # A coordinate without noise hides in a mean over many: each one is asked, at a level shared by all.
    level = (1 - ALARM_CONFIDENCE) / num_coordinates
    bare = int((energies < declared**2 * stats.chi2.ppf(level, num_calls - 1)).sum())
    epsilon = epsilon_of_mu(worst.shift / high, delta) if high > 0 else math.inf
    return AuditResult(
        audit="noise",
        subject=str(door),
        lower_bound=epsilon if door.has_gaussian_noise and door.charges_noisy_value else None,
        confidence=confidence,
        claimed_epsilon=door.epsilon(delta),
        delta=delta,
        verdict=judge(
            is_alarm=not alarm_low <= declared <= alarm_high or bare > 0, is_doubt=not low <= declared <= high
        ),
        summary=(
            f"std {measured:.5g} [{low:.5g}, {high:.5g}] over {num_calls} releases of {num_coordinates} coordinates; "
            f"{declared:.5g} is stated" + (f"; {bare} coordinates have too little of it" if bare else "")
        ),
        finds=FINDS,
        misses=MISSES,
        measured={
            "std": measured,
            "std_low": low,
            "std_high": high,
            "declared_std": declared,
            "calls": float(num_calls),
            "coordinates": float(num_coordinates),
            "bare_coordinates": float(bare),
        },
        plot=Plot(
            x_label="noise / stated std",
            y_label="density",
            histograms={
                "measured": tuple(((draws - draws.mean(dim=0)) / declared).flatten()[:_SHOWN].tolist()),
                "stated": tuple(stats.norm.ppf((torch.arange(_SHOWN).numpy() + 0.5) / _SHOWN).tolist()),
            },
        ),
    )


def repeated_noise(door: Door, rows: World = (), calls: int | None = None) -> Tensor:
    """Return the noise of repeated releases of the same rows, (calls, coordinates), float64.

    Coordinates beyond twenty thousand are thinned evenly.

    Args:
        door: What is audited.
        rows: What is released.
        calls: Releases; None takes enough.
    """
    opened = door.open()

    def one() -> Tensor:
        heard = opened.release(rows)
        noise = heard.noisy - heard.measured
        return noise[:: math.ceil(len(noise) / _MOST_COORDINATES)]

    kept = [one()]
    calls = max(_LEAST_CALLS, math.ceil(_WANTED_DRAWS / len(kept[0]))) if calls is None else calls
    return torch.stack(kept + [one() for _ in range(calls - 1)])

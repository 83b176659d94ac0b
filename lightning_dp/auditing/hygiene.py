"""Audit G: whether noise is what it should be: its law, its precision, and that no two draws of it know each other."""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from lightning_dp.auditing.door import Door, Heard, NoiseLawOf
from lightning_dp.auditing.result import ALARM_CONFIDENCE, AuditResult, Plot, judge

FINDS = (
    "seeds that come again (each step, each layer, each start of a process), draws in single or half precision, whose "
    "tails end, another law than the normal one"
)
MISSES = "the size of the noise; a generator that only its inventor can predict"

_ALARM_P = 1e-6  # five questions are asked
_DOUBT_P = 1e-4
_BLOCKS = 4
_WANTED_DRAWS = 6000
_COMPARED = 12  # releases whose draws are compared pair by pair
_SHOWN = 4000


def audit_hygiene(
    door: Door, *, releases: int | None = None, make_door: Callable[[], Door] | None = None
) -> AuditResult:
    """Look at the noise of a few releases of nothing, in one process and in another start of it.

    Args:
        door: What is audited; its event states additive Gaussian noise.
        releases: Releases of one session; None takes enough for the law to show.
        make_door: Makes the door of another start; None opens the same one again, with whatever secret it then draws.
    """
    opened, again = door.open(), (door if make_door is None else make_door()).open()
    law = door.law
    std = law.std
    first = _noise(opened.release(()))
    releases = max(6, math.ceil(_WANTED_DRAWS / len(first))) if releases is None else releases
    draws = torch.stack([first, *(_noise(opened.release(())) for _ in range(releases - 1))]) / std
    few = draws[:_COMPARED]
    others = torch.stack([_noise(again.release(())) for _ in range(len(few))]) / std
    pooled = draws.flatten()
    found = {
        "p of the law": _law_p(pooled.numpy() * std, law),
        "p of releases alike": _least_p(few),
        "p of blocks alike": _least_p(_blocks(few)),
        "p of starts alike": _least_p(torch.cat([few, others])),
    }
    is_whole = law.step > 0
    # Whole numbers come again and have no last bits; they have to be whole instead.
    duplicates = 0.0 if is_whole else 1 - len(torch.unique(pooled)) / len(pooled)
    single = 0.0 if is_whole else _share_of_single_precision(pooled)
    off = float(((pooled * std / law.step).frac().abs() - 0.5).abs().le(0.499).double().mean()) if is_whole else 0.0
    name, worst = min(found.items(), key=lambda item: item[1])
    return AuditResult(
        audit="noise hygiene",
        subject=str(door),
        lower_bound=None,
        confidence=ALARM_CONFIDENCE,
        claimed_epsilon=None,
        delta=0.0,
        verdict=judge(
            is_alarm=worst < _ALARM_P or duplicates > 0.01 or single > 0.01 or off > 0, is_doubt=worst < _DOUBT_P
        ),
        summary=(
            f"smallest p-value {worst:.2g} ({name[5:]}), {duplicates:.2%} duplicates, {single:.2%} in single precision"
            f", over {pooled.numel()} draws"
        ),
        finds=FINDS,
        misses=MISSES,
        measured={**found, "duplicates": duplicates, "single_precision": single, "off_the_grid": off},
        plot=Plot(
            x_label="noise / stated std",
            y_label="density",
            histograms={
                "drawn": tuple(pooled[:_SHOWN].tolist()),
                "normal": tuple(stats.norm.ppf((np.arange(_SHOWN) + 0.5) / _SHOWN).tolist()),
            },
        ),
    )


def _law_p(draws: NDArray[np.float64], law: NoiseLawOf) -> float:
    """Return the p-value of Kolmogorov and Smirnov; too large, never too small, where values come again."""
    values, counts = np.unique(draws, return_counts=True)
    distance = float(np.abs(np.cumsum(counts) / len(draws) - law.cdf(values)).max())
    return float(stats.kstwobign.sf(math.sqrt(len(draws)) * distance))


def _noise(heard: Heard) -> Tensor:
    return heard.noisy - heard.measured


def _blocks(draws: Tensor) -> Tensor:
    """Return each release cut into blocks, as layers would be, (blocks, numbers)."""
    width = draws.shape[1] // _BLOCKS
    return torch.cat([draws[:, part * width : (part + 1) * width] for part in range(_BLOCKS)]) if width else draws


def _least_p(rows: Tensor) -> float:
    """Return the p-value of the most correlated pair of rows, for all pairs together (Bonferroni)."""
    num_rows, length = rows.shape
    if length < 10:  # too short to tell
        return 1.0
    correlation = torch.corrcoef(rows.double()).fill_diagonal_(0).nan_to_num(1.0).abs().max().clamp(max=1 - 1e-12)
    t = float(correlation * math.sqrt(length - 2) / (1 - correlation**2).sqrt())
    return min(1.0, num_rows * (num_rows - 1) * float(stats.t.sf(t, length - 2)))


def _share_of_single_precision(draws: Tensor) -> float:
    """Return the share of draws that float32 holds to the last bits of a double.

    The distance of a true double to the nearest float32 is uniform within 2^-25 of it; once in 2^-21 it is below 2^-46.
    """
    nearest = draws.to(torch.float32).to(torch.float64)
    return float(((draws - nearest).abs() <= draws.abs() * 2.0**-46).double().mean())

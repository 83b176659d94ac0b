"""Audit G: whether noise is what it should be: its law, its precision, and that no two draws of it know each other."""

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from lightning_dp.auditing.door import Door, Heard
from lightning_dp.auditing.result import AuditResult, Plot, judge

FINDS = (
    "seeds that come again (each step, each layer, each start of a process), draws in single or half precision, whose "
    "tails end, another law than the normal one"
)
MISSES = "the size of the noise; a generator that only its inventor can predict"

_ALARM = 6.0
_DOUBT = 4.0
_LEAST_P = 1e-7
_BLOCKS = 4
_SHOWN = 4000


def audit_hygiene(door: Door, *, releases: int = 6, make_door: Callable[[], Door] | None = None) -> AuditResult:
    """Look at the noise of a few releases of nothing, in one process and in another start of it.

    Args:
        door: What is audited; its event states additive Gaussian noise.
        releases: Releases of one session.
        make_door: Makes the door of another start; None opens the same one again, with whatever secret it then draws.
    """
    opened, again = door.open(), (door if make_door is None else make_door()).open()
    std = door.mechanism.noise_std(door.plan)
    draws = torch.stack([_noise(opened.release(())) for _ in range(releases)]) / std
    others = torch.stack([_noise(again.release(())) for _ in range(releases)]) / std
    pooled = draws.flatten()
    law = float(stats.kstest(pooled.numpy(), "norm").pvalue)
    found = {
        "correlation of releases": _largest_correlation(draws),
        "correlation of blocks": _largest_correlation(_blocks(draws)),
        "correlation of starts": _largest_correlation(torch.cat([draws, others])),
    }
    duplicates = 1 - len(torch.unique(pooled)) / len(pooled)
    single = _share_of_single_precision(pooled)
    is_wrong = duplicates > 0.01 or single > 0.01 or law < _LEAST_P
    name, worst = max(found.items(), key=lambda item: item[1])
    return AuditResult(
        audit="noise hygiene",
        subject=str(door),
        lower_bound=None,
        confidence=0.9999,
        claimed_epsilon=None,
        delta=0.0,
        verdict=judge(is_alarm=is_wrong or worst > _ALARM, is_doubt=worst > _DOUBT or law < 1e-4),
        summary=(
            f"largest z {worst:.2f} ({name}), {duplicates:.2%} duplicates, {single:.2%} in single precision, "
            f"Kolmogorov-Smirnov p {law:.2g}, over {pooled.numel()} draws"
        ),
        finds=FINDS,
        misses=MISSES,
        measured={f"z {name}": value for name, value in found.items()}
        | {"duplicates": duplicates, "single_precision": single, "ks_p": law},
        plot=Plot(
            x_label="noise / stated std",
            y_label="density",
            histograms={
                "drawn": tuple(pooled[:_SHOWN].tolist()),
                "normal": tuple(stats.norm.ppf((np.arange(_SHOWN) + 0.5) / _SHOWN).tolist()),
            },
        ),
    )


def _noise(heard: Heard) -> Tensor:
    return heard.noisy - heard.measured


def _blocks(draws: Tensor) -> Tensor:
    """Return each release cut into blocks, as layers would be, (blocks, numbers)."""
    width = draws.shape[1] // _BLOCKS
    return torch.cat([draws[:, part * width : (part + 1) * width] for part in range(_BLOCKS)]) if width else draws


def _largest_correlation(rows: Tensor) -> float:
    """Return the largest |z| of the correlation of two rows."""
    if rows.shape[1] < 2:
        return 0.0
    correlation = torch.corrcoef(rows.double())
    correlation.fill_diagonal_(0)
    return float(correlation.nan_to_num(1.0).abs().max()) * math.sqrt(rows.shape[1])


def _share_of_single_precision(draws: Tensor) -> float:
    """Return the share of draws that float32 holds to the last bits of a double.

    The distance of a true double to the nearest float32 is uniform within 2^-25 of it; once in 2^-21 it is below 2^-46.
    """
    nearest = draws.to(torch.float32).to(torch.float64)
    return float(((draws - nearest).abs() <= draws.abs() * 2.0**-46).double().mean())

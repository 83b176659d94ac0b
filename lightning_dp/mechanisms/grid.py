"""Rows in whole steps of a grid, so that sums are exact and a bound on a row is checked and not argued."""

import math
from fractions import Fraction
from typing import Final

import torch
from torch import Tensor

from lightning_dp.errors import PrivacyProtocolError
from lightning_dp.mechanisms.rows import entries_at_once

_STEPS_PER_BOUND: Final = 21  # bits: sums of 2^32 rows stay below 2^53, up to which float64 holds every whole number
_BLOCK_ENTRIES: Final = 2**15  # at a time, so that all steps of one entry happen in the cache
_MAX_ROUNDING: Final = 1e-3  # of a step; sums of steps that are no powers of two are off by less than 2^-20


def step_below(bound: float) -> float:
    """Return the power of two of which `bound` is between 2^20 and 2^21 steps."""
    return math.ldexp(1.0, math.frexp(bound)[1] - _STEPS_PER_BOUND)


def cut_to_grid(rows: Tensor, *, step: float, bound: float, factors: Tensor | float = 1.0) -> Tensor:
    """Return rows, scaled and then with every entry cut towards zero to whole steps, float64.

    A number that is cut is never larger, so norms do not grow and no bound needs a margin. The norm of what comes out
    is then checked in whole numbers: a vector beyond the bound, as rounding before this call could make, sends zeros.

    Args:
        rows: (..., dim), finite.
        step: A power of two.
        bound: What no vector's norm may exceed, below 2^22 steps.
        factors: What vectors are multiplied by first, (..., 1), float64.
    """
    cut = torch.empty(rows.shape, dtype=torch.float64, device=rows.device)
    squares = torch.zeros(rows.shape[:-1], dtype=torch.float64, device=rows.device)
    width = max(1, entries_at_once(_BLOCK_ENTRIES, rows.device) * rows.shape[-1] // max(1, rows.numel()))
    for part, whole in zip(rows.split(width, dim=-1), cut.split(width, dim=-1), strict=True):
        torch.mul(part.to(torch.float64), factors, out=whole)
        whole.mul_(1 / step).trunc_()  # exact: the step is a power of two
        # Exact below 2^53, and above it larger than the bound, whose square is below 2^44.
        squares += torch.linalg.vecdot(whole, whole)
        whole.mul_(step)
    is_beyond = ~(squares <= math.floor(Fraction(bound / step) ** 2))  # also where it is no number
    return cut.masked_fill_(is_beyond.unsqueeze(-1), 0.0) if bool(is_beyond.any()) else cut


def whole_steps(values: Tensor, step: float) -> Tensor:
    """Return values that lie on a grid as numbers of steps, int64.

    Args:
        values: Of any shape, float64.
        step: Of the grid, > 0.

    Raises:
        PrivacyProtocolError: They do not lie on it, or too far out for float64 to tell.
    """
    steps = values / step
    whole = steps.round()
    if not bool(((steps - whole).abs() <= _MAX_ROUNDING).all() and (whole.abs() < 2.0**52).all()):
        raise PrivacyProtocolError(
            "Expected a sum in whole steps, below 2^52 of them, got one beside the grid: noise in whole numbers would "
            "not hide the rest. Encode rows by cut_to_grid()."
        )
    return whole.to(torch.int64)

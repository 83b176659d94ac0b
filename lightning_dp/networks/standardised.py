"""Weights standardised over their inputs, which remember what they were made of."""

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_SQUARES = 1e-4
_MARK = "_standardised_from"


@dataclass(frozen=True, eq=False)
class StandardisedFrom:
    """What a standardised weight was made of: whoever wants its gradients need not differentiate.

    Attributes:
        weight: W, (outputs, ...).
        gain: (outputs, 1, ...).
        centred: c = W - mean(W), (outputs, ...).
        squares: |c|^2 of each output, (outputs, 1, ...).
        version: How often the standardised weight had been written to when it was made.
    """

    weight: Tensor
    gain: Tensor
    centred: Tensor
    squares: Tensor
    version: int


def standardised(weight: Tensor, gain: Tensor) -> Tensor:
    """Return gain * c / sqrt(max(|c|^2, 1e-4)) with c = W - mean(W), each output by itself.

    Args:
        weight: W, (outputs, ...).
        gain: (outputs, 1, ...).
    """
    rest = tuple(range(1, weight.dim()))
    centred = weight - weight.mean(rest, keepdim=True)
    squares = centred.square().sum(rest, keepdim=True)
    result = centred * (torch.rsqrt(squares.clamp(min=MIN_SQUARES)) * gain)
    source = StandardisedFrom(weight, gain, centred.detach(), squares.detach(), result._version)
    setattr(result, _MARK, source)
    return result


def made_from(weight: Tensor) -> StandardisedFrom | None:
    """Return what `standardised` made a weight from; None for others, and where it was written to since."""
    source: StandardisedFrom | None = getattr(weight, _MARK, None)
    return source if source is not None and source.version == weight._version else None

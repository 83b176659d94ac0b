"""Group normalisation whose backward pass and per-record gradients share their sums over places.

Symbols: x a map, mu and r the mean and the inverse deviation of its group of M numbers, gamma the gain, g the gradient
of the outputs. With S0 = sum g and S1 = sum g x over the places of a channel, the gradients are

    of the offset:  S0,
    of the gain:    r (S1 - mu S0),
    of x:           r (gamma g - A - (x - mu) r B),  A and B the sums over the group of gamma times those two, over M.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_dp.gradients.layers import Layer
from lightning_dp.gradients.parts import Part, Rows


class GroupNormLayer(Layer):
    """`F.group_norm` of maps with channels in the first axis of an item.

    Args:
        weight: See `Layer`.
        bias: See `Layer`.
        num_groups: Groups of channels.
        item_dims: Axes of an item.
        eps: Added to variances.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, num_groups: int, item_dims: int, eps: float) -> None:
        super().__init__(weight, bias)
        self._num_groups, self.item_dims, self._eps = num_groups, item_dims, eps
        self._sums: tuple[Tensor, Tensor] | None = None

    def _forward(self, inputs: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        maps = inputs if _is_channels_last(inputs) else inputs.contiguous()
        self._inputs = maps.detach()
        outputs: Tensor = _GroupNorm.apply(maps, weight, bias, self)
        return outputs

    def normalise(self, maps: Tensor, gain: Tensor, offset: Tensor | None) -> Tensor:
        """Return the outputs of maps, (n * items, C, ...), and keep their groups' statistics."""
        num, channels = maps.shape[:2]
        places = maps[0, 0].numel()
        if _is_channels_last(maps):  # the stride of an axis of length 1 may be anything, but the kernel goes by it
            maps = maps.as_strided(maps.shape, (places * channels, 1, maps.shape[3] * channels, channels))
        outputs, mean, inverse = torch.native_group_norm(
            maps, gain, offset, num, channels, places, self._num_groups, self._eps
        )
        self._mean, self._inverse = (_of_channels(found, channels) for found in (mean, inverse))
        return outputs

    def input_gradient(self, gradient: Tensor, gain: Tensor) -> Tensor:
        """Return the gradient of the inputs from that of the outputs."""
        total, along = self._take_sums(gradient)
        size = gradient[0].numel() // self._num_groups
        a, b = (
            _of_channels((gain * part).unflatten(1, (self._num_groups, -1)).sum(2) / size, gradient.shape[1])
            for part in (total, along)
        )
        slope = self._inverse.square() * b
        shift = self._mean * slope - self._inverse * a
        wide = (slice(None), slice(None), *[None] * (gradient.dim() - 2))
        result = gradient * (self._inverse * gain)[wide]
        return result.addcmul_(self._inputs, slope[wide], value=-1.0).add_(shift[wide])

    def _of_weight(self, gradient: Tensor, *, as_rows: bool) -> Part:
        return Rows(self._over_items(self._sums_of(gradient)[1]))

    def _of_bias(self, gradient: Tensor) -> Tensor:
        return self._sums_of(gradient)[0]

    def _sums_of(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of offset and gain of every item, (n * items, C); they serve the backward pass too."""
        if self._sums is None:
            places = tuple(range(2, gradient.dim()))
            total, along = (part.sum(places) if places else part for part in (gradient, gradient * self._inputs))
            self._sums = total, along.sub_(self._mean * total).mul_(self._inverse)
        return self._sums

    def _take_sums(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        sums, self._sums = self._sums_of(gradient), None
        return sums


def _is_channels_last(maps: Tensor) -> bool:
    return maps.dim() == 4 and not maps.is_contiguous() and maps.is_contiguous(memory_format=torch.channels_last)


def _of_channels(of_groups: Tensor, channels: int) -> Tensor:
    """Return numbers of groups, (n, groups), for each of their channels."""
    return of_groups.repeat_interleave(channels // of_groups.shape[1], 1)


class _GroupNorm(torch.autograd.Function):
    """What `GroupNormLayer` runs; weights are constants."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, gain: Tensor, offset: Tensor | None, layer: GroupNormLayer) -> Tensor:
        ctx.layer, ctx.gain = layer, gain
        return layer.normalise(maps, gain, offset)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = gradients
        return ctx.layer.input_gradient(gradient, ctx.gain), None, None, None

"""Uses of a trained weight in a forward pass, and what makes up the per-record gradients there.

A layer that multiplies by its weight has, for one record, the gradient sum_t left_t x right_t over the T places where
the weight is used: an input on one side, an output gradient on the other.

Shapes: n records of a chunk, T places, p x d numbers of a weight.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dp.gradients.parts import Order, Part, Rows, product
from lightning_dp.gradients.standardised import Standardisation, StandardisedRows
from lightning_dp.networks.standardised import made_from


class Layer(ABC):
    """One use of trained parameters in the forward pass, for all records of a chunk.

    Args:
        weight: As the layer got it: a parameter, or a tensor computed from parameters.
        bias: The same, or None.
    """

    item_dims = 1

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def run(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, torch.Size]:
        """Return the outputs of all items, the items' axes in one, and the lengths of those axes; keep the inputs.

        Args:
            inputs: (n, ..., item), records first; an item has `item_dims` axes.
            weight: A constant of the value of `self.weight`.
            bias: The same.
        """
        leading = inputs.shape[: inputs.dim() - self.item_dims]
        self.num_records, self.num_items = leading[0], math.prod(leading[1:])
        flat = inputs.flatten(0, len(leading) - 1)
        self._inputs = flat.detach()
        return self._forward(flat, weight, bias), leading

    @abstractmethod
    def _forward(self, inputs: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return the outputs, one for each item."""

    @abstractmethod
    def _of_weight(self, gradient: Tensor, *, as_rows: bool) -> Part:
        """Return what makes up the per-record gradients of the weight."""

    @abstractmethod
    def _of_bias(self, gradient: Tensor) -> Tensor:
        """Return the per-item gradients of the bias, summed over places, (n * items, size)."""

    def parts(self, gradient: Tensor, *, as_rows: bool) -> list[tuple[Tensor, Part]]:
        """Return, for weight and bias if they are trained, what makes up their per-record gradients.

        Args:
            gradient: Of the summed losses with respect to the outputs.
            as_rows: Keep no factors.
        """
        gradient = gradient.to(self._inputs.dtype)
        pairs = self._of_weights(gradient, as_rows=as_rows) if self.weight.requires_grad else []
        if self.bias is not None and self.bias.requires_grad:
            pairs.append((self.bias, Rows(self._over_items(self._of_bias(gradient)))))
        return pairs

    def _of_weights(self, gradient: Tensor, *, as_rows: bool) -> list[tuple[Tensor, Part]]:
        """Return the same for whatever the weight was made of."""
        return [(self.weight, self._of_weight(gradient, as_rows=as_rows))]

    def _over_items(self, values: Tensor) -> Tensor:
        """Return sums over the items of a record, (n, size), of values (n * items, size)."""
        return values if self.num_items == 1 else values.unflatten(0, (self.num_records, self.num_items)).sum(1)


class _MatrixLayer(Layer):
    """A layer that multiplies by its weight; one that was standardised is seen through, row by row."""

    _through: Standardisation | None = None

    @property
    def _order(self) -> Order | None:
        """How the rows of the weight lie."""
        return None

    def _of_weights(self, gradient: Tensor, *, as_rows: bool) -> list[tuple[Tensor, Part]]:
        source = made_from(self.weight)
        are_trained = source is not None and source.weight.requires_grad and source.gain.requires_grad
        if source is None or not are_trained or not Standardisation.takes(source):
            return super()._of_weights(gradient, as_rows=as_rows)
        self._through = Standardisation(source, self.num_records, self._order)
        rows = self._of_weight(gradient, as_rows=as_rows)
        assert isinstance(rows, Rows)
        return [(source.weight, StandardisedRows(rows, self._through)), (source.gain, Rows(self._through.gains))]

    def _product(self, left: Tensor, right: Callable[[slice], Tensor], d: int, *, as_rows: bool) -> Part:
        """Return the gradients sum_t left_t x right_t; see `product`."""
        measure = None if self._through is None else self._through.measure
        return product(left, right, d, as_rows=as_rows, order=self._order, measure=measure)


class LinearLayer(_MatrixLayer):
    """`F.linear`, used at any number of places of a record."""

    def _forward(self, inputs: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return F.linear(inputs, weight, bias)

    def _of_weight(self, gradient: Tensor, *, as_rows: bool) -> Part:
        left, right = (tensor.unflatten(0, (self.num_records, -1)) for tensor in (gradient, self._inputs))
        return self._product(left, lambda few: right[few], right.shape[2], as_rows=as_rows)

    def _of_bias(self, gradient: Tensor) -> Tensor:
        return gradient


class _SpatialLayer(_MatrixLayer):
    """What both convolutions share: one input meets patches of the other, (n, T, kernel * channels).

    On a CPU, maps are handed on with channels last: pooling is several times as fast on them.

    Args:
        weight: See `Layer`.
        bias: See `Layer`.
        stride: Vertical and horizontal.
        padding: The same.
        output_padding: Of a transposed convolution.
    """

    item_dims = 3

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        output_padding: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__(weight, bias)
        self.stride, self.padding, self.output_padding = stride, padding, output_padding

    def _forward(self, inputs: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        maps = _channels_last(inputs)
        self._inputs = maps.detach()
        return _channels_last(self._convolve(maps, _channels_last(weight), bias))

    @abstractmethod
    def _convolve(self, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's outputs of maps, (n, C, H, W)."""

    def _of_bias(self, gradient: Tensor) -> Tensor:
        return gradient.sum((2, 3))

    @property
    def _order(self) -> Order | None:
        size, channels, *kernel = self.weight.shape
        return Order((size, *kernel, channels), (0, 3, 1, 2))

    def _meeting(self, places: Tensor, met: Tensor, *, as_rows: bool) -> Part:
        """Return the gradient of the weight.

        Args:
            places: What sits at each place where the kernel is laid, (n * items, p, h, w).
            met: What the kernel meets there, (n * items, C, H, W).
            as_rows: Keep no factors.
        """
        kernel, grid = self.weight.shape[2:], places.shape[2:]
        d = met.shape[1] * math.prod(kernel)

        def right(few: slice) -> Tensor:
            maps = met[few.start * self.num_items : few.stop * self.num_items]
            found = patches(maps, kernel, self.stride, self.padding, grid)
            return found.reshape(-1, self.num_items * math.prod(grid), d)

        left = places.permute(0, 2, 3, 1).reshape(self.num_records, -1, places.shape[1])
        return self._product(left, right, d, as_rows=as_rows)


class ConvLayer(_SpatialLayer):
    """`F.conv2d` without groups and dilation."""

    def _convolve(self, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(maps, weight, bias, self.stride, self.padding)

    def _of_weight(self, gradient: Tensor, *, as_rows: bool) -> Part:
        return self._meeting(gradient, self._inputs, as_rows=as_rows)


class ConvTransposeLayer(_SpatialLayer):
    """`F.conv_transpose2d` without groups and dilation: a convolution with inputs and output gradients swapped."""

    def _convolve(self, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv_transpose2d(maps, weight, bias, self.stride, self.padding, self.output_padding)

    def _of_weight(self, gradient: Tensor, *, as_rows: bool) -> Part:
        return self._meeting(self._inputs, _channels_last(gradient), as_rows=as_rows)


class NormLayer(Layer):
    """Group or layer normalisation: gain and bias after a function without parameters.

    Args:
        weight: See `Layer`.
        bias: See `Layer`.
        normalise: Takes items, gain and bias (or None twice).
        item_dims: Axes of an item.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        normalise: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
        item_dims: int,
    ) -> None:
        super().__init__(weight, bias)
        self._normalise, self.item_dims = normalise, item_dims

    def _forward(self, inputs: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return self._normalise(inputs, weight, bias)

    def _of_weight(self, gradient: Tensor, *, as_rows: bool) -> Part:
        normed = self._normalise(self._inputs, None, None)
        return Rows(self._over_items(self._of_bias(normed.mul_(gradient))))

    def _of_bias(self, gradient: Tensor) -> Tensor:
        # Gain and bias have the first axes of an item: channels of a group norm, everything of a layer norm.
        places = tuple(range(1 + self.weight.dim(), gradient.dim()))
        return (gradient.sum(places) if places else gradient).flatten(1)


def patches(
    maps: Tensor, kernel: torch.Size, stride: tuple[int, int], padding: tuple[int, int], grid: torch.Size
) -> Tensor:
    """Return what a kernel meets at each place of a grid, (n, h, w, kernel, C), of maps (n, C, H, W).

    One copy out of a strided view, where `F.unfold` takes several times as long.

    Args:
        maps: (n, C, H, W).
        kernel: Its height and width.
        stride: Vertical and horizontal.
        padding: The same.
        grid: (h, w), how often the kernel is laid.
    """
    maps = F.pad(maps, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else maps
    num, channels = maps.shape[:2]
    of_n, of_channel, of_row, of_column = maps.stride()
    return maps.as_strided(
        (num, *grid, *kernel, channels),
        (of_n, of_row * stride[0], of_column * stride[1], of_row, of_column, of_channel),
        maps.storage_offset(),
    )


def _channels_last(maps: Tensor) -> Tensor:
    if maps.device.type != "cpu":
        return maps
    return maps.contiguous(memory_format=torch.channels_last)

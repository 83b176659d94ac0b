"""What layers see and pass back while `vmap` runs the loss of one record: the factors of per-record gradients.

A layer that multiplies by its weight has, for one record, the gradient sum_t left_t x right_t over the T places where
the weight is used: an input on one side, an output gradient on the other. One ordinary backward pass shows both.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode

from lightning_dp.gradients.parts import Order, Part, Rows, product


class UnsupportedNetwork(Exception):
    """The per-record gradients of this network or loss cannot be overheard; says why, for one line of the log."""


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
        pairs = [(self.weight, self._of_weight(gradient, as_rows=as_rows))] if self.weight.requires_grad else []
        if self.bias is not None and self.bias.requires_grad:
            pairs.append((self.bias, Rows(self._over_items(self._of_bias(gradient)))))
        return pairs

    def _over_items(self, values: Tensor) -> Tensor:
        """Return sums over the items of a record, (n, size), of values (n * items, size)."""
        return values if self.num_items == 1 else values.unflatten(0, (self.num_records, self.num_items)).sum(1)


class LinearLayer(Layer):
    """`F.linear`, used at any number of places of a record."""

    def _forward(self, inputs: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return F.linear(inputs, weight, bias)

    def _of_weight(self, gradient: Tensor, *, as_rows: bool) -> Part:
        left, right = (tensor.unflatten(0, (self.num_records, -1)) for tensor in (gradient, self._inputs))
        return product(left, lambda few: right[few], right.shape[2], as_rows=as_rows)

    def _of_bias(self, gradient: Tensor) -> Tensor:
        return gradient


class _SpatialLayer(Layer):
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

    def _product(self, places: Tensor, met: Tensor, *, as_rows: bool) -> Part:
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
        order = Order((places.shape[1], *kernel, met.shape[1]), (0, 3, 1, 2))
        return product(left, right, d, as_rows=as_rows, order=order)


class ConvLayer(_SpatialLayer):
    """`F.conv2d` without groups and dilation."""

    def _convolve(self, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(maps, weight, bias, self.stride, self.padding)

    def _of_weight(self, gradient: Tensor, *, as_rows: bool) -> Part:
        return self._product(gradient, self._inputs, as_rows=as_rows)


class ConvTransposeLayer(_SpatialLayer):
    """`F.conv_transpose2d` without groups and dilation: a convolution with inputs and output gradients swapped."""

    def _convolve(self, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv_transpose2d(maps, weight, bias, self.stride, self.padding, self.output_padding)

    def _of_weight(self, gradient: Tensor, *, as_rows: bool) -> Part:
        return self._product(self._inputs, _channels_last(gradient), as_rows=as_rows)


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


class Overhearing(TorchFunctionMode):
    """While it is active, layers that use trained parameters under `vmap` are run for all records and remembered.

    Weights take part as constants, so a backward pass through what comes out computes what plain training computes
    but for the gradients of the weights. Each layer's output gradient is worked off when it passes by.

    Args:
        as_rows: Form the gradient of every record; otherwise factors may be kept.

    Attributes:
        found: Weights (or what was computed from parameters and used as such), and the parts of their gradients.
        is_listening: Whether the backward pass runs.
        num_bytes: What the layers' inputs and outputs took, about.
        anchor: What to differentiate by, so that the backward pass reaches the first layers; None if none was met.
    """

    def __init__(self, *, as_rows: bool) -> None:
        super().__init__()
        self._as_rows = as_rows
        self.found: list[tuple[Tensor, Part]] = []
        self.is_listening = False
        self.anchor: Tensor | None = None
        self.num_bytes = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _READERS or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        inputs, weight, bias, make = _READERS[func](*args, **kwargs)
        if not any(tensor is not None and tensor.requires_grad for tensor in (weight, bias)):
            return func(*args, **kwargs)
        if weight is None:
            raise UnsupportedNetwork(f"{func.__name__} has a trained bias and no weight")
        return _PerRecord.apply(inputs, weight, bias, lambda *physical: self._run(make(), *physical))

    def _run(self, layer: Layer, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        outputs, leading = layer.run(inputs, weight.detach(), None if bias is None else bias.detach())
        self.num_bytes += inputs.nbytes + 2 * outputs.nbytes  # what comes after a layer keeps about as much
        version = inputs._version
        heard: list[bool] = []

        def listen(gradient: Tensor) -> None:
            if not self.is_listening or heard:
                raise UnsupportedNetwork("the loss differentiates the network itself")
            if inputs._version != version:
                raise UnsupportedNetwork("the input of a layer is overwritten after it was used")
            heard.append(True)
            with torch.autocast(gradient.device.type, enabled=False):
                self.found += layer.parts(gradient, as_rows=self._as_rows)

        if self.anchor is None:
            self.anchor = torch.zeros((), requires_grad=True)
        # A hook would not do: it is lost when a view is written to, as by an activation in place.
        return _Listening.apply(outputs.clone() if outputs._is_view() else outputs, self.anchor, listen).unflatten(
            0, leading
        )


class _PerRecord(torch.autograd.Function):
    """A layer under `vmap`: its rule is handed all records at once."""

    @staticmethod
    def forward(inputs: Tensor, weight: Tensor, bias: Tensor | None, run: Callable[..., Tensor]) -> NoReturn:
        raise UnsupportedNetwork("a layer is used on what is no record's own")

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise UnsupportedNetwork("the loss differentiates the network itself")

    @staticmethod
    def vmap(  # type: ignore[override]
        info: Any,
        in_dims: tuple[int | None, ...],
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        run: Callable[..., Tensor],
    ) -> tuple[Tensor, int]:
        if in_dims[0] is None or in_dims[1] is not None or in_dims[2] is not None:
            raise UnsupportedNetwork("a layer's weight depends on the record, or its input does not")
        return run(inputs.movedim(in_dims[0], 0), weight, bias), 0


class _Listening(torch.autograd.Function):
    """Passes outputs on as they are, and their gradient too, after it was heard; the anchor makes a graph of inputs."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, anchor: Tensor, listen: Callable[[Tensor], None]) -> Tensor:
        ctx.mark_dirty(outputs)
        ctx.listen = listen
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = gradients
        ctx.listen(gradient.detach())
        return gradient if ctx.needs_input_grad[0] else None, None, None


_Reading = tuple[Tensor, Tensor | None, Tensor | None, Callable[[], Layer]]


def _read_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Reading:
    return inputs, weight, bias, lambda: LinearLayer(weight, bias)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, str):
        raise UnsupportedNetwork(f"a convolution has padding={value!r}")
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _read_conv(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Reading:
    _refuse_sparse(dilation, groups)
    return inputs, weight, bias, lambda: ConvLayer(weight, bias, _pair(stride), _pair(padding))


def _read_conv_transpose(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> _Reading:
    _refuse_sparse(dilation, groups)
    return (
        inputs,
        weight,
        bias,
        lambda: ConvTransposeLayer(weight, bias, _pair(stride), _pair(padding), _pair(output_padding)),
    )


def _refuse_sparse(dilation: Any, groups: int) -> None:
    if _pair(dilation) != (1, 1) or groups != 1:
        raise UnsupportedNetwork(f"a convolution has groups={groups}, dilation={dilation}")


def _read_group_norm(
    inputs: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> _Reading:
    def normalise(maps: Tensor, gain: Tensor | None, offset: Tensor | None) -> Tensor:
        return F.group_norm(maps, num_groups, gain, offset, eps)

    return inputs, weight, bias, lambda: NormLayer(_some(weight), bias, normalise, inputs.dim() - 1)


def _read_layer_norm(
    inputs: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> _Reading:
    def normalise(values: Tensor, gain: Tensor | None, offset: Tensor | None) -> Tensor:
        return F.layer_norm(values, normalized_shape, gain, offset, eps)

    return inputs, weight, bias, lambda: NormLayer(_some(weight), bias, normalise, len(normalized_shape))


def _some(weight: Tensor | None) -> Tensor:
    assert weight is not None
    return weight


_READERS: Final[dict[Any, Callable[..., _Reading]]] = {
    F.linear: _read_linear,
    F.conv2d: _read_conv,
    F.conv_transpose2d: _read_conv_transpose,
    F.group_norm: _read_group_norm,
    F.layer_norm: _read_layer_norm,
}

"""Listening to layers while `vmap` runs the loss of one record: which weights are used, and what they pass back.

One ordinary backward pass then shows, at every use of a weight, both factors of the per-record gradients.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode

from lightning_dp.gradients.group_norm import GroupNormLayer
from lightning_dp.gradients.layers import ConvLayer, ConvTransposeLayer, Layer, LinearLayer, NormLayer
from lightning_dp.gradients.parts import Part


class UnsupportedNetwork(Exception):
    """The per-record gradients of this network or loss cannot be overheard; says why, for one line of the log."""


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
    def vmap(
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

    item_dims = inputs.dim() - 1
    if torch.is_autocast_enabled(inputs.device.type) or any(
        part.dtype != inputs.dtype for part in (weight, bias) if part is not None
    ):
        return inputs, weight, bias, lambda: NormLayer(_some(weight), bias, normalise, item_dims)
    return inputs, weight, bias, lambda: GroupNormLayer(_some(weight), bias, num_groups, item_dims, eps)


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

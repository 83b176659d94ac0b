"""TensorFlow's SAME padding for stride-2 convolutions of even sizes, and its exact adjoint.

PyTorch's own `padding=2, output_padding=1` is another, shifted operator (teacher networks of DataLens and G-PATE).
"""

import torch.nn.functional as F
from torch import Tensor, nn

KERNEL_SIZE = 5
STRIDE = 2


def same_conv2d(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the 5x5, stride-2 SAME convolution, (B, out, H/2, W/2), of (B, in, H, W) with H and W even.

    SAME pads an even size by 1 before and 2 after.

    Args:
        inputs: (B, in, H, W).
        weight: (out, in, 5, 5).
        bias: (out,) or None.
    """
    return F.conv2d(F.pad(inputs, (1, 2, 1, 2)), weight, bias, stride=STRIDE)


def same_conv_transpose2d(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the adjoint of `same_conv2d`, (B, out, 2H, 2W), of (B, in, H, W).

    Args:
        inputs: (B, in, H, W).
        weight: (in, out, 5, 5): for an adjoint pair, the very weight of the convolution.
        bias: (out,) or None.
    """
    height, width = inputs.shape[-2:]
    full = F.conv_transpose2d(inputs, weight, bias, stride=STRIDE)  # (B, out, 2H + 3, 2W + 3)
    return full[..., 1 : 1 + 2 * height, 1 : 1 + 2 * width]


class SameConv2d(nn.Conv2d):
    """`same_conv2d` as a layer; the size halves.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, KERNEL_SIZE, stride=STRIDE)

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return same_conv2d(inputs, self.weight, self.bias)


class SameConvTranspose2d(nn.ConvTranspose2d):
    """`same_conv_transpose2d` as a layer; the size doubles.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, KERNEL_SIZE, stride=STRIDE)

    def forward(self, inputs: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: D102
        return same_conv_transpose2d(inputs, self.weight, self.bias)

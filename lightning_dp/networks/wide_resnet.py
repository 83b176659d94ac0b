"""Wide residual networks for private training: group norm and weight standardisation (De et al. 2022)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dp.errors import ConfigurationError
from lightning_dp.networks.classifier import Classifier
from lightning_dp.networks.standardised import standardised

_GROUPS = 16


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose weight is standardised over its inputs and scaled by a learnt gain per output channel.

    W_hat = gain * (W - mean) / sqrt(max(fan_in * var, 1e-4)): each output of unit-variance inputs has variance gain^2.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        kernel: Side of the kernel; the padding keeps the size.
        stride: Stride.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, padding=kernel // 2)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1, 1))
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.fan_in))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def fan_in(self) -> int:
        """Number of inputs of one output."""
        return self.weight[0].numel()

    def forward(self, maps: Tensor) -> Tensor:
        """Return the convolution of maps, (B, C, H, W)."""
        return F.conv2d(maps, standardised(self.weight, self.gain), self.bias, self.stride, self.padding)


class _Activated(nn.Module):
    """ReLU, then group norm, then a convolution: the order of the published code."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_GROUPS, inputs)
        self.conv = StandardisedConv2d(inputs, outputs, kernel, stride)

    def forward(self, maps: Tensor) -> Tensor:
        convolved: Tensor = self.conv(self.norm(F.relu(maps)))
        return convolved


class _Block(nn.Module):
    """Two activated convolutions beside a skip branch, which has one of its own where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, is_first: bool) -> None:
        super().__init__()
        self.skip = _Activated(inputs, outputs, 1, stride) if is_first else nn.Identity()
        self.first = _Activated(inputs, outputs, 3, stride)
        self.second = _Activated(outputs, outputs, 3)

    def forward(self, maps: Tensor) -> Tensor:
        summed: Tensor = self.skip(maps) + self.second(self.first(maps))
        return summed


class WideResNet(Classifier):
    """WRN-depth-width with group norm and standardised convolutions (WRN-16-4: 2,753,818 parameters for 32 x 32 RGB).

    Args:
        image_shape: (C, H, W).
        num_classes: Number of labels.
        depth: 6 n + 4 for n blocks a stage.
        width: Channels of the three stages are 16, 32 and 64 times this.
        input_mean: Subtracted from each pixel, public.
        input_std: Divides each pixel, public.

    Raises:
        ConfigurationError: The depth is not of the form 6 n + 4, or a value is not positive.

    References:
        De et al. (2022) "Unlocking High-Accuracy Differentially Private Image Classification through Scale".
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        num_classes: int = 10,
        depth: int = 16,
        width: int = 4,
        input_mean: float = 0.5,
        input_std: float = 0.25,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or width < 1 or not input_std > 0:
            raise ConfigurationError(
                f"Expected network.depth = 6 n + 4 >= 10, width >= 1 and input_std > 0, got {depth=}, {width=}, "
                f"{input_std=}. The published networks are 16-4, 28-10 and 40-4."
            )
        self.image_shape, self.num_classes, self.depth, self.width = image_shape, num_classes, depth, width
        self.input_mean, self.input_std = input_mean, input_std
        self.stem = StandardisedConv2d(image_shape[0], 16, 3)
        blocks: list[nn.Module] = []
        inputs = 16
        for stage, stride in enumerate((1, 2, 2)):
            outputs = 16 * width * 2**stage
            for index in range((depth - 4) // 6):
                blocks.append(_Block(inputs, outputs, stride if index == 0 else 1, is_first=index == 0))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.GroupNorm(_GROUPS, inputs)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        maps = self.blocks(self.stem((images - self.input_mean) / self.input_std))
        logits: Tensor = self.head(self.norm(F.relu(maps)).mean(dim=(2, 3)))
        return logits

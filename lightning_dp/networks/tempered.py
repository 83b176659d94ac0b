"""The small convolutional network of the DP-SGD literature on MNIST, with bounded or unbounded activations."""

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_dp.errors import ConfigurationError
from lightning_dp.networks.classifier import Classifier

Activation = Literal["relu", "tanh", "tempered_sigmoid"]


class TemperedSigmoid(nn.Module):
    """scale / (1 + exp(-temperature x)) - offset; (2, 2, 1) is tanh (Papernot et al. 2020, Section 3)."""

    def __init__(self, scale: float, temperature: float, offset: float) -> None:
        super().__init__()
        self.scale, self.temperature, self.offset = scale, temperature, offset

    def forward(self, values: Tensor) -> Tensor:
        """Return the activation of each entry."""
        return self.scale * torch.sigmoid(self.temperature * values) - self.offset


class TemperedCNN(Classifier):
    """Two strided convolutions with overlapping max-pooling, two linear layers (26,010 parameters for 28 x 28 gray).

    The layout that the tutorials of TensorFlow Privacy and Opacus share. With `tanh` or `tempered_sigmoid` it is the
    network of Papernot et al. (2020), whose bounded activations keep gradients small, so that clipping loses less.

    Args:
        image_shape: (C, H, W), sides of at least 18 pixels.
        num_classes: Number of labels.
        activation: relu, tanh, or a tempered sigmoid with the three options below.
        scale: s of the tempered sigmoid.
        temperature: T of the tempered sigmoid.
        offset: o of the tempered sigmoid.
        input_mean: Subtracted from each pixel, public.
        input_std: Divides each pixel, public, > 0.

    Raises:
        ConfigurationError: Images are too small, or `input_std` is not positive.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        num_classes: int = 10,
        activation: Activation = "tanh",
        scale: float = 2.0,
        temperature: float = 2.0,
        offset: float = 1.0,
        input_mean: float = 0.5,
        input_std: float = 0.5,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        sides = [_last_side(side) for side in (height, width)]
        if min(sides) < 1:
            raise ConfigurationError(f"Expected images of at least 18 x 18 pixels, got image_shape={image_shape}.")
        if not input_std > 0:
            raise ConfigurationError(f"Expected network.input_std > 0, got input_std={input_std}.")
        self.image_shape, self.num_classes, self.activation = (channels, height, width), num_classes, activation
        self.scale, self.temperature, self.offset = scale, temperature, offset
        self.input_mean, self.input_std = input_mean, input_std
        self.body = nn.Sequential(
            nn.Conv2d(channels, 16, 8, stride=2, padding=3),
            self._activation(),
            nn.MaxPool2d(2, 1),
            nn.Conv2d(16, 32, 4, stride=2),
            self._activation(),
            nn.MaxPool2d(2, 1),
            nn.Flatten(),
            nn.Linear(32 * sides[0] * sides[1], 32),
            self._activation(),
            nn.Linear(32, num_classes),
        )

    def _activation(self) -> nn.Module:
        if self.activation == "tempered_sigmoid":
            return TemperedSigmoid(self.scale, self.temperature, self.offset)
        return nn.Tanh() if self.activation == "tanh" else nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        logits: Tensor = self.body((images - self.input_mean) / self.input_std)
        return logits


def _last_side(side: int) -> int:
    """Return the side of the last feature map: conv 8/2 padded by 3, pool 2/1, conv 4/2, pool 2/1."""
    return ((side + 6 - 8) // 2 + 1 - 1 - 4) // 2 + 1 - 1

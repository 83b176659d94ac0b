"""Classifiers of images: the two downstream networks and the one whose features measure fidelity.

All are plain: no BatchNorm, no dropout, no buffers, so a saved state is exactly the learnt weights. Maps are pooled
before their ReLU, which then sees a quarter of the numbers: values and gradients are those of the usual order, to the
last bit, since the ReLU of the largest is the largest ReLU.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_dp.errors import ConfigurationError

_MIN_SIDE = 4  # two 2x poolings must leave at least one pixel


def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Draw all weights anew from `generator`: PyTorch's default uniform, without its use of the global stream.

    Args:
        network: Convolutions and linear layers (others are left alone), on the CPU.
        generator: Source of the draws, on the CPU.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
            bound = 1 / math.sqrt(fan_in)
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def build_unset(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network on the CPU with unset weights, without a draw from the global random stream.

    Args:
        build: The constructor call. It runs on the meta device, where initial weights cost nothing.

    Returns: The network; call `initialise` or load weights before use.
    """
    with torch.device("meta"):
        network = build()
    return network.to_empty(device="cpu")


class ConvClassifier(nn.Module):
    """The downstream CNN: conv32, pool, conv64, pool, dense128, dense.

    The layout of the DataLens evaluation network (3x3 valid convolutions), with a wider dense layer and no dropout.
    Images with a side below 16 pixels are padded by one, so that something is left after two poolings.

    Args:
        image_shape: (C, H, W), sides of at least 4 pixels.
        num_classes: Number of outputs.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        if min(height, width) < _MIN_SIDE:
            raise ConfigurationError(
                f"Expected images with sides of at least {_MIN_SIDE} pixels for the CNN, got "
                f"image_shape={image_shape}. Leave 'cnn' out of the classifiers."
            )
        pad = int(min(height, width) < 16)
        sides = [((side + 2 * pad - 2) // 2 + 2 * pad - 2) // 2 for side in (height, width)]
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=pad),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=pad),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * sides[0] * sides[1], 128),
            nn.ReLU(),
            nn.Linear(128, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (B, num_classes), of images in [0, 1], (B, C, H, W)."""
        logits: Tensor = self.body(images)
        return logits


class MLPClassifier(nn.Module):
    """The downstream MLP: one hidden layer on the flattened pixels.

    Args:
        image_shape: (C, H, W).
        num_classes: Number of outputs.
        hidden: Width of the hidden layer.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, hidden: int = 256) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(math.prod(image_shape), hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (B, num_classes), of images in [0, 1], (B, C, H, W)."""
        logits: Tensor = self.body(images)
        return logits


class FeatureClassifier(nn.Module):
    """A small CNN over 28x28 gray images; its last hidden layer is the feature space of the default FID.

    Attributes:
        feature_dim: Length of a feature vector.
    """

    feature_dim: int = 128

    def __init__(self, num_classes: int = 20) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.MaxPool2d(2),  # (64, 3, 3)
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(576, self.feature_dim),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.feature_dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Return features, (B, 128), not negative, of images in [0, 1], (B, 1, 28, 28)."""
        features: Tensor = self.body(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (B, num_classes), of images in [0, 1], (B, 1, 28, 28)."""
        logits: Tensor = self.head(self.features(images))
        return logits

"""A classifier on fixed public wavelet features: what is left to learn is linear, small, and bears much noise."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dp.errors import ConfigurationError
from lightning_dp.networks.classifier import Classifier

_SIDE = 7  # of a wavelet, in pixels
_STEP = 4  # pixels between the places of a feature map
_ENVELOPE = 0.8  # std of a wavelet across its waves, in pixels
_FREQUENCY = 3 * math.pi / 4  # of its waves
_FLOOR = 1e-3  # standard deviations below this count as it


class ScatteringClassifier(Classifier):
    """Logistic regression on the moduli of wavelet coefficients (Tramer and Boneh 2021, who use a linear one as well).

    The image, the moduli of Morlet wavelets at two scales, and with `order` 2 the moduli of wavelets of the finer ones,
    each averaged to a quarter of the side; every group of maps is standardised by itself, image by image.

    Differs: the coarser scale is the same wavelets on the image at half the size, and strides are larger.

    Args:
        image_shape: (C, H, W), sides divisible by 4.
        num_classes: Number of labels.
        order: 1, or 2 for nearly five times as many features, and as much time.
        orientations: Wavelets of a scale, at equal angles.

    Raises:
        ConfigurationError: A value is out of range.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        num_classes: int = 10,
        order: int = 1,
        orientations: int = 8,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        if height % _STEP or width % _STEP or min(image_shape) < 1:
            raise ConfigurationError(
                f"Expected sides divisible by {_STEP} for ScatteringClassifier, got {image_shape=}."
            )
        if order not in (1, 2) or orientations < 1:
            raise ConfigurationError(
                f"Expected network.order 1 or 2 and network.orientations >= 1, got {order=}, {orientations=}."
            )
        self.image_shape, self.num_classes, self.order = image_shape, num_classes, order
        self.orientations = orientations
        self.wavelets: Tensor  # (orientations * 2, 1, 7, 7), real and imaginary parts in turn; public constants
        self.register_buffer("wavelets", morlet_wavelets(orientations), persistent=False)
        maps = channels * (1 + 2 * orientations + (order - 1) * orientations**2)
        self.head = nn.Linear(maps * (height // _STEP) * (width // _STEP), num_classes)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def features(self, images: Tensor) -> Tensor:
        """Return the standardised averages of each image, (B, maps * H * W / 16)."""
        fine, coarse = self._moduli(images, stride=2), self._moduli(F.avg_pool2d(images, 2), stride=1)
        groups = [images, fine, coarse]
        if self.order == 2:
            groups.append(self._moduli(fine, stride=1))
        sides = [side // _STEP for side in self.image_shape[1:]]
        return torch.cat([_standardised(_averaged(maps, sides)) for maps in groups], dim=1)

    def classify(self, features: Tensor) -> Tensor:  # noqa: D102
        logits: Tensor = self.head(features)
        return logits

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        return self.classify(self.features(images))

    def _moduli(self, maps: Tensor, *, stride: int) -> Tensor:
        """Return the moduli of all wavelets of all maps, (B, C * orientations, h, w)."""
        # Maps one by one: a grouped convolution would send per-record gradients to the slowest way of making them.
        parts = F.conv2d(maps.flatten(0, 1)[:, None], self.wavelets.to(maps), stride=stride, padding=_SIDE // 2)
        waves = parts.unflatten(0, maps.shape[:2]).unflatten(2, (-1, 2))  # (B, C, orientations, 2, h, w)
        # The constant keeps the slope of the root finite where a map is flat.
        return (waves.square().sum(3) + 1e-8).sqrt().flatten(1, 2)


def morlet_wavelets(orientations: int) -> Tensor:
    """Return Morlet wavelets of unit norm whose real parts have mean zero, (orientations * 2, 1, 7, 7)."""
    places = torch.arange(_SIDE).double() - _SIDE // 2
    down, across = torch.meshgrid(places, places, indexing="ij")
    found = []
    for index in range(orientations):
        angle = math.pi * index / orientations
        along = math.cos(angle) * across + math.sin(angle) * down
        beside = math.cos(angle) * down - math.sin(angle) * across
        envelope = torch.exp(-(along.square() + (4 / orientations * beside).square()) / (2 * _ENVELOPE**2))
        wave = torch.stack([torch.cos(_FREQUENCY * along), torch.sin(_FREQUENCY * along)]) * envelope
        wave[0] -= envelope * wave[0].sum() / envelope.sum()
        found.append(wave / wave.norm())
    return torch.cat(found)[:, None].float()


def _averaged(maps: Tensor, sides: list[int]) -> Tensor:
    """Return averages over overlapping squares, as many as `sides` says."""
    steps = (maps.shape[2] // sides[0], maps.shape[3] // sides[1])
    return F.avg_pool2d(maps, (2 * steps[0], 2 * steps[1]), stride=steps, padding=(steps[0] // 2, steps[1] // 2))


def _standardised(maps: Tensor) -> Tensor:
    """Return maps as rows, with mean 0 and standard deviation 1 over all maps of an image."""
    rows = maps.flatten(1)
    return (rows - rows.mean(dim=1, keepdim=True)) / (rows.std(dim=1, keepdim=True) + _FLOOR)

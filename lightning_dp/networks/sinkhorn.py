"""The class-conditional generators of DP-Sinkhorn, with exactly their parameter counts.

Layer tables: `Cao et al. (2021) <https://arxiv.org/abs/2111.01177>`_ and its program. Latents are uniform on (0, 1).
Batch normalisation uses the statistics of the batch at hand and keeps none: sample in batches of a few hundred with
mixed labels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dp.errors import ConfigurationError
from lightning_dp.networks.datalens import uniform_latent
from lightning_dp.networks.generator import Generator

LEAK = 0.2
_POWER_ITERATIONS = 8


class SinkhornConvGenerator(Generator):
    """Label embedding and latent through three transposed convolutions (957,969 parameters for MNIST).

    Args:
        image_shape: (C, H, W), H and W divisible by 4.
        num_classes: Number of labels.
        latent_dim: Length of the latent; 16 in the paper.
        width: Channels before the last layer; 64 in the paper; 8 suits a CPU.
        embedding_dim: Length of the label's embedding; 8 in the paper.

    Raises:
        ConfigurationError: A size does not fit.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        latent_dim: int = 16,
        width: int = 64,
        embedding_dim: int = 8,
    ) -> None:
        super().__init__()
        channels, height, side = image_shape
        if height % 4 or side % 4:
            raise ConfigurationError(
                f"Expected height and width divisible by 4 for SinkhornConvGenerator, got {image_shape=}. "
                "Resize or pad the images, or choose the MLP generator."
            )
        _check_sizes(latent_dim=latent_dim, width=width, embedding_dim=embedding_dim)
        self.image_shape, self.num_classes, self.latent_dim = image_shape, num_classes, latent_dim
        self.width, self.embedding_dim = width, embedding_dim
        first, second, third = 4 * width, 2 * width, width
        self.embedding = nn.Embedding(num_classes, embedding_dim)
        self.body = nn.Sequential(
            nn.ConvTranspose2d(embedding_dim + latent_dim, first, (height // 4, side // 4), bias=False),
            nn.BatchNorm2d(first, track_running_stats=False),
            nn.LeakyReLU(LEAK),
            nn.ConvTranspose2d(first, second, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(second, track_running_stats=False),
            nn.LeakyReLU(LEAK),
            nn.ConvTranspose2d(second, third, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(third, track_running_stats=False),
            nn.LeakyReLU(LEAK),
            nn.Conv2d(third, channels, 3, padding=1),
        )

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        joined = torch.cat([self.embedding(labels), latent], dim=1)
        return _to_unit(self.body(joined[:, :, None, None]))

    def sample_latent(self, num: int, generator: torch.Generator | None = None) -> Tensor:  # noqa: D102
        return _latent(num, self.latent_dim, like=self.embedding.weight, generator=generator)


class SinkhornResidualGenerator(Generator):
    """Residual up-blocks with class-conditional normalisation and spectral norms (3,886,595 for CelebA at 32 x 32).

    Args:
        image_shape: (C, H, W), H = W = 8, 16, 32, 64 or another 4 * 2^k.
        num_classes: Number of labels.
        latent_dim: Length of the latent; 32 in the paper.
        width: A quarter of the channels of every block; 64 in the paper.

    Raises:
        ConfigurationError: A size does not fit.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], num_classes: int, latent_dim: int = 32, width: int = 64
    ) -> None:
        super().__init__()
        channels, height, side = image_shape
        num_blocks = int(math.log2(max(side, 4) / 4))
        if height != side or num_blocks < 1 or side != 4 * 2**num_blocks:
            raise ConfigurationError(
                f"Expected square images of 8, 16, 32, 64, ... pixels for SinkhornResidualGenerator, got "
                f"{image_shape=}. Resize or pad the images, or choose the convolutional generator."
            )
        _check_sizes(latent_dim=latent_dim, width=width)
        self.image_shape, self.num_classes = image_shape, num_classes
        self.latent_dim, self.width = latent_dim, width
        inner = 4 * width
        self.stem = nn.Linear(latent_dim, inner * 4 * 4)
        self.blocks = nn.ModuleList(_UpBlock(inner, num_classes) for _ in range(num_blocks))
        self.norm = nn.BatchNorm2d(inner, track_running_stats=False)
        self.head = nn.Conv2d(inner, channels, 3, padding=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear | nn.Embedding):
                nn.init.orthogonal_(layer.weight)
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        maps = F.linear(latent, normalised_weight(self.stem), self.stem.bias).unflatten(1, (4 * self.width, 4, 4))
        for block in self.blocks:
            maps = block(maps, labels)
        return _to_unit(_convolve(self.head, F.relu(self.norm(maps))))

    def sample_latent(self, num: int, generator: torch.Generator | None = None) -> Tensor:  # noqa: D102
        return _latent(num, self.latent_dim, like=self.stem.weight, generator=generator)


class _UpBlock(nn.Module):
    """Doubles the side: norm, ReLU, nearest upsampling, convolution, norm, ReLU, convolution, plus a shortcut."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm1 = _ClassNorm(channels, num_classes)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = _ClassNorm(channels, num_classes)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, channels, 1)

    def forward(self, maps: Tensor, labels: Tensor) -> Tensor:
        inner = F.interpolate(F.relu(self.norm1(maps, labels)), scale_factor=2)
        inner = F.relu(self.norm2(_convolve(self.conv1, inner), labels))
        return _convolve(self.conv2, inner) + _convolve(self.shortcut, F.interpolate(maps, scale_factor=2))


class _ClassNorm(nn.Module):
    """Batch normalisation with a gain 1 + e_g[label] and a bias e_b[label] of each class."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False, track_running_stats=False)
        self.gain = nn.Embedding(num_classes, channels)
        self.bias = nn.Embedding(num_classes, channels)

    def forward(self, maps: Tensor, labels: Tensor) -> Tensor:
        normed: Tensor = self.norm(maps)
        return normed * (1 + self.gain(labels)[:, :, None, None]) + self.bias(labels)[:, :, None, None]


def normalised_weight(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """Return the weight over its largest singular value, as a matrix (out, rest), found by power iteration.

    Differs: the iteration starts anew from a fixed vector at every call, where the usual one goes on from the last, so
    that the network is a function of its parameters alone and a published copy makes the same images.

    Args:
        layer: A linear layer or a convolution.

    Returns:
        The normalised weight, of the layer's shape, differentiable.
    """
    matrix = layer.weight.flatten(1)
    with torch.no_grad():
        # Waves of irrational length: a start that is orthogonal to no singular vector we will meet.
        left = torch.cos(torch.arange(matrix.shape[0], device=matrix.device, dtype=matrix.dtype) * math.sqrt(2))
        for _ in range(_POWER_ITERATIONS):
            right = F.normalize(matrix.T @ left, dim=0)
            left = F.normalize(matrix @ right, dim=0)
    return layer.weight / (left @ matrix @ right)


def _convolve(layer: nn.Conv2d, maps: Tensor) -> Tensor:
    return F.conv2d(maps, normalised_weight(layer), layer.bias, padding=layer.padding)


def _to_unit(raw: Tensor) -> Tensor:
    """Map the paper's tanh pixels to [0, 1]."""
    return (torch.tanh(raw) + 1) / 2


def _latent(num: int, latent_dim: int, *, like: Tensor, generator: torch.Generator | None) -> Tensor:
    return (uniform_latent(num, latent_dim, like=like, generator=generator) + 1) / 2


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigurationError(f"Expected generator.{name} >= 1, got {name}={size}.")

"""Small discriminators and generators: thousands of teachers at a time, on a CPU.

Discriminators have one output per class and read the one of the label at hand. A label merely joined to the input of a
small network barely changes the gradient with respect to the image, and generated classes come out alike.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dp.errors import ConfigurationError
from lightning_dp.networks.datalens import uniform_latent
from lightning_dp.networks.discriminator import Discriminator
from lightning_dp.networks.generator import Generator

LEAK = 0.2


def _reset(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.GroupNorm | nn.LayerNorm):
            layer.reset_parameters()


class SmallConvDiscriminator(Discriminator):
    """Two strided convolutions and a linear layer with one output per class; no normalisation (29k for 28x28).

    Args:
        sample_shape: (C, H, W).
        num_classes: Number of labels.
        width: Channels of the first convolution; the second has twice as many.

    Raises:
        ConfigurationError: Samples are not images.
    """

    def __init__(self, sample_shape: tuple[int, ...], num_classes: int, width: int = 16) -> None:
        super().__init__()
        if len(sample_shape) != 3:
            raise ConfigurationError(
                f"Expected samples of shape (C, H, W) for network='small_conv', got sample_shape={sample_shape}. "
                "Choose network='mlp' for a generator whose native output is not an image."
            )
        channels, height, width_px = sample_shape
        flat = 2 * width * math.ceil(math.ceil(height / 2) / 2) * math.ceil(math.ceil(width_px / 2) / 2)
        self.conv0 = nn.Conv2d(channels, width, 5, stride=2, padding=2)
        self.conv1 = nn.Conv2d(width, 2 * width, 5, stride=2, padding=2)
        self.head = nn.Linear(flat, num_classes)

    def reset_parameters(self) -> None:  # noqa: D102
        _reset(self)

    def forward(self, samples: Tensor, one_hot: Tensor) -> Tensor:  # noqa: D102
        maps = F.leaky_relu(self.conv0(samples), LEAK)
        maps = F.leaky_relu(self.conv1(maps), LEAK)
        logits: Tensor = self.head(maps.flatten(1))  # (B, num_classes)
        return (logits * one_hot).sum(1)


class MLPDiscriminator(Discriminator):
    """Two hidden layers and one output per class; any sample shape (55k parameters for 28x28).

    Args:
        sample_shape: Shape of one sample, flattened inside.
        num_classes: Number of labels.
        width: Size of both hidden layers.
    """

    dense_layers = ("hidden0", "hidden1", "head")

    def __init__(self, sample_shape: tuple[int, ...], num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.hidden0 = nn.Linear(math.prod(sample_shape), width)
        self.hidden1 = nn.Linear(width, width)
        self.head = nn.Linear(width, num_classes)

    def reset_parameters(self) -> None:  # noqa: D102
        _reset(self)

    def forward(self, samples: Tensor, one_hot: Tensor) -> Tensor:  # noqa: D102
        features = F.leaky_relu(self.hidden0(samples.flatten(1)), LEAK)
        features = F.leaky_relu(self.hidden1(features), LEAK)
        logits: Tensor = self.head(features)  # (B, num_classes)
        return (logits * one_hot).sum(1)


class _PixelGenerator(Generator):
    """What both small generators share: images as native outputs, latents uniform on (-1, 1)."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, latent_dim: int) -> None:
        super().__init__()
        self.image_shape, self.num_classes, self.latent_dim = image_shape, num_classes, latent_dim

    def _joined(self, latent: Tensor, labels: Tensor) -> Tensor:
        return torch.cat([latent, F.one_hot(labels, self.num_classes).to(latent.dtype)], dim=1)

    def reset_parameters(self) -> None:
        """Draw new initial parameters in place."""
        _reset(self)

    def sample_latent(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        like = next(self.parameters())
        return uniform_latent(num, self.latent_dim, like=like, generator=generator)


class SmallConvGenerator(_PixelGenerator):
    """A linear layer and two transposed convolutions with group norm over one image (88k for 28x28, latent 32).

    Args:
        image_shape: (C, H, W), H and W divisible by 4.
        num_classes: Number of labels.
        latent_dim: Length of the latent.
        width: Channels before the last layer.

    Raises:
        ConfigurationError: The size is not divisible by 4.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], num_classes: int, latent_dim: int = 32, width: int = 32
    ) -> None:
        super().__init__(image_shape, num_classes, latent_dim)
        channels, height, width_px = image_shape
        if height % 4 or width_px % 4:
            raise ConfigurationError(
                f"Expected height and width divisible by 4 for the small conv generator, got "
                f"image_shape={image_shape}. Resize or pad the images, or choose the MLP generator."
            )
        self.width = width
        self._map_shape = (width, height // 4, width_px // 4)
        self.fc0 = nn.Linear(latent_dim + num_classes, math.prod(self._map_shape))
        self.norm0 = nn.GroupNorm(1, width)
        self.deconv1 = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
        self.norm1 = nn.GroupNorm(1, width)
        self.deconv2 = nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1)

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        maps = self.fc0(self._joined(latent, labels)).unflatten(1, self._map_shape)
        maps = F.leaky_relu(self.norm0(maps), LEAK)
        maps = F.leaky_relu(self.norm1(self.deconv1(maps)), LEAK)
        return torch.sigmoid(self.deconv2(maps))


class MLPGenerator(_PixelGenerator):
    """Two hidden layers to pixels (123k for 28x28, latent 32).

    Args:
        image_shape: (C, H, W).
        num_classes: Number of labels.
        latent_dim: Length of the latent.
        width: Size of both hidden layers.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], num_classes: int, latent_dim: int = 32, width: int = 128
    ) -> None:
        super().__init__(image_shape, num_classes, latent_dim)
        self.width = width
        self.hidden0 = nn.Linear(latent_dim + num_classes, width)
        self.hidden1 = nn.Linear(width, width)
        self.head = nn.Linear(width, math.prod(image_shape))

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        features = F.leaky_relu(self.hidden0(self._joined(latent, labels)), LEAK)
        features = F.leaky_relu(self.hidden1(features), LEAK)
        pixels: Tensor = torch.sigmoid(self.head(features))
        return pixels.reshape(-1, *self.image_shape)

"""The networks of GS-WGAN (Chen et al. 2020) for 28 x 28 images, with exactly their parameter counts.

Differs: no spectral normalisation, whose power iterations would be one more state to keep apart. Critics are bound by
the gradient penalty; the generator's spectral norms bound nothing that is private.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dp.errors import ConfigurationError
from lightning_dp.networks.discriminator import Discriminator
from lightning_dp.networks.generator import Generator

_LEAST_SIDE, _MOST_SIDE = 17, 30  # the generator writes 30 x 30 and is cropped
_CORNER = 4


class GSWGANCritic(Discriminator):
    """Three strided convolutions and a projection on the label (1,071,105 parameters for MNIST).

    Args:
        sample_shape: (C, H, W).
        num_classes: Number of labels.
        width: Channels of the first convolution; then twice and four times as many.

    Raises:
        ConfigurationError: Samples are not images.
    """

    def __init__(self, sample_shape: tuple[int, ...], num_classes: int, width: int = 64) -> None:
        super().__init__()
        if len(sample_shape) != 3:
            raise ConfigurationError(
                f"Expected samples of shape (C, H, W) for network='gswgan', got sample_shape={sample_shape}. "
                "Choose network='mlp' for vectors of a public basis."
            )
        channels, *sides = sample_shape
        flat = 4 * width
        for side in sides:
            flat *= -(-side // 8)  # three convolutions of stride 2, rounded up each time
        self.conv0 = nn.Conv2d(channels, width, 5, stride=2, padding=2)
        self.conv1 = nn.Conv2d(width, 2 * width, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(2 * width, 4 * width, 5, stride=2, padding=2)
        self.score = nn.Linear(flat, 1)
        self.of_label = nn.Linear(num_classes, flat, bias=False)  # an embedding, asked by one-hot labels

    def reset_parameters(self) -> None:  # noqa: D102
        for layer in self.children():
            layer.reset_parameters()  # type: ignore[operator]

    def forward(self, samples: Tensor, one_hot: Tensor) -> Tensor:  # noqa: D102
        maps = F.relu(self.conv1(F.relu(self.conv0(samples))))
        features = F.relu(self.conv2(maps)).flatten(1)
        scores: Tensor = self.score(features).squeeze(1) + (features * self.of_label(one_hot)).sum(1)
        return scores


class GSWGANGenerator(Generator):
    """A residual generator with pixel norm (3,826,177 parameters for MNIST); latents are fair coins.

    Args:
        image_shape: (C, H, W), square with a side from 17 to 30; 30 x 30 pixels are made and cropped.
        num_classes: Number of labels.
        latent_dim: Length of the latent.
        width: Channels of every map; 4 times the model_dim of the paper.

    Raises:
        ConfigurationError: The side is another.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], num_classes: int = 10, latent_dim: int = 10, width: int = 256
    ) -> None:
        super().__init__()
        channels, height, side = image_shape
        if height != side or not _LEAST_SIDE <= side <= _MOST_SIDE:
            raise ConfigurationError(
                f"Expected square images with a side from {_LEAST_SIDE} to {_MOST_SIDE} for GSWGANGenerator, got "
                f"{image_shape=}. Pad the images, or choose another generator."
            )
        self.image_shape, self.num_classes, self.latent_dim, self.width = image_shape, num_classes, latent_dim, width
        self.corner = nn.Linear(latent_dim + num_classes, width * _CORNER**2)
        self.blocks = nn.ModuleList(_UpBlock(width) for _ in range(3))
        self.to_pixels = nn.Conv2d(width, channels, 3)

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        one_hot = F.one_hot(labels, self.num_classes).to(latent)
        maps = self.corner(torch.cat([latent, one_hot], dim=1)).unflatten(1, (self.width, _CORNER, _CORNER))
        maps = _pixel_norm(F.relu(maps))
        for block in self.blocks:
            maps = block(maps)
        side = self.image_shape[-1]
        return torch.sigmoid(self.to_pixels(maps))[..., :side, :side]

    def sample_latent(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Return fair coins, 0 or 1, (num, latent_dim)."""
        like = self.corner.weight
        source = like.device if generator is None else generator.device
        return torch.randint(2, (num, self.latent_dim), generator=generator, device=source).to(like)


class _UpBlock(nn.Module):
    """Twice the side: two convolutions beside a shortcut of one by one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(width, width, 3, padding=1)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(width, width, 1)

    def forward(self, maps: Tensor) -> Tensor:
        large = F.interpolate(_pixel_norm(maps), scale_factor=2, mode="nearest")
        inner: Tensor = self.conv1(F.relu(_pixel_norm(self.conv0(large))))
        return inner + self.shortcut(F.interpolate(maps, scale_factor=2, mode="nearest"))


def _pixel_norm(maps: Tensor) -> Tensor:
    """Scale the channels of each pixel to mean square one."""
    return maps * torch.rsqrt(maps.square().mean(dim=1, keepdim=True) + 1e-10)

"""The DCGAN pair of "Private GANs, Revisited" (Bie et al. 2023), at its published parameter counts. No norm layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dp.errors import ConfigurationError
from lightning_dp.networks.discriminator import Discriminator
from lightning_dp.networks.generator import Generator

_LEAK = 0.2
_CORNER = 4  # side of the smallest map


class DCGANGenerator(Generator):
    """Latent and label each to a 4 x 4 map, then three transposed convolutions (2,272,129 parameters for MNIST).

    Args:
        image_shape: (C, H, W), square with side 28 or 32.
        num_classes: Number of labels.
        latent_dim: Length of the latent, standard normal.
        width: Channels before the last layer; the layers before have twice as many.

    Raises:
        ConfigurationError: The side is another.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], num_classes: int = 10, latent_dim: int = 128, width: int = 128
    ) -> None:
        super().__init__()
        kernel = _corner_kernel(image_shape)
        self.image_shape, self.num_classes, self.latent_dim, self.width = image_shape, num_classes, latent_dim, width
        self.from_latent = nn.ConvTranspose2d(latent_dim, 2 * width, _CORNER)
        self.from_label = nn.ConvTranspose2d(num_classes, 2 * width, _CORNER)
        self.deconv1 = nn.ConvTranspose2d(4 * width, 2 * width, kernel, stride=2, padding=1)
        self.deconv2 = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.deconv3 = nn.ConvTranspose2d(width, image_shape[0], 4, stride=2, padding=1)

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        one_hot = F.one_hot(labels, self.num_classes).to(latent)
        maps = torch.cat([self.from_latent(latent[:, :, None, None]), self.from_label(one_hot[:, :, None, None])], 1)
        maps = F.relu(self.deconv1(F.relu(maps)))
        return (torch.tanh(self.deconv3(F.relu(self.deconv2(maps)))) + 1) / 2

    def sample_latent(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Return standard normal latents, (num, latent_dim)."""
        like = self.deconv3.weight
        source = like.device if generator is None else generator.device
        return torch.randn(num, self.latent_dim, generator=generator, device=source).to(like)


class DCGANCritic(Discriminator):
    """Image and label plane each to 14 x 14 maps, then three convolutions (1,724,289 parameters for MNIST).

    Args:
        sample_shape: (C, H, W), square with side 28 or 32.
        num_classes: Number of labels.
        width: Channels of each of the two first convolutions; then four and eight times as many.

    Raises:
        ConfigurationError: The side is another.
    """

    def __init__(self, sample_shape: tuple[int, ...], num_classes: int = 10, width: int = 64) -> None:
        super().__init__()
        kernel = _corner_kernel(sample_shape)
        self.side = sample_shape[1]
        self.from_image = nn.Conv2d(sample_shape[0], width, 4, stride=2, padding=1)
        self.from_label = nn.Conv2d(num_classes, width, 4, stride=2, padding=1)
        self.conv1 = nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(4 * width, 8 * width, kernel, stride=2, padding=1)
        self.conv3 = nn.Conv2d(8 * width, 1, _CORNER)

    def reset_parameters(self) -> None:  # noqa: D102
        for layer in self.children():
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()

    def forward(self, samples: Tensor, one_hot: Tensor) -> Tensor:  # noqa: D102
        planes = one_hot[:, :, None, None].to(samples).expand(-1, -1, self.side, self.side)
        maps = F.leaky_relu(torch.cat([self.from_image(samples), self.from_label(planes)], dim=1), _LEAK)
        maps = F.leaky_relu(self.conv2(F.leaky_relu(self.conv1(maps), _LEAK)), _LEAK)
        logits: Tensor = self.conv3(maps)
        return logits.flatten()


def _corner_kernel(image_shape: tuple[int, ...]) -> int:
    """Return the kernel that leads between a 4 x 4 map and a quarter of the side: 3 to 7 x 7, 4 to 8 x 8."""
    if len(image_shape) != 3 or image_shape[1] != image_shape[2] or image_shape[1] not in (28, 32):
        raise ConfigurationError(
            f"Expected images of 28 x 28 or 32 x 32 pixels for the DCGAN pair, got {tuple(image_shape)}. "
            "Resize them, or choose SmallConvGenerator and SmallConvDiscriminator."
        )
    return 3 if image_shape[1] == 28 else 4

"""The networks that DataLens and G-PATE share, with exactly their parameter counts.

Layer table and initial values: `Wang et al. (2021) <https://arxiv.org/abs/2103.11109>`_, the published program. Batch
normalisation always uses the statistics of the batch at hand and keeps no running ones, so no buffer can carry private
data into a release.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dp.errors import ConfigurationError
from lightning_dp.networks.discriminator import Discriminator
from lightning_dp.networks.generator import Generator
from lightning_dp.networks.padding import SameConv2d, SameConvTranspose2d

DISCRIMINATOR_CHANNELS = 32
DISCRIMINATOR_FEATURES = 256
GENERATOR_CHANNELS = 128
GENERATOR_FEATURES = 1024
LEAK = 0.2
WEIGHT_STD = 0.02


def _check_image_shape(image_shape: tuple[int, int, int]) -> None:
    _, height, width = image_shape
    if height % 4 or width % 4:
        raise ConfigurationError(
            f"Expected height and width divisible by 4 for the DataLens networks, got image_shape={image_shape}. "
            "Resize or pad the images, or choose an MLP preset."
        )


def _with_label_planes(maps: Tensor, one_hot: Tensor) -> Tensor:
    planes = one_hot[:, :, None, None].expand(-1, -1, maps.shape[-2], maps.shape[-1])
    return torch.cat([maps, planes.to(maps.dtype)], dim=1)


def _reset(module: nn.Module) -> None:
    """Truncated normal (two deviations) for convolutions, normal for the rest, biases 0, norms at identity."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.reset_parameters()
        elif isinstance(layer, nn.Conv2d):
            nn.init.trunc_normal_(layer.weight, std=WEIGHT_STD, a=-2 * WEIGHT_STD, b=2 * WEIGHT_STD)
        elif isinstance(layer, nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(layer.weight, std=WEIGHT_STD)
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _normed(norm: nn.BatchNorm1d | nn.BatchNorm2d, values: Tensor) -> Tensor:
    """Return normalised values; statistics are taken in the precision of the gain, also under autocast."""
    normed: Tensor = norm(values.to(norm.weight.dtype))
    return normed


class DataLensDiscriminator(Discriminator):
    """The DataLens discriminator: two strided convolutions, one hidden layer, the label joined at every level.

    Args:
        image_shape: (C, H, W), H and W divisible by 4.
        num_classes: Number of labels.

    Raises:
        ConfigurationError: The size is not divisible by 4.
    """

    min_batch = 2

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        _check_image_shape(image_shape)
        channels, height, width = image_shape
        first, second = channels + num_classes, DISCRIMINATOR_CHANNELS + num_classes
        flat = second * (height // 4) * (width // 4)
        self.conv0 = SameConv2d(channels + num_classes, first)
        self.conv1 = SameConv2d(first + num_classes, second)
        self.norm1 = nn.BatchNorm2d(second, track_running_stats=False)
        self.fc2 = nn.Linear(flat + num_classes, DISCRIMINATOR_FEATURES)
        self.norm2 = nn.BatchNorm1d(DISCRIMINATOR_FEATURES, track_running_stats=False)
        self.fc3 = nn.Linear(DISCRIMINATOR_FEATURES + num_classes, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:  # noqa: D102
        _reset(self)

    def forward(self, samples: Tensor, one_hot: Tensor) -> Tensor:  # noqa: D102
        maps = F.leaky_relu(self.conv0(_with_label_planes(samples, one_hot)), LEAK)
        maps = F.leaky_relu(_normed(self.norm1, self.conv1(_with_label_planes(maps, one_hot))), LEAK)
        # The published program flattens channels last; the order matters to whoever ports its weights.
        flat = maps.permute(0, 2, 3, 1).flatten(1)
        features = F.leaky_relu(_normed(self.norm2, self.fc2(torch.cat([flat, one_hot], dim=1))), LEAK)
        logits: Tensor = self.fc3(torch.cat([features, one_hot], dim=1))
        return logits.squeeze(1)


class DataLensGenerator(Generator):
    """The DataLens generator; latents are uniform on (-1, 1).

    Each call normalises by the statistics of its own batch, also when the released model is sampled, as the published
    program does: sample in batches of a few dozen with mixed labels.

    Args:
        image_shape: (C, H, W), H and W divisible by 4.
        num_classes: Number of labels.
        latent_dim: 50 for MNIST and FashionMNIST, 100 for CelebA in the paper.

    Raises:
        ConfigurationError: The size is not divisible by 4.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, latent_dim: int = 50) -> None:
        super().__init__()
        _check_image_shape(image_shape)
        self.image_shape, self.num_classes, self.latent_dim = image_shape, num_classes, latent_dim
        channels, height, width = image_shape
        self._grid = (height // 4, width // 4)
        flat = GENERATOR_CHANNELS * self._grid[0] * self._grid[1]
        joined = GENERATOR_CHANNELS + num_classes
        self.fc0 = nn.Linear(latent_dim + num_classes, GENERATOR_FEATURES)
        self.norm0 = nn.BatchNorm1d(GENERATOR_FEATURES, track_running_stats=False)
        self.fc1 = nn.Linear(GENERATOR_FEATURES + num_classes, flat)
        self.norm1 = nn.BatchNorm1d(flat, track_running_stats=False)
        self.deconv2 = SameConvTranspose2d(joined, GENERATOR_CHANNELS)
        self.norm2 = nn.BatchNorm2d(GENERATOR_CHANNELS, track_running_stats=False)
        self.deconv3 = SameConvTranspose2d(joined, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial parameters in place."""
        _reset(self)

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        one_hot = F.one_hot(labels, self.num_classes).to(latent.dtype)
        features = F.relu(self.norm0(self.fc0(torch.cat([latent, one_hot], dim=1))))
        flat = F.relu(self.norm1(self.fc1(torch.cat([features, one_hot], dim=1))))
        maps = flat.unflatten(1, (*self._grid, GENERATOR_CHANNELS)).permute(0, 3, 1, 2)  # channels last -> NCHW
        maps = F.relu(self.norm2(self.deconv2(_with_label_planes(maps, one_hot))))
        return torch.sigmoid(self.deconv3(_with_label_planes(maps, one_hot)))

    def sample_latent(self, num: int, generator: torch.Generator | None = None) -> Tensor:  # noqa: D102
        return uniform_latent(num, self.latent_dim, like=self.fc0.weight, generator=generator)


def uniform_latent(num: int, latent_dim: int, *, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return latents uniform on (-1, 1), (num, latent_dim), with the type and on the device of `like`.

    Args:
        num: How many.
        latent_dim: Length of each.
        like: A parameter of the generator network.
        generator: Source of randomness; it may live on another device than `like`.
    """
    source = like.device if generator is None else generator.device
    uniform = torch.rand(num, latent_dim, generator=generator, device=source, dtype=like.dtype)
    return (2 * uniform - 1).to(like.device)

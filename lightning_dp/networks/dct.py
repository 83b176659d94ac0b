"""A small class-conditional generator that writes images in a public cosine basis."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.errors import ConfigurationError
from lightning_dp.networks.basis import dct_matrix, lowest_frequencies
from lightning_dp.networks.generator import Generator
from lightning_dp.networks.texture import textured

# A coefficient of 1 at a low frequency moves pixels by about a seventh of a logit (4 / 28).
_GAIN = 4.0

# Pixels are kept so far from 0 and 1 before their logits are taken: black ones would dominate every moment.
_PIXEL_MARGIN = 0.01


class DCTGenerator(Generator):
    """Mean and factors per class plus a small MLP, in cosine coefficients, through a sigmoid per pixel.

    Each class has a mean and linear factors of its own, so classes do not fight over weights while the signal is weak;
    the MLP adds what is not linear. Amplitudes fall with frequency, as they do in natural images.

    Args:
        image_shape: (C, H, W) with H = W.
        num_classes: Number of labels.
        latent_dim: Length of the latent vector, standard normal.
        num_coefficients: Frequencies per channel that the generator writes.
        window: Side of the centred square that it writes into; null writes the whole image. Pixels that teachers do not
            see should not be written.
        outside: Value in [0, 1] of the pixels outside the window; MNIST is published with its digits in the inner 20 x
            20 pixels of a black image.
        width: Width of the MLP's two hidden layers.
        corner_frequency: Amplitudes fall as 1 / (1 + (f / corner_frequency)^2).
        background: Logit of a pixel before training; negative for dark backgrounds.
        factor_scale: Initial size of the factors.
        mlp_learning_rate_share: Learning rate of the MLP relative to that of means and factors.
        texture: Std of noise on pixels that are not dark (`textured`), in samples alone: while it learns, a generator
            with noise of its own does worse. Public knowledge, no release; 0 adds none.

    Raises:
        ConfigurationError: A value is out of range.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int = 10,
        latent_dim: int = 64,
        num_coefficients: int = 144,
        window: int | None = None,
        outside: float = 0.0,
        width: int = 256,
        corner_frequency: float = 6.0,
        background: float = -2.0,
        factor_scale: float = 0.9,
        mlp_learning_rate_share: float = 0.1,
        texture: float = 0.0,
    ) -> None:
        super().__init__()
        channels, height, side = image_shape
        inner = side if window is None else window
        if height != side or not 1 <= inner <= side or not 1 <= num_coefficients <= inner**2:
            raise ConfigurationError(
                f"Expected square images, window <= {side} and num_coefficients <= window^2, got {image_shape=}, "
                f"{window=}, {num_coefficients=}."
            )
        for name, value in (("latent_dim", latent_dim), ("width", width), ("corner_frequency", corner_frequency)):
            if not value > 0:
                raise ConfigurationError(f"Expected generator.{name} > 0, got {name}={value}.")
        self.image_shape, self.num_classes, self.latent_dim = image_shape, num_classes, latent_dim
        if not 0 <= outside <= 1:
            raise ConfigurationError(f"Expected 0 <= generator.outside <= 1, got {outside=}.")
        if not 0 <= texture < math.inf:
            raise ConfigurationError(f"Expected finite generator.texture >= 0, got {texture=}.")
        self.texture = texture
        self.num_coefficients, self.window, self.outside = num_coefficients, window, outside
        self.width, self.corner_frequency = width, corner_frequency
        self.background, self.factor_scale = background, factor_scale
        self.mlp_learning_rate_share = mlp_learning_rate_share
        dim = channels * num_coefficients
        self.means = nn.Parameter(torch.zeros(num_classes, dim))
        self.factors = nn.Parameter(torch.randn(num_classes, latent_dim, dim) * factor_scale / math.sqrt(latent_dim))
        self.mlp = nn.Sequential(
            nn.Linear(latent_dim + num_classes, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, dim),
        )
        radius = torch.tensor([math.hypot(*pair) for pair in lowest_frequencies(inner, num_coefficients)])
        amplitudes = _GAIN / (1 + (radius / corner_frequency) ** 2)
        self.synthesis: Tensor  # (num_coefficients, H * W), public constants
        matrix = dct_matrix(side, num_coefficients, inner) * amplitudes[:, None]
        self.register_buffer("synthesis", matrix, persistent=False)
        self.inside: Tensor  # (H, W), true where the window is
        inside = torch.zeros(side, side, dtype=torch.bool)
        offset = (side - inner) // 2
        inside[offset : offset + inner, offset : offset + inner] = True
        self.register_buffer("inside", inside, persistent=False)

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        one_hot = F.one_hot(labels, self.num_classes).to(latent)
        linear = self._linear(latent, labels)
        coefficients = self.means[labels] + linear + self.mlp(torch.cat([latent, 2 * one_hot], dim=1))
        pixels = coefficients.unflatten(1, (self.image_shape[0], self.num_coefficients)) @ self.synthesis  # (B, C, HW)
        images = torch.sigmoid(pixels + self.background).unflatten(2, self.image_shape[1:])
        return images if self.window is None else images.where(self.inside, self.outside)

    def _linear(self, latent: Tensor, labels: Tensor) -> Tensor:
        """Return latent times the factors of its label, class by class, without a (B, z, d) tensor."""
        order = torch.argsort(labels, stable=True)
        counts = torch.bincount(labels, minlength=self.num_classes).tolist()
        parts = [rows @ self.factors[label] for label, rows in enumerate(latent[order].split(counts)) if len(rows)]
        return torch.cat(parts)[torch.argsort(order)]

    @override
    def finished(self, images: Tensor, stream: torch.Generator) -> Tensor:
        if not self.texture:
            return images
        return textured(images, torch.randn(images.shape, generator=stream), self.texture)

    @torch.no_grad()
    @override
    def match_moments(self, images: Tensor, labels: Tensor) -> None:
        """Set means and factors to the mean and the main directions of each class; the MLP adds nothing at first.

        The moments are those of logits of pixels, in which the generator is linear: coefficients by least squares, and
        of their directions those that matter most in pixels. Classes without an image keep what they have.
        """
        inside = self.inside.flatten()
        synthesis = self.synthesis[:, inside].double()
        logits = torch.logit(images.flatten(2)[:, :, inside].double(), eps=_PIXEL_MARGIN) - self.background
        coefficients = (logits @ torch.linalg.pinv(synthesis)).flatten(1)
        sizes = synthesis.norm(dim=1).repeat(self.image_shape[0])  # the rows are nearly orthogonal
        for label in range(self.num_classes):
            own = coefficients[labels == label]
            if len(own) == 0:
                continue
            mean = own.mean(dim=0)
            scaled = (own - mean) * sizes / math.sqrt(max(1, len(own) - 1))
            _, lengths, directions = torch.linalg.svd(scaled, full_matrices=False)
            main = (lengths[:, None] * directions)[: self.latent_dim] / sizes
            self.means[label] = mean.float()
            self.factors[label].zero_()[: len(main)] = main.float()
        for parameter in self.mlp[-1].parameters():
            parameter.zero_()

    def sample_latent(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Return standard normal latents, (num, latent_dim)."""
        source = self.means.device if generator is None else generator.device
        return torch.randn(num, self.latent_dim, generator=generator, device=source).to(self.means.device)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return the optimizer's groups: the MLP learns more slowly than means and factors."""
        return [
            {"params": [self.means, self.factors], "lr": learning_rate},
            {"params": list(self.mlp.parameters()), "lr": learning_rate * self.mlp_learning_rate_share},
        ]

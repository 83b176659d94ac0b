"""Variational autoencoders: encoders, and decoders that are generators. No layer couples the records of a batch."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lightning_dp.errors import ConfigurationError
from lightning_dp.networks.basis import dct_matrix, lowest_frequencies
from lightning_dp.networks.generator import Generator

_MIN_LOG_VARIANCE, _MAX_LOG_VARIANCE = -8.0, 4.0
# A coefficient of 1 at a low frequency moves pixels by about a seventh of a logit (4 / 28).
_GAIN = 4.0
_CHANNELS = (32, 64, 128)
_GROUPS = 8


class VAEEncoder(nn.Module, ABC):
    """Maps an image (and its label) to a normal distribution of latents.

    Attributes:
        latent_dim: Length m of the latent.
        num_classes: Number of labels.
        image_shape: (C, H, W).
    """

    latent_dim: int
    num_classes: int
    image_shape: tuple[int, int, int]

    @abstractmethod
    def features(self, images: Tensor, one_hot: Tensor) -> Tensor:
        """Return means and unbounded log variances side by side, (B, 2 m)."""

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance, (B, m) each, of images in [0, 1], (B, C, H, W), with labels (B,).

        The log variance is cut to [-8, 4]: an encoder pushed by noise could send it anywhere.
        """
        mean, log_variance = self.features(images, one_hot(labels, self.num_classes)).chunk(2, dim=1)
        return mean, log_variance.clamp(_MIN_LOG_VARIANCE, _MAX_LOG_VARIANCE)


class VAEDecoder(Generator):
    """A generator that can also state the logits of its pixels; latents are standard normal."""

    @abstractmethod
    def logits(self, latent: Tensor, labels: Tensor) -> Tensor:
        """Return logits of pixels, (B, C, H, W), of latents (B, m) and labels (B,)."""

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        return torch.sigmoid(self.logits(latent, labels))

    def sample_latent(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Return standard normal latents, (num, m)."""
        like = next(self.parameters())
        source = like.device if generator is None else generator.device
        return torch.randn(num, self.latent_dim, generator=generator, device=source).to(like)


class Autoencoder(nn.Module):
    """An encoder and a decoder side by side, so that their parameters are one vector: encoder first.

    Raises:
        ConfigurationError: They do not fit each other.
    """

    def __init__(self, encoder: VAEEncoder, decoder: VAEDecoder) -> None:
        super().__init__()
        for name in ("latent_dim", "num_classes", "image_shape"):
            mine, theirs = getattr(encoder, name), getattr(decoder, name)
            if mine != theirs:
                raise ConfigurationError(
                    f"Expected encoder and decoder with equal {name}, got {mine} and {theirs}; change model.encoder."
                )
        self.encoder = encoder
        self.decoder = decoder


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Return float one-hot rows, (B, num_classes); unlike PyTorch's own it looks at no value, so `vmap` takes it."""
    return (labels.unsqueeze(1) == torch.arange(num_classes, device=labels.device)).float()


class CosineEncoder(VAEEncoder):
    """One hidden layer on the low frequencies of the image, in the public cosine basis (24k parameters by default).

    Args:
        image_shape: (C, H, W) with H = W.
        num_classes: Number of labels.
        latent_dim: Length of the latent.
        num_coefficients: Frequencies per channel that the encoder sees.
        width: Size of the hidden layer.
        conditional: Whether the encoder is told the label.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int = 10,
        latent_dim: int = 16,
        num_coefficients: int = 144,
        width: int = 128,
        conditional: bool = True,
    ) -> None:
        super().__init__()
        _check_square(image_shape, num_coefficients)
        self.image_shape, self.num_classes, self.latent_dim = image_shape, num_classes, latent_dim
        self.conditional = conditional
        self.analysis: Tensor  # (H * W, num_coefficients), public constants
        self.register_buffer(
            "analysis", dct_matrix(image_shape[1], num_coefficients, image_shape[1]).T, persistent=False
        )
        self.hidden = nn.Linear(image_shape[0] * num_coefficients + num_classes * conditional, width)
        self.head = nn.Linear(width, 2 * latent_dim)

    def features(self, images: Tensor, one_hot: Tensor) -> Tensor:  # noqa: D102
        coefficients = (images.flatten(2) @ self.analysis.to(images)).flatten(1)
        joined = torch.cat([coefficients, one_hot.to(images)], dim=1) if self.conditional else coefficients
        parameters: Tensor = self.head(torch.tanh(self.hidden(joined)))
        return parameters


class CosineDecoder(VAEDecoder):
    """A mean per class and one hidden layer, written in the public cosine basis (24k parameters by default).

    Amplitudes fall with frequency, as they do in natural images, so equal noise on all parameters hurts fine detail
    and not the shape.

    Args:
        image_shape: (C, H, W) with H = W.
        num_classes: Number of labels.
        latent_dim: Length of the latent.
        num_coefficients: Frequencies per channel that the decoder writes.
        width: Size of the hidden layer.
        corner_frequency: Amplitudes fall as 1 / (1 + (f / corner_frequency)^2).
        background: Logit of a pixel before training; negative for dark backgrounds.
        conditional: Whether the decoder is told the label; without it, samples of all labels look alike.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int = 10,
        latent_dim: int = 16,
        num_coefficients: int = 144,
        width: int = 128,
        corner_frequency: float = 6.0,
        background: float = -2.0,
        conditional: bool = True,
    ) -> None:
        super().__init__()
        _check_square(image_shape, num_coefficients)
        self.image_shape, self.num_classes, self.latent_dim = image_shape, num_classes, latent_dim
        self.num_coefficients, self.width, self.corner_frequency = num_coefficients, width, corner_frequency
        self.background, self.conditional = background, conditional
        dim = image_shape[0] * num_coefficients
        self.hidden = nn.Linear(latent_dim + num_classes * conditional, width)
        self.head = nn.Linear(width, dim)
        self.means = nn.Linear(num_classes, dim, bias=False) if conditional else None
        if self.means is not None:
            nn.init.zeros_(self.means.weight)
        side = image_shape[1]
        radius = torch.tensor([math.hypot(*pair) for pair in lowest_frequencies(side, num_coefficients)])
        amplitudes = _GAIN / (1 + (radius / corner_frequency) ** 2)
        self.synthesis: Tensor  # (num_coefficients, H * W), public constants
        matrix = dct_matrix(side, num_coefficients, side) * amplitudes[:, None]
        self.register_buffer("synthesis", matrix, persistent=False)

    def logits(self, latent: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        if self.means is None:
            coefficients = self.head(torch.tanh(self.hidden(latent)))
        else:
            told = one_hot(labels, self.num_classes).to(latent)
            coefficients = self.head(torch.tanh(self.hidden(torch.cat([latent, 2 * told], dim=1)))) + self.means(told)
        pixels = coefficients.unflatten(1, (self.image_shape[0], self.num_coefficients)) @ self.synthesis.to(latent)
        return (pixels + self.background).unflatten(2, self.image_shape[1:])


class ConvEncoder(VAEEncoder):
    """Three strided convolutions with group norm, 32-64-128 channels, and a linear layer.

    Args:
        image_shape: (C, H, W), sides of at least 8 pixels.
        num_classes: Number of labels.
        latent_dim: Length of the latent.
        conditional: Whether the encoder is told the label.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int = 10,
        latent_dim: int = 32,
        conditional: bool = True,
    ) -> None:
        super().__init__()
        self.image_shape, self.num_classes, self.latent_dim = image_shape, num_classes, latent_dim
        self.conditional = conditional
        layers: list[nn.Module] = []
        inputs = image_shape[0]
        for outputs in _CHANNELS:
            layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.GroupNorm(_GROUPS, outputs), nn.SiLU()]
            inputs = outputs
        self.body = nn.Sequential(*layers, nn.Flatten())
        flat = inputs * (image_shape[1] // 8) * (image_shape[2] // 8)
        if not flat:
            raise ConfigurationError(f"Expected images of at least 8 x 8 pixels for ConvEncoder, got {image_shape=}.")
        self.head = nn.Linear(flat + num_classes * conditional, 2 * latent_dim)

    def features(self, images: Tensor, one_hot: Tensor) -> Tensor:  # noqa: D102
        maps = self.body(images)
        parameters: Tensor = self.head(torch.cat([maps, one_hot.to(maps)], dim=1) if self.conditional else maps)
        return parameters


class ConvDecoder(VAEDecoder):
    """The mirror of `ConvEncoder`: a linear layer and three transposed convolutions with group norm.

    Args:
        image_shape: (C, H, W), H and W divisible by 4.
        num_classes: Number of labels.
        latent_dim: Length of the latent.
        conditional: Whether the decoder is told the label; without it, samples of all labels look alike.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int = 10,
        latent_dim: int = 32,
        conditional: bool = True,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        if height % 4 or width % 4:
            raise ConfigurationError(f"Expected sides divisible by 4 for ConvDecoder, got {image_shape=}.")
        self.image_shape, self.num_classes, self.latent_dim = image_shape, num_classes, latent_dim
        self.conditional = conditional
        first, second, third = reversed(_CHANNELS)
        # A quarter of the side, halved once more and rounded up, so that the first step up lands on it.
        self._grid = ((height // 4 + 1) // 2, (width // 4 + 1) // 2)
        odd = (height // 4 % 2, width // 4 % 2)
        self.stem = nn.Linear(latent_dim + num_classes * conditional, first * math.prod(self._grid))
        self.body = nn.Sequential(
            nn.SiLU(),
            nn.ConvTranspose2d(first, second, 3, stride=2, padding=1, output_padding=(1 - odd[0], 1 - odd[1])),
            nn.GroupNorm(_GROUPS, second),
            nn.SiLU(),
            nn.ConvTranspose2d(second, third, 4, stride=2, padding=1),
            nn.GroupNorm(_GROUPS, third),
            nn.SiLU(),
            nn.ConvTranspose2d(third, channels, 4, stride=2, padding=1),
        )

    def logits(self, latent: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        joined = torch.cat([latent, one_hot(labels, self.num_classes).to(latent)], 1) if self.conditional else latent
        logits: Tensor = self.body(self.stem(joined).unflatten(1, (_CHANNELS[-1], *self._grid)))
        return logits


def _check_square(image_shape: tuple[int, int, int], num_coefficients: int) -> None:
    _, height, width = image_shape
    if height != width or not 1 <= num_coefficients <= height * width:
        raise ConfigurationError(
            f"Expected square images and num_coefficients <= {height * width}, got {image_shape=}, {num_coefficients=}."
        )

"""Public linear bases in which teachers judge images: fewer coordinates, each with far more signal than a pixel.

The basis is fixed beforehand and holds nothing private, so judging in it is post-processing of the fake images and
pre-processing of each record by itself: sensitivities stay what they are.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lightning_dp.errors import ConfigurationError

_STEPS = 2.0**24  # of the rounded basis


class PublicBasis(nn.Module, ABC):
    """A fixed linear map from images to the vectors that teachers judge.

    Attributes:
        dim: Length of a vector.
        image_shape: (C, H, W) of the images.
    """

    dim: int
    image_shape: tuple[int, int, int]

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Return vectors, (B, dim), of images, (B, C, H, W), each image by itself."""


class LowFrequencyDCT(PublicBasis):
    """The lowest frequencies of the two-dimensional cosine transform (type II, orthonormal), per channel.

    Args:
        image_shape: (C, H, W) with H = W.
        num_coefficients: Frequencies kept per channel, the smallest by radius.
        window: Side of the centred square that is transformed; null takes the whole image.

    Raises:
        ConfigurationError: The numbers do not fit each other.

    Example:
        >>> basis = LowFrequencyDCT((1, 8, 8), num_coefficients=64)
        >>> images = torch.rand(2, 1, 8, 8)
        >>> torch.allclose(basis(images).norm(dim=1), images.flatten(1).norm(dim=1), atol=1e-5)
        True
    """

    def __init__(
        self, image_shape: tuple[int, int, int], num_coefficients: int = 64, window: int | None = None
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        side = height if window is None else window
        if height != width or not 1 <= side <= height or not 1 <= num_coefficients <= side * side:
            raise ConfigurationError(
                f"Expected square images, window <= {height} and num_coefficients <= window^2, got image_shape="
                f"{image_shape}, {window=}, {num_coefficients=}."
            )
        self.image_shape = (channels, height, width)
        self.num_coefficients, self.window = num_coefficients, window
        self.dim = channels * num_coefficients
        self.matrix: Tensor
        self.register_buffer("matrix", dct_matrix(height, num_coefficients, side), persistent=False)
        self.radii: Tensor  # (num_coefficients,), the frequencies
        radii = torch.tensor([math.hypot(*pair) for pair in lowest_frequencies(side, num_coefficients)])
        self.register_buffer("radii", radii, persistent=False)

    @property
    def vector_radii(self) -> Tensor:
        """Frequencies of the numbers of a vector, float64, (dim,)."""
        return self.radii.double().repeat(self.image_shape[0])

    def in_steps(self, images: Tensor, steps: float) -> Tensor:
        """Return the vectors of images in whole steps, float64, (B, dim).

        Exact, so that an image's vector is the same to the last bit whatever others are beside it, which a rounded
        matrix product does not promise: pixels and the rounded basis are whole numbers, and sums stay below 2^53.

        Args:
            images: uint8, (B, C, H, W), H * W below 2^17.
            steps: Steps to a unit (pixels in [0, 1]).
        """
        rounded = (self.matrix.double() * _STEPS).round().to(images.device)
        products = images.flatten(2).double() @ rounded.T
        return (products * (steps / (255 * _STEPS))).round().flatten(1)

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        return (images.flatten(2) @ self.matrix.to(images).T).flatten(1)


def dct_matrix(size: int, num_coefficients: int, window: int) -> Tensor:
    """Return the orthonormal rows of the lowest frequencies, (num_coefficients, size * size), float32.

    Args:
        size: Side of the image.
        num_coefficients: Number of rows.
        window: Side of the centred square that the rows live on.
    """
    frequencies, places = torch.arange(window).double()[:, None], torch.arange(window).double()[None, :]
    line = math.sqrt(2 / window) * torch.cos(math.pi * (places + 0.5) * frequencies / window)
    line[0] /= math.sqrt(2)
    pairs = lowest_frequencies(window, num_coefficients)
    rows = torch.zeros(num_coefficients, size, size, dtype=torch.float64)
    offset = (size - window) // 2
    inside = slice(offset, offset + window)
    for index, (down, across) in enumerate(pairs):
        rows[index, inside, inside] = torch.outer(line[down], line[across])
    return rows.flatten(1).float()


def lowest_frequencies(window: int, num: int) -> list[tuple[int, int]]:
    """Return `num` frequency pairs in order of their radius."""
    pairs = [(down, across) for down in range(window) for across in range(window)]
    return sorted(pairs, key=lambda pair: (pair[0] ** 2 + pair[1] ** 2, pair))[:num]

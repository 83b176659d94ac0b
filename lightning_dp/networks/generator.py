"""The interface of every generator: latent and label in, native output out, images on request."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Generator(nn.Module, ABC):
    """A class-conditional generator whose *native* output is what the teachers judge.

    The native output is the image itself for pixel-space generators and a vector of coefficients in a public basis for
    the others; `to_images` turns either into pixels. A releasable generator keeps no buffer that depends on data.

    Attributes:
        latent_dim: Length of the latent vector.
        num_classes: Number of labels.
        image_shape: (C, H, W) of the images.
    """

    latent_dim: int
    num_classes: int
    image_shape: tuple[int, int, int]

    @property
    @abstractmethod
    def output_shape(self) -> tuple[int, ...]:
        """Shape of one native output."""

    @abstractmethod
    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        """Return native outputs, (B, *output_shape), of latents (B, latent_dim) and integer labels (B,)."""

    @abstractmethod
    def to_images(self, native: Tensor) -> Tensor:
        """Return images in [0, 1], (B, C, H, W), of native outputs."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Return native outputs that stand for real images in [0, 1]: the public map into the generator's space."""

    @abstractmethod
    def sample_latent(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Return `num` latents, (num, latent_dim), on the device of the parameters."""

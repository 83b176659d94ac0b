"""The interface of every generator: latent and label in, image out."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_dp.networks.releasable import ReleasableNetwork


class Generator(ReleasableNetwork):
    """A class-conditional generator of images.

    Attributes:
        latent_dim: Length of the latent vector.
    """

    kind: ClassVar[str] = "generator"
    latent_dim: int

    @abstractmethod
    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        """Return images in [0, 1], (B, C, H, W), of latents (B, latent_dim) and integer labels (B,)."""

    @abstractmethod
    def sample_latent(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Return `num` latents, (num, latent_dim), on the device of the parameters."""

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups; one group unless the network knows better."""
        return [{"params": list(self.parameters()), "lr": learning_rate}]

    def match_moments(self, images: Tensor, labels: Tensor) -> None:
        """Set the parameters from moments of public images, where that has a closed form; nothing by default.

        Args:
            images: Public or released, in [0, 1], (N, C, H, W), on the device of the parameters.
            labels: (N,).
        """
        return

    def finished(self, images: Tensor, stream: torch.Generator) -> Tensor:
        """Return samples as they are shown; what a generator adds to them alone, and not while it learns, goes here.

        Args:
            images: In [0, 1], float32, (B, C, H, W), on the CPU.
            stream: Of the randomness of these samples.
        """
        return images

    @torch.no_grad()
    def sample(
        self, num: int, *, seed: int | None = None, labels: Tensor | None = None, batch_size: int = 250
    ) -> tuple[Tensor, Tensor]:
        """Return images and their labels; labels are uniform over the classes unless given.

        Args:
            num: Number of images, >= 1.
            seed: Makes the samples reproducible; None draws fresh ones.
            labels: Labels of the images, (num,); None takes every class in turn.
            batch_size: Images made at a time, with mixed labels. Generators with batch statistics depend on it.

        Returns:
            Images in [0, 1], float32, (num, C, H, W), and labels, int64, (num,), both on the CPU.
        """
        device = next(self.parameters()).device
        stream = torch.Generator()
        if seed is None:
            stream.seed()
        else:
            stream.manual_seed(seed)
        wanted = torch.arange(num) % self.num_classes if labels is None else labels.to(torch.int64).cpu()
        order = torch.randperm(num, generator=stream)
        images = torch.empty(num, *self.image_shape)
        for part in order.split(batch_size):
            made = self(self.sample_latent(len(part), stream), wanted[part].to(device))
            images[part] = self.finished(made.float().cpu(), stream)
        return images, wanted

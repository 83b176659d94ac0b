"""The interface of every generator: latent and label in, image out."""

import inspect
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class Generator(nn.Module, ABC):
    """A class-conditional generator of images.

    A subclass keeps its constructor arguments as attributes of the same names, so that a released generator can be
    rebuilt, and no persistent buffer, which could carry statistics of private data.

    Attributes:
        latent_dim: Length of the latent vector.
        num_classes: Number of labels.
        image_shape: (C, H, W) of the images.
    """

    latent_dim: int
    num_classes: int
    image_shape: tuple[int, int, int]

    @abstractmethod
    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        """Return images in [0, 1], (B, C, H, W), of latents (B, latent_dim) and integer labels (B,)."""

    @abstractmethod
    def sample_latent(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Return `num` latents, (num, latent_dim), on the device of the parameters."""

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups; one group unless the network knows better."""
        return [{"params": list(self.parameters()), "lr": learning_rate}]

    def options(self) -> dict[str, Any]:
        """Return the constructor's arguments, from the attributes of the same names.

        Raises:
            TypeError: The class keeps an argument under another name, so a released generator could not be rebuilt.
        """
        names = [name for name in inspect.signature(type(self).__init__).parameters if name != "self"]
        missing = [name for name in names if not hasattr(self, name)]
        if missing:
            raise TypeError(f"{type(self).__name__} must keep its constructor arguments as attributes: {missing}.")
        return {name: getattr(self, name) for name in names}

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
            images[part] = made.float().cpu()
        return images, wanted

"""The interface of every discriminator: sample and one-hot label in, one logit out."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lightning_dp.errors import ConfigurationError


class Discriminator(nn.Module, ABC):
    """A label-conditional judge of native outputs, fit to be one of many stacked teachers.

    It keeps no buffer and mixes the samples of one call at most (batch statistics), never those of two calls.

    Attributes:
        min_batch: Fewest samples per call (2 where batch statistics are taken).
        dense_layers: Names of the linear layers, in order, of a network that is nothing but these on flattened samples,
            with leaky ReLUs (`small.LEAK`) between them, and reads the output of a sample's label; empty for others.
    """

    min_batch: int = 1
    dense_layers: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, samples: Tensor, one_hot: Tensor) -> Tensor:
        """Return logits (B,), high for real, of samples (B, *sample_shape) and one-hot labels (B, num_classes)."""

    @torch.no_grad()
    def check_takes(self, samples: Tensor, num_classes: int, *, where: str) -> None:
        """Refuse samples of another shape than the network was made for, before anything is spent on them.

        Args:
            samples: At least `min_batch` public samples of the shape that it will judge.
            num_classes: Number of labels.
            where: The setting that names the network.

        Raises:
            ConfigurationError: It cannot judge them.
        """
        samples = samples.to(next(self.parameters()))
        try:
            with torch.random.fork_rng(devices=[]):
                self(samples, samples.new_zeros(len(samples), num_classes))
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ConfigurationError(
                f"{where} cannot judge {tuple(samples.shape[1:])} with {num_classes} classes ({reason}); set the sizes "
                f"among the options of {where}."
            ) from None

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw new initial parameters in place."""

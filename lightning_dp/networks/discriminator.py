"""The interface of every discriminator: sample and one-hot label in, one logit out."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


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

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw new initial parameters in place."""

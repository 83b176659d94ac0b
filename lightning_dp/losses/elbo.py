"""The parts of the evidence lower bound of a variational autoencoder, each record by itself."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of N(mean, diag exp(log_variance)) from N(0, I).

    Args:
        mean: (B, m).
        log_variance: (B, m).

    Returns:
        (B,), >= 0, in nats.

    Example:
        >>> kl_to_standard_normal(torch.ones(1, 6), torch.zeros(1, 6))
        tensor([3.])
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)


def bernoulli_nll(logits: Tensor, images: Tensor) -> Tensor:
    """Return minus the log likelihood of gray pixels as Bernoulli means, summed over pixels.

    Args:
        logits: (B, C, H, W).
        images: In [0, 1], the same shape or one that broadcasts to it.

    Returns:
        (B,), in nats.
    """
    terms = F.binary_cross_entropy_with_logits(logits, images.expand_as(logits), reduction="none")
    return terms.flatten(1).sum(dim=1)


def gaussian_nll(logits: Tensor, images: Tensor, *, std: float) -> Tensor:
    """Return minus the log likelihood of pixels as normal around sigmoid(logits), summed over pixels.

    Args:
        logits: (B, C, H, W).
        images: In [0, 1], the same shape or one that broadcasts to it.
        std: Standard deviation of a pixel, > 0.

    Returns:
        (B,), in nats.
    """
    errors = (torch.sigmoid(logits) - images).div(std).square()
    constant = math.log(2 * math.pi * std * std)
    return 0.5 * (errors + constant).flatten(1).sum(dim=1)

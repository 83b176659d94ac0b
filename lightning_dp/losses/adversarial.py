"""Losses of the non-saturating GAN that DataLens and G-PATE train."""

import torch.nn.functional as F
from torch import Tensor


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return mean softplus(-D(real)) + mean softplus(D(fake)), a scalar, of logits (B,) each."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Return mean softplus(-D(fake)), a scalar, of logits (B,): the non-saturating loss of the generator."""
    return F.softplus(-fake_logits).mean()

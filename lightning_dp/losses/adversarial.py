"""Losses of the GANs that teachers train: the non-saturating one, and Wasserstein with a gradient penalty."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Objective = Literal["non_saturating", "wasserstein"]

_DRIFT = 1e-3  # keeps the scores of records near zero, where their common shift would be free (Karras et al. 2018)
_SLOPE_EPS = 1e-12  # the norm of a zero slope has no gradient


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return mean softplus(-D(real)) + mean softplus(D(fake)), a scalar.

    Args:
        real_logits: Of records, (B,), high for real.
        fake_logits: Of fakes, (B,).

    References:
        Goodfellow et al. (2014) "Generative adversarial nets", Algorithm 1 and section 3.
    """
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def wasserstein_critic_loss(real_scores: Tensor, fake_scores: Tensor, slopes: Tensor, *, penalty: float) -> Tensor:
    """Return the loss of a critic whose slope is drawn to one.

    mean D(fake) - mean D(real) + penalty mean (|slope| - 1)^2 + 0.001 mean D(real)^2, as GS-WGAN trains it.

    Args:
        real_scores: (B,).
        fake_scores: (B,).
        slopes: Gradient of each score with respect to its sample, at points between records and fakes, (B, ...).
        penalty: Weight of the slopes.

    Returns:
        A scalar.

    References:
        Gulrajani et al. (2017) "Improved training of Wasserstein GANs", Algorithm 1.
    """
    norms = (slopes.flatten(1).square().sum(1) + _SLOPE_EPS).sqrt()
    distance = fake_scores.mean() - real_scores.mean()
    return distance + penalty * (norms - 1).square().mean() + _DRIFT * real_scores.square().mean()


def generator_loss(fake_logits: Tensor, objective: Objective = "non_saturating") -> Tensor:
    """Return the loss of the generator, a scalar, of logits or scores (B,).

    Args:
        fake_logits: What the judge says of the fakes.
        objective: non_saturating is mean softplus(-D(fake)); wasserstein is -mean D(fake).
    """
    return F.softplus(-fake_logits).mean() if objective == "non_saturating" else -fake_logits.mean()


def between(real: Tensor, fake: Tensor, shares: Tensor) -> Tensor:
    """Return points between records and fakes, (..., B, *sample_shape).

    Args:
        real: (..., B, *sample_shape).
        fake: The same shape.
        shares: Share of the record in each point, (B,), in [0, 1].
    """
    return torch.lerp(fake, real, shares.reshape(-1, *[1] * (real.ndim - 1)))

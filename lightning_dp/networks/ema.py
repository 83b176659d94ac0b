"""Exponential moving average of a network's parameters: post-processing of released iterates, hence free."""

import copy

import torch
from torch import nn


class ExponentialMovingAverage(nn.Module):
    """Keeps an average copy of a network, with a warm-up so that early iterates do not linger.

    The decay at update t is min(decay, (1 + t) / (10 + t)) (De et al. 2022, released code).

    Args:
        network: The network that is averaged; it is copied.
        decay: Weight of the old average, in (0, 1).
    """

    def __init__(self, network: nn.Module, *, decay: float) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(requires_grad=False)
        self.decay = decay
        self.num_updates = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move the average towards the current parameters of `network`."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        for mine, theirs in zip(self.network.parameters(), network.parameters(), strict=True):
            mine.lerp_(theirs.detach(), 1 - decay)

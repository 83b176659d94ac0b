"""The learning rate over a run."""

import math

from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def with_cosine_schedule(optimizer: Optimizer, *, num_steps: int, final_share: float) -> OptimizerLRScheduler:
    """Return the optimizer with a learning rate that falls along a half cosine to a share of itself.

    Args:
        optimizer: The optimizer.
        num_steps: Steps of the whole run, public.
        final_share: The last learning rate over the first, in (0, 1]; 1 keeps it, and then there is no schedule.
    """
    if final_share == 1:
        return [optimizer], []
    last = max(1, num_steps)

    def share(step: int) -> float:
        return final_share + (1 - final_share) * (1 + math.cos(math.pi * min(step, last) / last)) / 2

    return [optimizer], [LambdaLR(optimizer, share)]

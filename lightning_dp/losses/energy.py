"""The energy distance between samples (Szekely and Rizzo 2013), by its gradient.

E(P, Q) = 2 E|X - Y| - E|X - X'| - E|Y - Y'|. The direction in which a fake x lowers it is the mean unit vector towards
the real records minus the mean unit vector towards the other fakes. The first half is private and needs no gradient of
anything; the second half is public.
"""

import torch
from torch import Tensor


def unit_directions(targets: Tensor, points: Tensor) -> Tensor:
    """Return the unit vectors from points to targets.

    Args:
        targets: (n, d).
        points: (q, d).

    Returns:
        (n, q, d); zero where a target and a point coincide.
    """
    difference = targets.unsqueeze(1) - points.unsqueeze(0)  # (n, q, d)
    norms = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
    return difference / norms.clamp(min=torch.finfo(norms.dtype).tiny)


def mean_unit_direction(targets: Tensor, points: Tensor) -> Tensor:
    """Return the mean over targets of the unit vectors from points to targets, without the (n, q, d) tensor.

    Args:
        targets: (n, d), n >= 1.
        points: (q, d).

    Returns:
        (q, d).
    """
    distances = torch.cdist(points, targets)  # (q, n)
    weights = 1.0 / distances.clamp(min=1e-6)
    weights = torch.where(distances > 1e-6, weights, torch.zeros_like(weights))
    return (weights @ targets - weights.sum(dim=1, keepdim=True) * points) / targets.shape[0]

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

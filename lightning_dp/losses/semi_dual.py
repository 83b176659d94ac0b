"""Entropic transport whose gradient is a sum over the second points: the semi-dual, at given potentials of the first.

Symbols as in `lightning_dp.losses.sinkhorn`; the cost is |x - y|^2, weights are uniform. With the best g for a given f,

    W >= mean_i f_i + mean_j g_j,    g_j = -eps log mean_i exp((f_i - |x_i - y_j|^2) / eps),

with equality at the optimal f (Genevay et al. 2016). f fixed, the gradient with respect to the x is a mean over the y:
point y_j spreads a mass of one over the x by itself, whatever the other y are. The plan of a whole batch cannot be
taken apart like this.
"""

import math

import torch
from torch import Tensor

# Averaged updates at falling temperatures, in units of the last one; few, since the next step asks for others.
_SCHEDULE = (4.0, 2.0, *(1.0,) * 8)


@torch.no_grad()
def balanced_potentials(first: Tensor, second: Tensor, *, entropic_reg: float) -> Tensor:
    """Return the potentials f of the first points in the transport to the second, by a few averaged Sinkhorn updates.

    Args:
        first: (groups, n, d); each group is a problem of its own.
        second: (groups, m, d).
        entropic_reg: The temperature eps, > 0.

    Returns:
        (groups, n), float64.
    """
    costs = torch.cdist(first.double(), second.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    f, g = costs.new_zeros(costs.shape[:2]), costs.new_zeros(costs.shape[0], costs.shape[2])
    for factor in _SCHEDULE:
        reg = factor * entropic_reg
        f, g = (f + _best(g[:, None, :] - costs, 2, reg)) / 2, (g + _best(f[:, :, None] - costs, 1, reg)) / 2
    return _best(g[:, None, :] - costs, 2, entropic_reg)


@torch.no_grad()
def directions_to(points: Tensor, potentials: Tensor, targets: Tensor, *, entropic_reg: float) -> Tensor:
    """Return for each target by itself how it moves the points: minus the gradient of its g_j, 2 pi_i (y_j - x_i).

    pi is the softmax of (f_i - |x_i - y_j|^2) / eps over the points. The mean over targets is minus the gradient of
    the semi-dual. No number of a target's row depends on another target: differences are taken one by one, and there
    is no matrix product.

    Args:
        points: x, (n, d).
        potentials: f, (n,).
        targets: y, (m, d).
        entropic_reg: The temperature eps, > 0.

    Returns:
        (m, n, d), float64.
    """
    differences = targets.double()[:, None] - points.double()[None]
    scores = (potentials.double() - differences.square().sum(2)) / entropic_reg
    return differences.mul_(2 * scores.softmax(1)[:, :, None])


def _best(scores: Tensor, dim: int, reg: float) -> Tensor:
    """Return the potentials that are best for those in the scores, with uniform weights along `dim`."""
    return -reg * (torch.logsumexp(scores / reg, dim) - math.log(scores.shape[dim]))

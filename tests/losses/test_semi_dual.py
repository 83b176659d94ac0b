import math

import pytest
import torch

from lightning_dp.losses.semi_dual import balanced_potentials, directions_to
from lightning_dp.losses.sinkhorn import SinkhornSolver, cross_term
from lightning_dp.losses.transport_cost import PointCloud, TransportCost

EPS = 3.0
STREAM = torch.Generator().manual_seed(3)
POINTS = torch.randn(7, 4, generator=STREAM, dtype=torch.float64)
TARGETS = torch.randn(9, 4, generator=STREAM, dtype=torch.float64) + 0.5
POTENTIALS = torch.randn(7, generator=STREAM, dtype=torch.float64)


def semi_dual(points, potentials, targets):
    """mean f + mean g, with g the best for f, by the formula."""
    scores = (potentials[:, None] - torch.cdist(points, targets).square()) / EPS
    return potentials.mean() - EPS * (torch.logsumexp(scores, 0) - math.log(len(points))).mean()


def test_the_mean_direction_is_minus_the_gradient_of_the_semi_dual():
    points = POINTS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(semi_dual(points, POTENTIALS, TARGETS), points)
    mean = directions_to(POINTS, POTENTIALS, TARGETS, entropic_reg=EPS).mean(0)
    torch.testing.assert_close(mean, -gradient)


def test_at_the_potentials_of_the_targets_it_is_the_gradient_of_the_transport():
    """Against the solver that plans the whole batch: equal potentials, equal value, equal gradient."""
    solver = SinkhornSolver(method="converged", entropic_reg=EPS, tolerance=1e-10)
    value, gradient = cross_term(
        PointCloud(POINTS), PointCloud(TARGETS), cost=TransportCost(l1_weight=0), solver=solver
    )
    f = POTENTIALS.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([f], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = -semi_dual(POINTS, f, TARGETS)
        loss.backward()
        return loss

    optimizer.step(closure)
    best = f.detach()
    assert 2 * semi_dual(POINTS, best, TARGETS).item() == pytest.approx(value.item(), abs=1e-6)
    assert semi_dual(POINTS, POTENTIALS, TARGETS) < semi_dual(POINTS, best, TARGETS)
    mean = directions_to(POINTS, best, TARGETS, entropic_reg=EPS).mean(0)
    torch.testing.assert_close(2 * mean, -gradient, rtol=1e-4, atol=1e-6)


def test_a_few_updates_nearly_balance_the_masses():
    """Each point should carry 1 / n of the mass; without potentials it does not."""
    found = balanced_potentials(POINTS[None], TARGETS[None], entropic_reg=EPS)[0]

    def imbalance(potentials):
        masses = ((potentials[:, None] - torch.cdist(POINTS, TARGETS).square()) / EPS).softmax(0).mean(1)
        return float((masses - 1 / 7).abs().sum())

    assert imbalance(found) < 0.05 < 0.2 < imbalance(torch.zeros(7))


def test_groups_are_problems_of_their_own():
    first, second = torch.stack([POINTS, -POINTS]), torch.stack([TARGETS, 2 * TARGETS])
    both = balanced_potentials(first, second, entropic_reg=EPS)
    for index in range(2):
        one = balanced_potentials(first[index : index + 1], second[index : index + 1], entropic_reg=EPS)
        torch.testing.assert_close(both[index], one[0])


def test_a_row_is_equal_to_the_bit_whatever_others_are_beside_it():
    together = directions_to(POINTS.float(), POTENTIALS, TARGETS.float(), entropic_reg=EPS)
    for index in range(9):
        alone = directions_to(POINTS.float(), POTENTIALS, TARGETS[index : index + 1].float(), entropic_reg=EPS)
        assert torch.equal(together[index], alone[0])

"""Sinkhorn against solvers that share nothing with it: a linear program, and the semi-dual by BFGS."""

import os
import shutil

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

from lightning_dp.losses import sinkhorn
from lightning_dp.losses.sinkhorn import SinkhornSolver, entropic_transport, self_term
from lightning_dp.losses.transport_cost import PointCloud, TransportCost
from tests.losses.test_transport_cost import by_features, cloud

COSTS = [TransportCost(l1_weight=0, label_weight=0), TransportCost(l1_weight=1, label_weight=1)]


def exact(reg) -> SinkhornSolver:
    return SinkhornSolver(
        method="converged", entropic_reg=reg, start_reg=max(reg, 5.0), tolerance=1e-13, max_iterations=20_000
    )


def weighted(num, seed) -> PointCloud:
    """Points with unequal weights."""
    points = cloud(num, seed=seed)
    weights = torch.rand(num, generator=torch.Generator().manual_seed(seed + 10), dtype=torch.float64) + 0.2
    return PointCloud(points.points, points.labels, (weights / weights.sum()).log())


def by_linear_program(x, y, cost) -> float:
    """The best unregularised plan."""
    n, m = len(x.points), len(y.points)
    marginals = np.concatenate([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    masses = torch.cat([x.log_masses().exp(), y.log_masses().exp()]).numpy()
    return linprog(by_features(x, y, cost).flatten().numpy(), A_eq=marginals, b_eq=masses).fun


def by_dual(x, y, cost, reg) -> tuple[float, torch.Tensor]:
    """The semi-dual over g, maximised by BFGS, and the gradient at the first points by autograd at its optimum."""
    log_b, a = y.log_masses(), x.log_masses().exp()

    def value(g, costs):
        return g @ log_b.exp() - reg * (a @ torch.logsumexp(log_b + (g - costs) / reg, 1))

    def negated(numbers):
        g = torch.from_numpy(numbers).requires_grad_()
        loss = -value(g, by_features(x, y, cost))
        loss.backward()
        return loss.item(), g.grad.numpy()

    best = minimize(negated, np.zeros(len(y.points)), jac=True, method="BFGS", options={"gtol": 1e-11, "maxiter": 5000})
    points = x.points.clone().requires_grad_()
    found = value(torch.from_numpy(best.x), by_features(PointCloud(points, x.labels), y, cost))
    found.backward()
    return found.item(), points.grad


class TestOracles:
    @pytest.mark.parametrize("cost", COSTS, ids=str)
    @pytest.mark.parametrize("seed", range(3))
    def test_low_temperatures_reach_the_linear_program(self, cost, seed):
        """The regularised value is above the best cost by at most reg KL(best plan | a x b) < 3 reg here."""
        x, y, reg = weighted(6, seed), weighted(5, seed + 1), 0.01
        found = entropic_transport(x, y, cost=cost, solver=exact(reg)).value.item()
        best = by_linear_program(x, y, cost)
        assert best - 1e-9 <= found <= best + 3 * reg

    @pytest.mark.parametrize("cost", COSTS, ids=str)
    @pytest.mark.parametrize("reg", [0.5, 5.0])
    def test_value_and_gradient_equal_those_of_the_dual(self, cost, reg):
        x, y = weighted(6, 0), weighted(5, 1)
        expected, gradient = by_dual(x, y, cost, reg)
        found = entropic_transport(x, y, cost=cost, solver=exact(reg))
        assert found.value.item() == pytest.approx(expected, abs=1e-10)
        torch.testing.assert_close(found.first_gradient, gradient, rtol=1e-6, atol=1e-8)


class TestCompiled:
    @staticmethod
    def steps(compiled):
        solver = SinkhornSolver(start_reg=50.0, cooling=0.1, compiled=compiled)
        x, y = cloud(6, 9, dtype=torch.float32), cloud(4, 9, seed=1, dtype=torch.float32)
        padded = PointCloud(y.points, y.labels, torch.tensor([0.5, 0.25, 0.25, 0.0]).log())
        value, gradient = self_term(x, 5, cost=TransportCost(), solver=solver)
        cross = entropic_transport(x, padded, cost=TransportCost(), solver=solver, second_gradient=True)
        return value, gradient, cross.value, cross.first_gradient, cross.second_gradient

    def assert_equal(self):
        for one, other in zip(self.steps(True), self.steps(False), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

    @pytest.fixture
    def forgotten(self):
        """Nothing compiled before, nothing left behind."""
        sinkhorn._compiled.cache_clear()
        yield
        sinkhorn._compiled.cache_clear()

    def test_what_is_compiled_gives_what_is_not(self, forgotten, monkeypatch):
        """The functions themselves; the compiler's own work is checked with the long tests."""
        seen = []
        monkeypatch.setattr(torch, "compile", lambda function, **options: seen.append(options) or function)
        self.assert_equal()
        assert [(one["fullgraph"], one["dynamic"]) for one in seen] == 2 * [(True, False)]

    def test_what_is_compiled_has_no_sign_at_equal_coordinates_and_a_whole_one_at_others(self):
        """Its signs are clamped slopes: exact for every difference that is no denormal."""
        steps = torch.tensor([[0.0, 1e-30, -1e-37, 1.0, -1.5, 1e-3]])
        gradients = [
            TransportCost(l1_weight=weight).gradient(
                PointCloud(steps), PointCloud(torch.zeros(1, 6)), torch.ones(1, 1).double(), at_once=True
            )
            for weight in (0.0, 4096.0)
        ]
        torch.testing.assert_close((gradients[1] - gradients[0]) / 4096, steps.sign(), rtol=1e-6, atol=0)

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
    @pytest.mark.filterwarnings("ignore")
    def test_compiled_loops_give_the_same(self, forgotten):
        self.assert_equal()

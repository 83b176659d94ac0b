import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dp.errors import ConfigurationError
from lightning_dp.losses.sinkhorn import SinkhornSolver, cross_term, entropic_transport, self_term
from lightning_dp.losses.transport_cost import PointCloud, TransportCost
from tests.losses.test_transport_cost import by_features, cloud

SQUARED = TransportCost(l1_weight=0, label_weight=0)
BOTH = TransportCost(l1_weight=1, label_weight=0)
ANNEAL = SinkhornSolver()


def exact(reg, **options) -> SinkhornSolver:
    """A solver that has converged to the last bits."""
    defaults = {"start_reg": max(reg, 5.0), "tolerance": 1e-13, "max_iterations": 20_000}
    return SinkhornSolver(method="converged", entropic_reg=reg, **{**defaults, **options})


def line(*values) -> PointCloud:
    return PointCloud(torch.tensor(values, dtype=torch.float64)[:, None])


def value(first, second, reg, cost=SQUARED) -> float:
    return entropic_transport(first, second, cost=cost, solver=exact(reg)).value.item()


class TestKnownAnswers:
    @pytest.mark.parametrize("solver", [ANNEAL, exact(0.3), exact(40)], ids=["anneal", "cold", "hot"])
    def test_two_diracs_cost_what_their_distance_costs(self, solver):
        first, second = line(0.5), line(2.5)
        transport = entropic_transport(first, second, cost=BOTH, solver=solver)
        assert transport.value.item() == pytest.approx(4 + 2)
        assert transport.first_gradient.item() == pytest.approx(2 * -2 - 1)

    @pytest.mark.parametrize(
        ("distance", "reg", "expected"), [(1, 0.5, 0.2831095848), (2, 1, 0.5662191695), (450, 5, 3.4657359028)]
    )
    def test_two_points_with_themselves(self, distance, reg, expected):
        """- eps log((1 + exp(-D / eps)) / 2)."""
        points = line(0.0, math.sqrt(distance))
        assert value(points, points, reg) == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize(
        ("reg", "cross", "first", "second", "with_l1"),
        [
            (0.1, 0.6295431454, 0.1098582023, 0.0693147181, 1.2962098120),
            (1.0, 1.0394637234, 0.8793493515, 0.6749972526, 1.7098830532),
            (10.0, 2.2769556912, 2.6338957663, 1.8013192816, 3.3733327028),
        ],
    )
    def test_three_points_against_two(self, reg, cross, first, second, with_l1):
        x, y = line(0, 1, 3), line(0.5, 2.5)
        assert value(x, y, reg) == pytest.approx(cross, abs=1e-9)
        assert value(x, x, reg) == pytest.approx(first, abs=1e-9)
        assert value(y, y, reg) == pytest.approx(second, abs=1e-9)
        assert value(x, y, reg, BOTH) == pytest.approx(with_l1, abs=1e-9)

    def test_limits_are_the_best_assignment_and_the_mean_cost(self):
        x, y = line(0, 1, 3), line(0.5, 2.5)
        assert value(x, y, 1e-3) == pytest.approx(0.5833333333, abs=2e-3)
        assert value(x, y, 1e7) == pytest.approx(2.5833333333, abs=1e-5)

    @given(order=st.permutations(range(6)))
    @settings(max_examples=15, deadline=None)
    def test_a_permuted_cloud_is_matched_point_by_point(self, order):
        """At low temperature the plan is the permutation; its entropy costs eps log n."""
        points = 4 * torch.eye(6, dtype=torch.float64)
        shifted = points[list(order)] + 0.5
        transport = entropic_transport(PointCloud(points), PointCloud(shifted), cost=SQUARED, solver=exact(0.05))
        assert transport.value.item() == pytest.approx(6 * 0.25 + 0.05 * math.log(6), abs=1e-6)
        torch.testing.assert_close(transport.first_gradient, torch.full((6, 6), -1 / 6).double())

    def test_gaussians(self):
        """The cost between N(0, s^2) and N(m, t^2) on the line, both discretised finely (Janati et al. 2020)."""
        grid, (s, t, mean, reg) = torch.linspace(-12, 12, 500, dtype=torch.float64), (1.0, 1.5, 0.7, 0.8)

        def normal(centre, deviation):
            log_density = -((grid - centre) ** 2) / (2 * deviation**2)
            return PointCloud(grid[:, None], log_weights=torch.log_softmax(log_density, 0))

        # With the squared distance as cost, eps = 2 sigma^2 in the paper's notation.
        root = math.sqrt(4 * s**2 * t**2 + (reg / 2) ** 2)
        expected = mean**2 + s**2 + t**2 - root + (reg / 2) * (1 + math.log((root + reg / 2) / reg))
        found = entropic_transport(normal(0.0, s), normal(mean, t), cost=SQUARED, solver=exact(reg, tolerance=1e-10))
        assert found.value.item() == pytest.approx(expected, abs=1e-6)
        assert found.first_gradient.sum().item() == pytest.approx(-2 * mean, abs=1e-6)  # all points move together


class TestGradient:
    @staticmethod
    def unrolled(x, y, cost, reg, num=3000):
        """The value by plain alternating updates that autograd can follow."""
        costs = by_features(x, y, cost)
        f, g = torch.zeros(len(costs), dtype=torch.float64), torch.zeros(costs.shape[1], dtype=torch.float64)
        log_a, log_b = x.log_masses(), y.log_masses()
        for _ in range(num):
            f = -reg * torch.logsumexp(log_b + (g - costs) / reg, 1)
            g = -reg * torch.logsumexp(log_a[:, None] + (f[:, None] - costs) / reg, 0)
        return log_a.exp() @ f + log_b.exp() @ g

    @pytest.mark.parametrize("cost", [SQUARED, TransportCost(), TransportCost(l1_weight=3, label_weight=0.5)], ids=str)
    def test_equals_autograd_through_a_converged_solver(self, cost):
        x, y = cloud(6), cloud(5, seed=1)
        points = [part.points.clone().requires_grad_() for part in (x, y)]
        reg = 20.0 if cost.label_weight == 15 else 2.0
        clouds = [PointCloud(p, part.labels) for p, part in zip(points, (x, y), strict=True)]
        expected = self.unrolled(*clouds, cost, reg)
        expected.backward()
        found = entropic_transport(x, y, cost=cost, solver=exact(reg), second_gradient=True)
        torch.testing.assert_close(found.value, expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.first_gradient, points[0].grad, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(found.second_gradient, points[1].grad, rtol=1e-11, atol=1e-12)

    @pytest.mark.parametrize("extra", [0, 2, 6])
    def test_of_the_self_term_equals_autograd(self, extra):
        z, reg = cloud(6 + extra), 3.0
        cost = TransportCost(l1_weight=1, label_weight=0.5)
        points = z.points.clone().requires_grad_()
        whole = PointCloud(points, z.labels)
        loss = -self.unrolled(whole[:6], whole[extra:], cost, reg)
        loss.backward()
        found, gradient = self_term(z, 6, cost=cost, solver=exact(reg))
        torch.testing.assert_close(found, loss.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, points.grad, rtol=1e-10, atol=1e-12)

    def test_no_graph_is_built(self):
        x = PointCloud(cloud(4).points.requires_grad_())
        found = entropic_transport(x, PointCloud(cloud(4, seed=1).points), cost=SQUARED, solver=ANNEAL)
        assert not found.value.requires_grad
        assert not found.first_gradient.requires_grad


class TestInvariances:
    def test_swapping_the_clouds_swaps_the_gradients(self):
        x, y = cloud(6), cloud(4, seed=1)
        one = entropic_transport(x, y, cost=TransportCost(), solver=ANNEAL, second_gradient=True)
        other = entropic_transport(y, x, cost=TransportCost(), solver=ANNEAL, second_gradient=True)
        torch.testing.assert_close(one.value, other.value)
        torch.testing.assert_close(one.first_gradient, other.second_gradient)
        torch.testing.assert_close(one.second_gradient, other.first_gradient)

    @given(order=st.permutations(range(5)))
    @settings(max_examples=10, deadline=None)
    def test_order_of_the_points_does_not_matter(self, order):
        x, y = cloud(5), cloud(4, seed=1)
        order = list(order)
        one = entropic_transport(x, y, cost=TransportCost(), solver=ANNEAL)
        other = entropic_transport(PointCloud(x.points[order], x.labels[order]), y, cost=TransportCost(), solver=ANNEAL)
        torch.testing.assert_close(one.value, other.value)
        torch.testing.assert_close(one.first_gradient[order], other.first_gradient)

    @pytest.mark.parametrize("log_weight", [-math.inf, -1e9])
    @pytest.mark.parametrize("solver", [ANNEAL, SinkhornSolver(method="converged", entropic_reg=5)], ids=["a", "c"])
    def test_padding_changes_nothing(self, solver, log_weight):
        x, y = cloud(5), cloud(4, seed=1)
        padded = PointCloud(
            torch.cat([y.points, torch.full((3, 7), 9.0).double()]),
            torch.cat([y.labels, torch.zeros(3, dtype=torch.int64)]),
            torch.cat([torch.full((4,), -math.log(4)), torch.full((3,), log_weight)]).double(),
        )
        one = entropic_transport(x, y, cost=TransportCost(), solver=solver)
        other = entropic_transport(x, padded, cost=TransportCost(), solver=solver, second_gradient=True)
        torch.testing.assert_close(other.value, one.value, rtol=1e-6, atol=0)
        torch.testing.assert_close(other.first_gradient, one.first_gradient, rtol=1e-6, atol=1e-9)
        assert not other.second_gradient[4:].any()
        assert torch.isfinite(other.marginal_error)

    def test_labels_never_mix_below_their_cost(self):
        """Moving across classes costs 480, so at eps = 5 each point is pulled by its own class alone."""
        labels = torch.tensor([0, 0, 1, 1])
        x = PointCloud(cloud(4).points, labels)
        y = PointCloud(cloud(4, seed=1).points, labels)
        moved = PointCloud(y.points.clone(), labels)
        moved.points[2:] += 0.5
        one, other = (
            entropic_transport(x, part, cost=TransportCost(), solver=exact(5.0, tolerance=1e-9)) for part in (y, moved)
        )
        torch.testing.assert_close(one.first_gradient[:2], other.first_gradient[:2], rtol=1e-7, atol=1e-9)
        assert not torch.allclose(one.first_gradient[2:], other.first_gradient[2:], rtol=1e-2)

    def test_float32_points_agree_with_float64(self):
        x, y = cloud(8, 50), cloud(8, 50, seed=1)
        low = [PointCloud(part.points.float(), part.labels) for part in (x, y)]
        one = entropic_transport(x, y, cost=TransportCost(), solver=ANNEAL)
        other = entropic_transport(*low, cost=TransportCost(), solver=ANNEAL)
        torch.testing.assert_close(other.value, one.value, rtol=1e-6, atol=0)
        assert (other.first_gradient - one.first_gradient).norm() < 2e-3 * one.first_gradient.norm()


class TestSolver:
    def test_thirteen_temperatures_from_the_diameter_down(self):
        found = ANNEAL.temperatures()
        assert len(found) == 13
        assert found[:3] == [73.2, 73.2, 36.6]
        assert found[-1] == 0.05
        assert found[1:] == sorted(set(found), reverse=True)

    def test_one_temperature(self):
        assert SinkhornSolver(entropic_reg=2, start_reg=2).temperatures() == [2, 2]

    def test_annealing_is_far_from_converged_where_it_is_cold(self):
        x, y = cloud(20, 100, num_classes=1), cloud(20, 100, seed=1, num_classes=1)
        annealed = entropic_transport(x, y, cost=TransportCost(), solver=ANNEAL)
        assert annealed.marginal_error > 0.1
        solver = SinkhornSolver(method="converged", entropic_reg=5)
        converged = entropic_transport(x, y, cost=TransportCost(), solver=solver)
        assert converged.marginal_error < 1e-4

    def test_converged_stops_where_it_is_told_to(self):
        x, y = cloud(20, 100), cloud(20, 100, seed=1)
        few = SinkhornSolver(method="converged", entropic_reg=0.05, max_iterations=5)
        transport = entropic_transport(x, y, cost=TransportCost(), solver=few)
        assert transport.marginal_error > 1e-4
        assert torch.isfinite(transport.first_gradient).all()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"method": "exact"}, "anneal or converged"),
            ({"entropic_reg": 0.0}, "entropic_reg > 0"),
            ({"entropic_reg": 80.0}, "start_reg >="),
            ({"cooling": 1.0}, "cooling < 1"),
            ({"tolerance": 1e-3}, "ignored by anneal"),
            ({"max_iterations": 10}, "ignored by anneal"),
            ({"method": "converged", "tolerance": 0.0}, "tolerance > 0"),
        ],
    )
    def test_bad_options_are_refused(self, options, words):
        with pytest.raises(ConfigurationError, match=words):
            SinkhornSolver(**options)


class TestSemiDebiasing:
    def test_gradient_of_the_cross_term_is_twice_that_of_the_transport(self):
        x, y = cloud(5), cloud(4, seed=1)
        found, gradient = cross_term(x, y, cost=TransportCost(), solver=ANNEAL)
        transport = entropic_transport(x, y, cost=TransportCost(), solver=ANNEAL)
        assert found == 2 * transport.value
        assert torch.equal(gradient, 2 * transport.first_gradient)

    def test_without_a_second_batch_it_is_twice_the_sinkhorn_divergence(self):
        """Loss = 2 S + W(Y, Y), with S = W(X, Y) - W(X, X) / 2 - W(Y, Y) / 2."""
        x, y, solver = line(0, 1, 3), line(0.5, 2.5), exact(1.0)
        loss = cross_term(x, y, cost=SQUARED, solver=solver)[0] + self_term(x, 3, cost=SQUARED, solver=solver)[0]
        assert loss.item() == pytest.approx(2 * 1.0394637234 - 0.8793493515, abs=1e-8)

    def test_a_whole_second_batch_shares_no_row_with_the_first(self):
        """Moving a row of the second batch changes no cost of the first rows with themselves: none enters."""
        z = cloud(8)
        found, gradient = self_term(z, 4, cost=BOTH, solver=ANNEAL)
        transport = entropic_transport(z[:4], z[4:], cost=BOTH, solver=ANNEAL, second_gradient=True)
        assert found == -transport.value
        assert torch.equal(gradient, -torch.cat([transport.first_gradient, transport.second_gradient]))

    def test_rows_of_both_arguments_gather_both_gradients(self):
        z = cloud(6)
        _, gradient = self_term(z, 5, cost=BOTH, solver=ANNEAL)
        transport = entropic_transport(z[:5], z[1:], cost=BOTH, solver=ANNEAL, second_gradient=True)
        torch.testing.assert_close(gradient[0], -transport.first_gradient[0])
        torch.testing.assert_close(gradient[3], -transport.first_gradient[3] - transport.second_gradient[2])
        torch.testing.assert_close(gradient[5], -transport.second_gradient[4])

    def test_one_point_is_biased_towards_collapse_unless_compared_with_another(self):
        """2 (x - y)^2 without a second batch, 2 (x - y)^2 - (x - x')^2 with one.

        For x = t + s z and y ~ N(0, 1) the means are 2 (s^2 + t^2 + 1), which pulls s to zero, and 2 t^2 + 2.
        """
        x, second, y = 0.3 - 2.0, 0.3 + 1.1, 0.4
        cross = cross_term(line(x), line(y), cost=SQUARED, solver=ANNEAL)[0].item()
        assert cross == pytest.approx(2 * (x - y) ** 2)
        assert self_term(line(x), 1, cost=SQUARED, solver=ANNEAL)[0].item() == pytest.approx(0, abs=1e-9)
        found, gradient = self_term(line(x, second), 1, cost=SQUARED, solver=ANNEAL)
        assert found.item() == pytest.approx(-((x - second) ** 2))
        assert gradient.flatten().tolist() == pytest.approx([-2 * (x - second), 2 * (x - second)])

    @pytest.mark.parametrize("num_compared", [3, 9])
    def test_more_extra_points_than_compared_ones_are_refused(self, num_compared):
        with pytest.raises(ValueError, match="num_compared"):
            self_term(cloud(8), num_compared, cost=BOTH, solver=ANNEAL)


class TestOtherPrograms:
    @pytest.mark.parametrize("reg", [0.5, 5.0])
    def test_plan_and_value_equal_those_of_pot(self, reg):
        ot = pytest.importorskip("ot")
        x, y = cloud(6), cloud(5, seed=1)
        cost = TransportCost(l1_weight=1, label_weight=1)
        matrix, uniform = cost.matrix(x, y), [part.log_masses().exp() for part in (x, y)]
        plan = ot.sinkhorn(*uniform, matrix, reg, method="sinkhorn_log", stopThr=1e-15, numItermax=100_000, warn=False)
        divergence = (plan * (plan / (uniform[0][:, None] * uniform[1])).log()).sum()
        solution = exact(reg).solve(matrix, x.log_masses(), y.log_masses())
        torch.testing.assert_close(solution.by_rows, plan, rtol=1e-9, atol=1e-13)
        assert solution.value.item() == pytest.approx(((plan * matrix).sum() + reg * divergence).item(), abs=1e-11)

    def test_low_temperatures_reach_the_exact_assignment_of_pot(self):
        ot = pytest.importorskip("ot")
        x, y = cloud(8, num_classes=1), cloud(8, seed=1, num_classes=1)
        matrix = BOTH.matrix(x, y)
        weights = x.log_masses().exp()
        # The plan of a permutation has entropy log n, which the regularisation charges.
        expected = ot.emd2(weights, weights, matrix).item() + 0.01 * math.log(8)
        assert value(x, y, 0.01, BOTH) == pytest.approx(expected, abs=0.01)

    @pytest.mark.parametrize(("cooling", "dtype"), [(0.5, torch.float32), (0.5, torch.float64), (0.9, torch.float64)])
    @pytest.mark.filterwarnings("ignore")
    def test_annealing_equals_geomloss_with_autograd(self, cooling, dtype):
        geomloss = pytest.importorskip("geomloss")
        solver = SinkhornSolver(cooling=cooling)
        x, y = cloud(12, 30, dtype=dtype), cloud(10, 30, seed=1, dtype=dtype)

        def costs(a, b):
            difference = a[:, :, None] - b[:, None]
            return difference.square().sum(-1) + difference.abs().sum(-1)

        theirs = geomloss.SamplesLoss(
            "sinkhorn", p=1, blur=0.05, scaling=cooling, diameter=73.2, cost=costs, debias=False, backend="tensorized"
        )
        points = x.points.clone().requires_grad_()
        labels = [15 * torch.nn.functional.one_hot(part.labels, 3).to(dtype) for part in (x, y)]
        expected = theirs(torch.cat([points, labels[0]], 1), torch.cat([y.points, labels[1]], 1))
        expected.backward()
        found = entropic_transport(x, y, cost=TransportCost(), solver=solver)
        tolerance = 5e-4 if dtype == torch.float32 else 1e-9
        assert found.value.item() == pytest.approx(expected.item(), rel=tolerance)
        difference = found.first_gradient - points.grad
        assert difference.norm() < tolerance * points.grad.norm()

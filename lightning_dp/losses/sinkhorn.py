"""Entropic optimal transport between labelled points, and its gradient in closed form (DP-Sinkhorn, Cao et al. 2021).

Symbols: n and m points, d coordinates, C the (n, m) cost matrix, a and b the weights, eps the `entropic_reg`, f and g
the dual potentials. The value is

    W = min over plans with marginals a, b of <plan, C> + eps KL(plan | a x b) = max over f, g of <a, f> + <b, g>.

By the envelope theorem the gradient needs the optimal plan only: dW/dx_i = sum_j plan_ij dC_ij/dx_i. Nothing is
differentiated automatically, neither the solver nor the cost.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dp.errors import ConfigurationError
from lightning_dp.losses.transport_cost import PointCloud, TransportCost

_ITERATIONS_PER_CHECK = 10
_TOLERANCE, _MAX_ITERATIONS = 1e-4, 1000
# Products and sums in one rounding: a third less time for the loops over pairs and coordinates.
_COMPILER_OPTIONS: Final[dict[str, str | int | bool | Callable[..., Any]]] = {
    "cpp.enable_floating_point_contract_flag": "fast"
}


@dataclass(frozen=True, kw_only=True)
class SinkhornSolver:
    """How the entropic transport problem is solved, in the log domain.

    `anneal`: one averaged update of both potentials per temperature, on a geometric schedule from `start_reg` down to
    `entropic_reg`, then one update that is not averaged. 13 temperatures at the defaults. It is the published solver,
    and far from converged; its number of operations does not depend on the data.

    `converged`: the same schedule, then alternating updates at `entropic_reg` until the marginals are within
    `tolerance`. With costs of hundreds it wants `entropic_reg` of 5 to 50. How long it takes depends on the points.

    Args:
        method: anneal or converged.
        entropic_reg: Final temperature eps, > 0, in units of the cost.
        start_reg: First temperature, >= entropic_reg. A bound on the distance of two points; it must not be computed
            from private ones. The default is that of 28 x 28 pixels in [-1, 1] with ten labels.
        cooling: Ratio of successive temperatures, in (0, 1).
        tolerance: L1 error of the marginals at which `converged` stops; 1e-4 where left out.
        max_iterations: Updates after which `converged` stops anyway; 1000 where left out. Not reaching the tolerance is
            no error (it would say something of private points); `EntropicTransport.marginal_error` has it.
        compiled: Compile costs, annealing and gradient into one graph for the shapes at hand: a minute at the start,
            then steps of a third of the time, equal up to the rounding of float32. A CPU needs a C++ compiler for it.
            Only for `anneal`, whose number of operations is fixed.

    Raises:
        ConfigurationError: A value is out of range, or would be ignored.

    Example:
        >>> len(SinkhornSolver().temperatures())
        13
    """

    method: Literal["anneal", "converged"] = "anneal"
    entropic_reg: float = 0.05
    start_reg: float = 73.2
    cooling: float = 0.5
    tolerance: float | None = None
    max_iterations: int | None = None
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.method not in ("anneal", "converged"):
            raise ConfigurationError(f"Expected solver.method to be anneal or converged, got method={self.method!r}.")
        if not (math.isfinite(self.entropic_reg) and self.entropic_reg > 0):
            raise ConfigurationError(f"Expected a finite solver.entropic_reg > 0, got {self.entropic_reg}.")
        if not (math.isfinite(self.start_reg) and self.start_reg >= self.entropic_reg):
            raise ConfigurationError(
                f"Expected a finite solver.start_reg >= entropic_reg={self.entropic_reg}, got {self.start_reg}."
            )
        if not 0 < self.cooling < 1:
            raise ConfigurationError(f"Expected 0 < solver.cooling < 1, got cooling={self.cooling}.")
        for name, value in (("tolerance", self.tolerance), ("max_iterations", self.max_iterations)):
            if value is not None and self.method == "anneal":
                raise ConfigurationError(
                    f"solver.{name}={value} belongs to solver.method=converged and would be ignored by anneal."
                )
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigurationError(f"Expected a finite solver.{name} > 0, got {name}={value}.")
        if self.compiled and self.method != "anneal":
            raise ConfigurationError("solver.compiled is for solver.method=anneal; leave it out with converged.")

    def temperatures(self) -> list[float]:
        """Return the temperatures of the averaged updates, falling; the first one serves twice, as published."""
        falling, reg = [self.start_reg], self.start_reg
        while reg > self.entropic_reg:
            falling.append(reg)
            reg = self.start_reg * self.cooling ** (len(falling) - 1)
        return [*falling, self.entropic_reg]

    def solve(self, cost: Tensor, log_a: Tensor, log_b: Tensor) -> "TransportPlan":
        """Return the plan for a cost matrix.

        Args:
            cost: (n, m), float64.
            log_a: Log-weights of the rows, (n,), float64.
            log_b: Log-weights of the columns, (m,), float64.
        """
        problem = _Problem(cost, log_a, log_b)
        g = problem.annealed(self.temperatures())
        if self.method == "anneal":
            return problem.plan(g, self.entropic_reg)
        tolerance = _TOLERANCE if self.tolerance is None else self.tolerance
        max_iterations = _MAX_ITERATIONS if self.max_iterations is None else self.max_iterations
        g = problem.iterated(g, self.entropic_reg, tolerance=tolerance, max_iterations=max_iterations)
        return problem.plan(g, self.entropic_reg)


@dataclass(frozen=True, eq=False)
class TransportPlan:
    """The solution of one problem.

    Attributes:
        value: <a, f> + <b, g>, scalar; W at convergence, often far below it before.
        by_rows: Plan whose row sums are a exactly, (n, m): the weights of the gradient of the first points.
        by_columns: Plan whose column sums are b exactly, (n, m): those of the second points. Both are equal at
            convergence.
    """

    value: Tensor
    by_rows: Tensor
    by_columns: Tensor


@dataclass(frozen=True, eq=False)
class EntropicTransport:
    """Value and gradients of the entropic transport between two clouds.

    Attributes:
        value: W, scalar, float64.
        first_gradient: dW/dx, of the first cloud's shape and type.
        second_gradient: dW/dy likewise; None unless asked for.
        marginal_error: L1 distance of the column sums of `by_rows` from b, scalar; 0 at convergence.
    """

    value: Tensor
    first_gradient: Tensor
    second_gradient: Tensor | None
    marginal_error: Tensor


@torch.no_grad()
def entropic_transport(
    first: PointCloud,
    second: PointCloud,
    *,
    cost: TransportCost,
    solver: SinkhornSolver,
    second_gradient: bool = False,
) -> EntropicTransport:
    """Return the entropic transport cost of two clouds and its gradient by the envelope theorem.

    Args:
        first: n points.
        second: m points.
        cost: What moving costs.
        solver: How to solve.
        second_gradient: Whether the gradient of the second points is wanted too.
    """
    run = _compiled(_transport, cost, solver) if solver.compiled else _transport
    return run(first, second, cost, solver, second_gradient)


def cross_term(
    generated: PointCloud, real: PointCloud, *, cost: TransportCost, solver: SinkhornSolver
) -> tuple[Tensor, Tensor]:
    """Return the private half of the semi-debiased loss, 2 W(X, Y), and its gradient with respect to X.

    Args:
        generated: X, n points.
        real: Y, private.
        cost: What moving costs.
        solver: How to solve.

    Returns:
        Value, scalar, and gradient, (n, d). Both private.
    """
    transport = entropic_transport(generated, real, cost=cost, solver=solver)
    return 2 * transport.value, 2 * transport.first_gradient


@torch.no_grad()
def self_term(
    generated: PointCloud, num_compared: int, *, cost: TransportCost, solver: SinkhornSolver
) -> tuple[Tensor, Tensor]:
    """Return the public half of the semi-debiased loss, - W(Z[:n], Z[k:]), and its gradient with respect to Z.

    Z holds n + k points: n compared with the real ones, and k more that keep the self term from comparing points with
    themselves. k = 0 is the biased loss with W(X, X), k = n compares two independent samples.

    Args:
        generated: Z.
        num_compared: n, at least half of the points.
        cost: What moving costs.
        solver: How to solve.

    Returns:
        Value, scalar, and gradient, (n + k, d). Both public where the generator is.

    Raises:
        ValueError: `num_compared` does not fit.

    References:
        `Cao et al. (2021) <https://arxiv.org/abs/2111.01177>`_, the semi-debiased Sinkhorn loss.
    """
    total = generated.points.shape[0]
    if not total / 2 <= num_compared <= total:
        raise ValueError(f"Expected {total} points to hold n <= {total} <= 2 n, got num_compared={num_compared}.")
    run = _compiled(_self_term, cost, solver) if solver.compiled else _self_term
    return run(generated, num_compared, cost, solver)


def _transport(
    first: PointCloud, second: PointCloud, cost: TransportCost, solver: SinkhornSolver, second_gradient: bool
) -> EntropicTransport:
    costs = cost.matrix(first, second, at_once=solver.compiled)
    log_b = second.log_masses()
    plan = solver.solve(costs, first.log_masses(), log_b)
    backwards = None
    if second_gradient:
        backwards = cost.gradient(second, first, plan.by_columns.T, at_once=solver.compiled)
    return EntropicTransport(
        value=plan.value,
        first_gradient=cost.gradient(first, second, plan.by_rows, at_once=solver.compiled),
        second_gradient=backwards,
        marginal_error=(plan.by_rows.sum(0) - log_b.exp()).abs().sum(),
    )


def _self_term(
    generated: PointCloud, num_compared: int, cost: TransportCost, solver: SinkhornSolver
) -> tuple[Tensor, Tensor]:
    num, at_once = generated.points.shape[0], solver.compiled
    extra = num - num_compared
    first, second = generated[:num_compared], generated[extra:]
    costs = cost.matrix(first, second, at_once=at_once)
    plan = solver.solve(costs, first.log_masses(), second.log_masses())
    if num**2 < 2 * num_compared**2:  # fewer pairs: points that stand on both sides get both sums at once
        weights = F.pad(plan.by_rows, (extra, 0, 0, extra)) + F.pad(plan.by_columns.T, (0, extra, extra, 0))
        return -plan.value, -cost.gradient(generated, generated, weights, at_once=at_once)
    forwards = cost.gradient(first, second, plan.by_rows, at_once=at_once)
    backwards = cost.gradient(second, first, plan.by_columns.T, at_once=at_once)
    return -plan.value, -(F.pad(forwards, (0, 0, 0, extra)) + F.pad(backwards, (0, 0, extra, 0)))


@cache
def _compiled(function: Callable[..., Any], cost: TransportCost, solver: SinkhornSolver) -> Callable[..., Any]:
    """Return a function compiled for fixed shapes, one graph without a tensor over pairs and coordinates."""
    return torch.compile(function, fullgraph=True, dynamic=False, options=_COMPILER_OPTIONS)


class _Problem:
    """One entropic problem and its mirror image in one batch of squares: softmin updates of potentials, in float64.

    Layer 0 has the first points as its rows, layer 1 the second ones; a potential lies beside the columns of the layer
    that it is read in, (g, f), and what a layer returns belongs to its rows, (f, g). The shorter side is padded with
    points of weight zero.
    """

    def __init__(self, cost: Tensor, log_a: Tensor, log_b: Tensor) -> None:
        self.shape = n, m = cost.shape[0], cost.shape[1]
        size = max(n, m)
        self.rates = -torch.stack(
            [F.pad(matrix, (0, size - matrix.shape[1], 0, size - matrix.shape[0])) for matrix in (cost, cost.T)]
        )  # (2, size, size)
        self.log_weights = torch.stack([F.pad(part, (0, size - len(part)), value=-math.inf) for part in (log_b, log_a)])

    def annealed(self, temperatures: list[float]) -> Tensor:
        """Return both potentials after one averaged update at each temperature, (2, size)."""
        potentials = self._updated(torch.zeros_like(self.log_weights), temperatures[0])
        for reg in temperatures:
            potentials = torch.lerp(potentials, self._updated(potentials, reg), 0.5)
        return potentials

    def iterated(self, potentials: Tensor, reg: float, *, tolerance: float, max_iterations: int) -> Tensor:
        """Return both potentials after alternating updates, until the columns' marginals are within the tolerance."""
        (scaled, mirrored), (log_b, log_a), (g, _) = self.rates / reg, self.log_weights, potentials
        b = log_b.exp()
        for iteration in range(max_iterations):
            f = -reg * torch.logsumexp(scaled + (log_b + g / reg), 1)
            old, g = g, -reg * torch.logsumexp(mirrored + (log_a + f / reg), 1)
            if iteration % _ITERATIONS_PER_CHECK == 0:
                sums = torch.exp(log_b + (old - g) / reg)  # column sums of the plan of f and the old g
                if float((sums - b).abs().sum()) < tolerance:
                    break
        f = -reg * torch.logsumexp(scaled + (log_b + g / reg), 1)
        return torch.stack([g, f])

    def plan(self, potentials: Tensor, reg: float) -> "TransportPlan":
        """Return value and both plans after one more update of each potential from the other."""
        scores = self._scores(potentials, reg)
        over = torch.logsumexp(scores, 2)
        of_rows = self.log_weights.flip(0)
        plans = scores.add_((of_rows - over)[:, :, None]).exp_()
        n, m = self.shape
        return TransportPlan(
            value=-reg * (of_rows.exp() * over).sum(), by_rows=plans[0, :n, :m], by_columns=plans[1, :m, :n].T
        )

    def _updated(self, potentials: Tensor, reg: float) -> Tensor:
        """Return the best potentials for each other."""
        return torch.logsumexp(self._scores(potentials, reg), 2).flip(0).mul_(-reg)

    def _scores(self, potentials: Tensor, reg: float) -> Tensor:
        columns = torch.add(self.log_weights, potentials, alpha=1 / reg)
        return torch.add(columns[:, None, :], self.rates, alpha=1 / reg)

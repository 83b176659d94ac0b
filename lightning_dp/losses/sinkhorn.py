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
from typing import Literal

import torch
from torch import Tensor

from lightning_dp.errors import ConfigurationError
from lightning_dp.losses.transport_cost import PointCloud, TransportCost

_ITERATIONS_PER_CHECK = 10
_TOLERANCE, _MAX_ITERATIONS = 1e-4, 1000


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
        compiled: Compile the annealing and the L1 distances for the shapes at hand: a minute at the start, then steps
            of half the time or less, equal up to rounding. A CPU needs a C++ compiler for it.

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
        temperatures = tuple(self.temperatures())
        if self.method == "anneal":
            annealing = _compiled_annealing(temperatures) if self.compiled else _annealing(temperatures)
            return TransportPlan(*annealing(cost, log_a, log_b))
        problem = _Problem(cost, log_a, log_b)
        _, g = problem.annealed(temperatures)
        g = problem.iterated(
            g,
            self.entropic_reg,
            tolerance=_TOLERANCE if self.tolerance is None else self.tolerance,
            max_iterations=_MAX_ITERATIONS if self.max_iterations is None else self.max_iterations,
        )
        return TransportPlan(*problem.plan(problem.rows(g, self.entropic_reg), g, self.entropic_reg))


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
    compiled = solver.compiled
    costs = cost.matrix(first, second, compiled=compiled)
    log_b = second.log_masses()
    plan = solver.solve(costs, first.log_masses(), log_b)
    backwards = cost.gradient(second, first, plan.by_columns.T, compiled=compiled) if second_gradient else None
    return EntropicTransport(
        value=plan.value,
        first_gradient=cost.gradient(first, second, plan.by_rows, compiled=compiled),
        second_gradient=backwards,
        marginal_error=(plan.by_rows.sum(0) - log_b.exp()).abs().sum(),
    )


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
    extra = total - num_compared
    transport = entropic_transport(
        generated[:num_compared], generated[extra:], cost=cost, solver=solver, second_gradient=True
    )
    assert transport.second_gradient is not None
    gradient = torch.zeros_like(generated.points)
    gradient[:num_compared] -= transport.first_gradient
    gradient[extra:] -= transport.second_gradient
    return -transport.value, gradient


class _Problem:
    """One entropic problem: softmin updates of its potentials, in float64."""

    def __init__(self, cost: Tensor, log_a: Tensor, log_b: Tensor) -> None:
        self.cost, self.log_a, self.log_b = cost, log_a, log_b

    def rows(self, g: Tensor, reg: float) -> Tensor:
        """Return the best f for g."""
        return -reg * torch.logsumexp(self._row_scores(self.cost / -reg, g, reg), 1)

    def columns(self, f: Tensor, reg: float) -> Tensor:
        """Return the best g for f."""
        return -reg * torch.logsumexp(self._column_scores(self.cost / -reg, f, reg), 0)

    def annealed(self, temperatures: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """Return both potentials after one averaged update at each temperature."""
        start = temperatures[0]
        f, g = self.rows(torch.zeros_like(self.log_b), start), self.columns(torch.zeros_like(self.log_a), start)
        for reg in temperatures:
            scaled = self.cost / -reg
            over_rows = torch.logsumexp(self._row_scores(scaled, g, reg), 1)
            over_columns = torch.logsumexp(self._column_scores(scaled, f, reg), 0)
            f, g = (f / 2).add_(over_rows, alpha=-reg / 2), (g / 2).add_(over_columns, alpha=-reg / 2)
        return f, g

    def iterated(self, g: Tensor, reg: float, *, tolerance: float, max_iterations: int) -> Tensor:
        """Return g after alternating updates, until the columns' marginals are within the tolerance."""
        scaled, b = self.cost / -reg, self.log_b.exp()
        for iteration in range(max_iterations):
            f = -reg * torch.logsumexp(self._row_scores(scaled, g, reg), 1)
            old, g = g, -reg * torch.logsumexp(self._column_scores(scaled, f, reg), 0)
            if iteration % _ITERATIONS_PER_CHECK == 0:
                sums = torch.exp(self.log_b + (old - g) / reg)  # column sums of the plan of f and the old g
                if float((sums - b).abs().sum()) < tolerance:
                    break
        return g

    def plan(self, f: Tensor, g: Tensor, reg: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return value and both plans after one more update of each potential from the other."""
        scaled = self.cost / -reg
        by_rows, by_columns = self._row_scores(scaled, g, reg), self._column_scores(scaled, f, reg)
        over_rows, over_columns = torch.logsumexp(by_rows, 1), torch.logsumexp(by_columns, 0)
        return (
            -reg * (self.log_a.exp() @ over_rows + self.log_b.exp() @ over_columns),
            by_rows.add_((self.log_a - over_rows)[:, None]).exp_(),
            by_columns.add_((self.log_b - over_columns)[None, :]).exp_(),
        )

    def _row_scores(self, scaled: Tensor, g: Tensor, reg: float) -> Tensor:
        return scaled + torch.add(self.log_b, g, alpha=1 / reg)[None, :]

    def _column_scores(self, scaled: Tensor, f: Tensor, reg: float) -> Tensor:
        return scaled + torch.add(self.log_a, f, alpha=1 / reg)[:, None]


_Annealing = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _annealing(temperatures: tuple[float, ...]) -> _Annealing:
    """Return the published solver: costs and log-weights to value and both plans, in a fixed number of operations."""

    def solve(cost: Tensor, log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        problem = _Problem(cost, log_a, log_b)
        f, g = problem.annealed(temperatures)
        return problem.plan(f, g, temperatures[-1])

    return solve


@cache
def _compiled_annealing(temperatures: tuple[float, ...]) -> _Annealing:
    return torch.compile(_annealing(temperatures), fullgraph=True, dynamic=False)

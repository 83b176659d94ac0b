"""The Gaussian mechanism on rows whose vectors are clipped in L2 norm (Abadi et al. 2016, Algorithm 1)."""

import math
from typing import Literal, final

import torch
from torch import Tensor

from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.base import (
    ContributionSpec,
    EncodeContext,
    Mechanism,
    NoiseLaw,
    ReleasePlan,
    RowScaling,
    zero_non_finite,
)
from lightning_dp.mechanisms.grid import cut_to_grid, step_below

# Clipped norms are kept this much (relative) inside the bound, so that rounding cannot carry a row across it.
ROUNDING_MARGIN = 1e-6


@final
class Gaussian(Mechanism):
    """Clip every vector of a row, sum, add Gaussian noise.

    Guarantee: a row of q vectors has joint norm at most sqrt(q) * max_grad_norm. The sensitivity follows from the
    relation: the bound for a row that appears or disappears, twice the bound for a row that changes.

    Args:
        max_grad_norm: L2 bound of one vector of a row, > 0, in units of the gradient.
        clipping: flat scales vectors above the bound down to it; automatic rescales every vector to (almost) the bound,
            g -> C g / (|g| + stability), and needs no tuning (Bu et al. 2022); per_layer scales each of the L segments
            of a vector down to C / sqrt(L) by itself, so that the joint bound is C as well.
        stability: The positive constant of automatic clipping, in units of the gradient.
        noise: gaussian is drawn in floating point. rounded_gaussian and discrete_gaussian are whole numbers, drawn
            exactly: clipped rows are cut to a grid of about a millionth of the bound and sums are exact, so nothing is
            lost to rounding. The first costs what gaussian costs; the second has no exact curve, which costs 6 to 10 %
            of noise. Rows are formed one by one, which takes longer than their norms.

    Raises:
        ConfigurationError: `max_grad_norm` or `stability` is not a finite positive number.
    """

    kinds = frozenset({"record", "teacher", "joint", "statistic"})

    def __init__(
        self,
        *,
        max_grad_norm: float = 1.0,
        clipping: Literal["flat", "automatic", "per_layer"] = "flat",
        stability: float = 1e-12,
        noise: NoiseLaw = "gaussian",
    ) -> None:
        for name, value in (("max_grad_norm", max_grad_norm), ("stability", stability)):
            if not (math.isfinite(value) and value > 0):
                raise ConfigurationError(f"Expected a finite mechanism.{name} > 0, got {name}={value}.")
        self.max_grad_norm = float(max_grad_norm)
        self.clipping = clipping
        self.stability = float(stability)
        self.noise = noise

    def row_bound(self, spec: ContributionSpec) -> float:
        """Return sqrt(vectors per row) * max_grad_norm."""
        return math.sqrt(spec.vectors_per_row) * self.max_grad_norm

    def row_diameter(self, spec: ContributionSpec) -> float:
        """Return twice the bound; sqrt 2 bounds where vectors in one place never oppose each other.

        Scaling by positive factors keeps the sign of inner products, so |a - b|^2 <= |a|^2 + |b|^2 for what is summed.
        Clipping layer by layer does not. Rows that are cut to a grid may oppose each other by what was cut off.
        """
        bound = self.row_bound(spec)
        if not spec.rows_never_oppose or self.clipping == "per_layer":
            return 2 * bound
        cut = 0.0 if self.noise == "gaussian" else math.sqrt(spec.vectors_per_row * spec.vector_dim)
        return min(2 * bound, math.sqrt(2) * bound + (2 * cut * self.grid_step(spec) if cut else 0.0))

    def grid_step(self, spec: ContributionSpec) -> float:
        """Return the power of two that fits between 2^20 and 2^21 times into the bound of a vector."""
        return step_below(self.max_grad_norm)

    def check(self, spec: ContributionSpec) -> None:
        """Refuse clipping layer by layer where the vectors have no layers."""
        super().check(spec)
        if self.clipping == "per_layer" and spec.segments is None:
            raise ConfigurationError(
                f"mechanism.clipping=per_layer needs vectors with layers, but the {spec.kind} contributions of this "
                "method have none; choose flat or automatic."
            )

    def encode(self, rows: Tensor, spec: ContributionSpec, context: EncodeContext) -> Tensor:
        """Return clipped rows in float64, in whole steps where noise is."""
        rows = zero_non_finite(rows)
        factors: Tensor | float = 1.0
        if self.clipping == "per_layer" and spec.segments is not None:
            # The squares of L bounds C / sqrt(L) add up to C^2 (mechanisms, section (a)).
            share = self.max_grad_norm / math.sqrt(len(spec.segments))
            rows = torch.cat([self._clipped(part, share) for part in rows.split(spec.segments, dim=-1)], dim=-1)
        elif self.noise == "gaussian":
            return self._clipped(rows, self.max_grad_norm)
        else:
            factors = self._factors(_norms(rows), self.max_grad_norm)
        if self.noise == "gaussian":
            return rows
        return cut_to_grid(rows, step=self.grid_step(spec), bound=self.max_grad_norm, factors=factors)

    def _clipped(self, rows: Tensor, max_norm: float) -> Tensor:
        # One copy, scaled in place: with long rows, encoding is the traffic of memory.
        return rows.to(torch.float64, copy=True).mul_(self._factors(_norms(rows), max_norm))

    def _factors(self, norms: Tensor, max_norm: float) -> Tensor:
        bound = max_norm * (1 - ROUNDING_MARGIN)
        if self.clipping == "automatic":
            return bound / (norms + self.stability)
        return bound / norms.clamp(min=bound)

    def row_scaling(self, norms: Tensor, spec: ContributionSpec) -> RowScaling | None:
        """Return the clipping factors, unless layers are clipped by themselves or rows are cut to a grid."""
        if self.clipping == "per_layer" or self.noise != "gaussian":
            return None
        return RowScaling(torch.where(torch.isfinite(norms), self._factors(norms, self.max_grad_norm), 0.0))

    def decode(self, noisy_total: Tensor, plan: ReleasePlan, release_number: int, public_seed: int) -> Tensor:
        """Return the noisy mean over the public number of rows."""
        return noisy_total.to(torch.float32).div_(plan.spec.rows_per_vector)  # no second long vector


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float64)
    return norms

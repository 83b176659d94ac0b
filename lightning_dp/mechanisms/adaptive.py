"""Gaussian mechanism whose clipping norm follows a quantile of the gradient norms (Andrew et al. 2021, Algorithm 1)."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

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
)
from lightning_dp.mechanisms.gaussian import ROUNDING_MARGIN
from lightning_dp.mechanisms.grid import cut_to_grid, step_below

_RANGE = (1e-100, 1e100)  # of C: its inverse, and products with it, have to be numbers


@final
class AdaptiveGaussian(Mechanism):
    """Clip every row to the current norm C, sum, add noise, and move C towards a quantile of the rows' norms.

    A row sends its clipped gradient and, in one more coordinate, whether it was within C: the centred indicator
    1[|g| <= C] - 1/2. Both are scaled so that a row has norm at most 1, whatever C is, and the noise is the same in all
    coordinates:

        (sqrt(1 - s) clip(g) / C,  2 sqrt(s) (1[|g| <= C] - 1/2)),  s = quantile_share.

    Guarantee: one Gaussian release of sensitivity 1 (an absent row, or one with a non-finite entry, sends zeros in
    every coordinate), 2 under replace-one. Seen apart, gradient and indicator have the noise multipliers
    z / sqrt(1 - s) and z / sqrt(s), whose inverse squares add up to z^-2. C is computed from released values only,
    hence free.

    Differs: the share s is given instead of the indicator's noise, which follows: std z / (2 sqrt(s)) in counts. The
    noisy fraction is cut to [0, 1], so that one release cannot throw C far. And the mean of clip(g) / C is handed out
    times `initial_norm` instead of C (post-processing: both are public). Times C, signal and noise of a step grow with
    C, and a learning rate that was right at `initial_norm` is too large by as much: C went from .1 to 2 in the runs
    that showed it, and DP-SGD at epsilon 1 fell to chance. `keep_step_size` false gives Algorithm 1 back.

    Args:
        initial_norm: C of the first release, > 0, in units of the gradient.
        target_quantile: Fraction of the rows that should be within C, in (0, 1).
        adaptation_rate: C is multiplied by exp(-adaptation_rate * (fraction - target_quantile)), > 0.
        quantile_share: Share s of the (squared) budget spent on the indicator, in (0, 1).
        keep_step_size: Hand the mean out in units of C / initial_norm, so that learning rates mean what they do with
            `Gaussian` at max_grad_norm = initial_norm, wherever C goes; false: in units of the gradient.
        noise: As for `Gaussian`; whole numbers are steps of 2^-20 of the clipping norm.

    Raises:
        ConfigurationError: A value is out of range.
    """

    kinds = frozenset({"record"})

    def __init__(
        self,
        *,
        initial_norm: float = 0.1,
        target_quantile: float = 0.5,
        adaptation_rate: float = 0.2,
        quantile_share: float = 0.01,
        keep_step_size: bool = True,
        noise: NoiseLaw = "gaussian",
    ) -> None:
        for name, value in (("initial_norm", initial_norm), ("adaptation_rate", adaptation_rate)):
            if not (math.isfinite(value) and value > 0):
                raise ConfigurationError(f"Expected a finite mechanism.{name} > 0, got {name}={value}.")
        if not _RANGE[0] <= initial_norm <= _RANGE[1]:
            raise ConfigurationError(f"Expected mechanism.initial_norm between 1e-100 and 1e100, got {initial_norm=}.")
        if adaptation_rate > 100:
            raise ConfigurationError(f"Expected mechanism.adaptation_rate <= 100, got {adaptation_rate=}.")
        for name, value in (("target_quantile", target_quantile), ("quantile_share", quantile_share)):
            if not 0 < value < 1:
                raise ConfigurationError(f"Expected 0 < mechanism.{name} < 1, got {name}={value}.")
        self.initial_norm = float(initial_norm)
        self.target_quantile = float(target_quantile)
        self.adaptation_rate = float(adaptation_rate)
        self.quantile_share = float(quantile_share)
        self.keep_step_size = keep_step_size
        self.noise = noise
        self._norm = self._released_norm = self.initial_norm

    @property
    def max_grad_norm(self) -> float:
        """C of the next release; computed from released values."""
        return self._norm

    @property
    def _gradient_scale(self) -> float:
        return math.sqrt(1 - self.quantile_share)

    @property
    def _indicator_scale(self) -> float:
        # The centred indicator is +-1/2.
        return 2 * math.sqrt(self.quantile_share)

    def check(self, spec: ContributionSpec) -> None:
        """Refuse rows of several vectors, whose indicators would add up beyond the bound."""
        super().check(spec)
        if spec.vectors_per_row != 1:
            raise ConfigurationError(
                f"--mechanism AdaptiveGaussian takes rows of one vector, got {spec.vectors_per_row}; use Gaussian."
            )

    def row_bound(self, spec: ContributionSpec) -> float:
        """Return 1: rows are sent in units of the clipping norm."""
        return 1.0

    def grid_step(self, spec: ContributionSpec) -> float:
        """Return 2^-20: rows are sent in units of the clipping norm."""
        return step_below(1.0)

    def encoded_dim(self, spec: ContributionSpec) -> int:
        """Return the length of a gradient, and one for the indicator."""
        return spec.vector_dim + 1

    def encode(self, rows: Tensor, spec: ContributionSpec, context: EncodeContext) -> Tensor:
        """Return clipped rows in units of C, and their centred indicators, in float64."""
        rows = rows.to(torch.float64)
        norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        factors, indicators = self._factors_and_indicators(norms)
        # Selected, not multiplied: 0 * NaN is NaN.
        encoded = torch.where(torch.isfinite(norms), torch.cat([rows * factors, indicators], dim=-1), 0.0)
        return encoded if self.noise == "gaussian" else cut_to_grid(encoded, step=self.grid_step(spec), bound=1.0)

    def row_scaling(self, norms: Tensor, spec: ContributionSpec) -> RowScaling | None:
        """Return the clipping factors and the centred indicators; None where rows are cut to a grid."""
        if self.noise != "gaussian":
            return None
        factors, indicators = self._factors_and_indicators(norms)
        return RowScaling(factors, indicators.unsqueeze(1))

    def _factors_and_indicators(self, norms: Tensor) -> tuple[Tensor, Tensor]:
        """Return what scales each vector and what follows it, of the shape of the norms; zeros where one is no number.

        Args:
            norms: Any shape, float64.
        """
        takes_part = torch.isfinite(norms)
        norms = torch.where(takes_part, norms, 0.0)
        within = (norms <= self._norm).to(torch.float64) - 0.5
        factors = self._gradient_scale * (1 - ROUNDING_MARGIN) / norms.clamp(min=self._norm)
        indicators = self._indicator_scale * (1 - ROUNDING_MARGIN) * within
        return torch.where(takes_part, factors, 0.0), torch.where(takes_part, indicators, 0.0)

    def decode(self, noisy: Tensor, plan: ReleasePlan, release_number: int, public_seed: int) -> Tensor:
        """Return the noisy mean of the clipped gradients: times initial_norm / C, or in units of the gradient."""
        unit = self.initial_norm if self.keep_step_size else self._norm
        return noisy[..., :-1] * (unit / self._gradient_scale / plan.spec.rows_per_vector)

    def adapt(self, noisy: Tensor, plan: ReleasePlan) -> None:
        """Move C towards the target quantile."""
        count = float(noisy[..., -1].sum()) / self._indicator_scale
        fraction = min(max(count / plan.spec.rows_per_vector + 0.5, 0.0), 1.0)
        factor = math.exp(-self.adaptation_rate * (fraction - self.target_quantile))
        self._released_norm = self._norm
        self._norm = min(max(self._norm * factor, _RANGE[0]), _RANGE[1])

    @contextmanager
    def as_released(self) -> Iterator[None]:
        """Go back to C of the release made last."""
        coming, self._norm = self._norm, self._released_norm
        try:
            yield
        finally:
            self._norm = coming

    def forget(self) -> None:
        """Begin at `initial_norm`."""
        self._norm = self._released_norm = self.initial_norm

    def state_dict(self) -> dict[str, float]:
        """Return C of the next release."""
        return {"max_grad_norm": self._norm}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore C.

        Raises:
            ConfigurationError: The state is of another mechanism, or holds no norm that a run can have reached.
        """
        if set(state) != {"max_grad_norm"}:
            raise ConfigurationError(
                f"Expected the clipping norm of AdaptiveGaussian in the checkpoint, got {sorted(state)}. "
                "Resume with the mechanism of the run."
            )
        norm = state["max_grad_norm"]
        # Not one that a run can reach, so not of one: at 0, below it or at NaN, rows without a gradient send NaN.
        if isinstance(norm, bool) or not isinstance(norm, int | float) or not _RANGE[0] <= norm <= _RANGE[1]:
            raise ConfigurationError(
                f"Expected a clipping norm between 1e-100 and 1e100 in the checkpoint, got max_grad_norm={norm!r}: it "
                "was changed after it was saved. Put a whole copy back, or start a new run."
            )
        self._norm = self._released_norm = float(norm)

    def describe(self) -> dict[str, Any]:
        """Return the options and the norm that was reached."""
        return {**super().describe(), "max_grad_norm": self._norm}

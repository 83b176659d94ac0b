"""No mechanism at all: the plain mean, for ceilings and debugging."""

import math
from typing import final

import torch
from torch import Tensor

from lightning_dp.mechanisms.base import (
    ContributionSpec,
    EncodeContext,
    Mechanism,
    ReleasePlan,
    RowScaling,
    zero_non_finite,
)


@final
class NoPrivacy(Mechanism):
    """Release the plain mean of the rows.

    Guarantee: none. Its event is non-private, so epsilon is infinite and the claim is NONPRIVATE.
    """

    kinds = frozenset({"record", "teacher", "joint", "statistic"})
    is_private = False

    def row_bound(self, spec: ContributionSpec) -> float:
        """Return infinity: nothing is bounded."""
        return math.inf

    def encode(self, rows: Tensor, spec: ContributionSpec, context: EncodeContext) -> Tensor:
        """Return the rows themselves in float64."""
        return zero_non_finite(rows.to(torch.float64))

    def row_scaling(self, norms: Tensor, spec: ContributionSpec) -> RowScaling:
        """Return ones."""
        return RowScaling(torch.isfinite(norms).to(torch.float64))

    def decode(self, noisy_total: Tensor, plan: ReleasePlan, release_number: int, public_seed: int) -> Tensor:
        """Return the mean over the public number of rows."""
        return noisy_total / plan.spec.rows_per_vector

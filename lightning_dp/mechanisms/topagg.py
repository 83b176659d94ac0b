"""TopAgg: top-k sign votes of the rows, noisy sum, threshold (DataLens, Wang et al. 2021, CCS, Algorithm 2)."""

import math
from functools import lru_cache
from typing import Literal, final

import torch
from torch import Tensor

from lightning_dp.accounting.events import ReleaseEvent, RoundedTernaryRelease, TernaryRelease
from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.base import (
    ContributionSpec,
    EncodeContext,
    Mechanism,
    NoiseLaw,
    ReleasePlan,
    zero_non_finite,
)
from lightning_dp.mechanisms.keyed import keyed_uniform


@final
class TopAgg(Mechanism):
    """Each row votes -1, 0 or +1 on its k largest coordinates; the integer votes are summed and noised.

    Guarantee: an encoded vector has at most k non-zero entries, each +-1, so a row of q vectors has norm at most
    sqrt(k q). A row that changes arbitrarily moves the sum by 2 sqrt(k q). Noise covers every coordinate, since the
    chosen support is private too; the threshold, the scale and the rotation back are post-processing.

    Differs: a vector without any non-zero finite entry abstains (the original divides by zero and votes +1 on k
    arbitrary coordinates), and sign(0) never votes.

    Args:
        top_k: Number of coordinates voted on per vector; None takes a quarter of them (the paper's share on MNIST).
        votes: sign is deterministic; stochastic votes +1 with probability 1/2 + v / 2b, b the row's largest entry,
            so that the expected vote is the clipped, scaled value (paper, Section 4.2).
        max_value: Cap c on b of stochastic votes; entries beyond it vote deterministically. None means no cap.
        rotate: Vote in a public random orthonormal basis, fresh in each release, and rotate the noisy sum back. Signs
            along random directions see how coordinates go together; signs along fixed axes see one at a time.
        output: ternary gives +-1 where the noisy votes pass the threshold; votes gives the noisy votes themselves,
            divided by the public number of rows.
        threshold: beta, as a fraction of the public number of rows, in [0, 1).
        charge: gaussian charges the noisy vote vector; ternary charges only the thresholded one, which costs less
            (its Renyi curve is computed exactly) and needs output ternary.
        noise: rounded_gaussian and discrete_gaussian are whole numbers, as votes are, and drawn exactly, so that
            nothing is lost to rounding. The first costs what gaussian costs, which is drawn in floating point; the
            second has no exact curve, which costs 6 to 10 % of noise, and none for charge ternary.

    Raises:
        ConfigurationError: An option is out of range or would be ignored.
    """

    kinds = frozenset({"teacher", "record"})
    total_dtype = torch.int32

    def __init__(
        self,
        *,
        top_k: int | None = None,
        votes: Literal["sign", "stochastic"] = "sign",
        max_value: float | None = None,
        rotate: bool = False,
        output: Literal["ternary", "votes"] = "ternary",
        threshold: float = 0.0,
        charge: Literal["gaussian", "ternary"] = "gaussian",
        noise: NoiseLaw = "rounded_gaussian",
    ) -> None:
        if top_k is not None and top_k < 1:
            raise ConfigurationError(f"Expected mechanism.top_k >= 1 (or null), got top_k={top_k}.")
        if max_value is not None and not (math.isfinite(max_value) and max_value > 0):
            raise ConfigurationError(f"Expected a finite mechanism.max_value > 0 (or null), got max_value={max_value}.")
        if max_value is not None and votes == "sign":
            raise ConfigurationError(
                f"mechanism.max_value={max_value} has no effect on deterministic signs; "
                "set mechanism.votes to stochastic or leave max_value out."
            )
        if not 0 <= threshold < 1:
            raise ConfigurationError(f"Expected 0 <= mechanism.threshold < 1, got threshold={threshold}.")
        if threshold > 0 and output == "votes":
            raise ConfigurationError(
                f"mechanism.threshold={threshold} has no effect on output votes; set mechanism.output to ternary."
            )
        if charge == "ternary" and output != "ternary":
            raise ConfigurationError(
                "mechanism.charge=ternary pays for the thresholded vector only, but mechanism.output=votes releases "
                "the noisy votes; set mechanism.output to ternary or mechanism.charge to gaussian."
            )
        if charge == "ternary" and noise == "discrete_gaussian":
            raise ConfigurationError(
                "mechanism.charge=ternary has no curve for mechanism.noise=discrete_gaussian; use rounded_gaussian, "
                "which is as exact."
            )
        self.top_k = top_k
        self.votes = votes
        self.max_value = max_value
        self.rotate = rotate
        self.output = output
        self.threshold = float(threshold)
        self.charge = charge
        self.noise = noise

    def public_basis(self, spec: ContributionSpec, *, release_number: int, public_seed: int) -> Tensor | None:
        """Return the random basis in which rows of this release vote, or None for their own."""
        return public_rotation(spec.vector_dim, public_seed, release_number) if self.rotate else None

    def num_votes(self, spec: ContributionSpec) -> int:
        """Return k: how many coordinates of one vector a row votes on."""
        return self.top_k if self.top_k is not None else max(1, round(spec.vector_dim / 4))

    def check(self, spec: ContributionSpec) -> None:
        """Refuse a k beyond the vector, and a ternary charge without a public bound on the votes."""
        super().check(spec)
        if self.num_votes(spec) > spec.vector_dim:
            raise ConfigurationError(
                f"Expected mechanism.top_k <= {spec.vector_dim}, the length of a vector, got top_k={self.top_k}."
            )
        if self.charge == "ternary" and spec.max_rows_per_vector is None:
            raise ConfigurationError("mechanism.charge=ternary needs a public number of rows; use charge gaussian.")

    def row_bound(self, spec: ContributionSpec) -> float:
        """Return sqrt(k * vectors per row)."""
        return math.sqrt(self.num_votes(spec) * spec.vectors_per_row)

    def grid_step(self, spec: ContributionSpec) -> float:
        """Return 1, a vote."""
        return 1.0

    def encode(self, rows: Tensor, spec: ContributionSpec, context: EncodeContext) -> Tensor:
        """Return votes, int8, (num_rows, num_vectors, vector_dim), with at most k non-zero entries per vector."""
        rows = zero_non_finite(rows)
        k = self.num_votes(spec)
        if self.votes == "stochastic":
            signs = self._stochastic_signs(rows, context)
        else:
            signs = torch.sign(rows).to(torch.int8)
        if k == rows.shape[-1]:
            return signs
        chosen = torch.topk(rows.abs(), k, dim=-1, sorted=False).indices
        return torch.zeros_like(signs).scatter_(-1, chosen, signs.gather(-1, chosen))

    def _stochastic_signs(self, rows: Tensor, context: EncodeContext) -> Tensor:
        scale = rows.abs().amax(dim=-1, keepdim=True)
        abstains = scale == 0
        if self.max_value is not None:
            scale = scale.clamp(max=self.max_value)
        up = (0.5 + rows / (2 * scale.masked_fill(abstains, 1.0))).clamp(0, 1)
        seed = context.noise.coin_seed(release_number=context.release_number, block=0)
        coins = keyed_uniform(rows.shape, seed=seed, row_ids=context.row_ids, first_vector=context.first_vector)
        signs = torch.where(coins < up, 1, -1).to(torch.int8)
        return signs.masked_fill(abstains, 0)

    def decode(self, noisy_total: Tensor, plan: ReleasePlan, release_number: int, public_seed: int) -> Tensor:
        """Threshold or rescale the noisy votes and rotate them back."""
        num_rows = plan.spec.rows_per_vector
        if self.output == "ternary":
            level = self.threshold * num_rows
            released = (noisy_total > level).to(noisy_total) - (noisy_total < -level).to(noisy_total)
        else:
            released = noisy_total / num_rows
        if self.rotate:
            basis = public_rotation(released.shape[-1], public_seed, release_number)
            released = released @ basis.to(released).T
        return released

    def step_event(self, plan: ReleasePlan) -> ReleaseEvent:
        """Return the event of the noisy votes, or the event of the thresholded vector alone."""
        if self.charge == "gaussian":
            return super().step_event(plan)
        votes = self.num_votes(plan.spec) * plan.spec.vectors_per_row
        changes: list[tuple[int, int]] = []
        for change in plan.spec.alternatives(plan.relation):
            replaced, toggled = change.num_replaced * votes, change.num_toggled * votes
            # Same support with all signs flipped, or disjoint supports; mixtures lie in between (linear).
            changes += [(replaced, toggled), (0, 2 * replaced + toggled)]
        # Checked in `check`: charge ternary needs a public number of rows.
        max_votes = plan.spec.max_rows_per_vector or 0
        threshold, event = self.threshold * plan.spec.rows_per_vector, TernaryRelease
        if self.noise == "rounded_gaussian":
            # round(x) > t, that is round(x) >= floor(t) + 1, where x is beyond floor(t) + 1/2
            threshold, event = math.floor(threshold) + 0.5, RoundedTernaryRelease
        return event(
            noise_std=self.noise_std(plan),
            l2_sensitivity=self.l2_sensitivity(plan.spec, plan.relation),
            threshold=threshold,
            max_abs_vote=max_votes,
            changes=tuple(dict.fromkeys(changes)),
        )


@lru_cache(maxsize=2)  # the same basis serves every chunk of a release
def public_rotation(dim: int, public_seed: int, release_number: int) -> Tensor:
    """Return a random orthonormal basis, (dim, dim), float64, a function of public numbers only.

    Args:
        dim: Length of a vector.
        public_seed: Seed of public randomness.
        release_number: Each release has a basis of its own.
    """
    generator = torch.Generator().manual_seed((public_seed * 1_000_003 + release_number) % (2**63))
    gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q

"""GNMax: rows vote for bins of random projections; noisy winners are projected back (G-PATE, Long et al. 2021)."""

import math
from functools import lru_cache
from typing import final

import numpy as np
import torch
from torch import Tensor

from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.base import (
    ContributionSpec,
    EncodeContext,
    Mechanism,
    NoiseLaw,
    ReleasePlan,
    zero_non_finite,
)

# Projections are summed in whole numbers, exactly. The order of a floating-point sum depends on the number of rows, and
# a vote that its last bit tips into another bin would let one record move the votes of others.
_NORMAL_BITS = 15  # normal entries are multiples of 2^-15, and at most 2^3
_ROW_RANGE_BITS = 9  # entries of rows count up to 2^9 max_value
_EXACT_BITS = 53  # whole numbers below 2^53 are exact in float64


@final
class GNMax(Mechanism):
    """Each row votes, per random projection of a vector, for one of a few bins; the noisy winner is answered.

    A coordinate is answered only if its largest count, with noise of its own, reaches a share of the rows (the
    confident noisy maximum of Papernot et al. 2018); then the answer is the centre of the bin with the largest noisy
    count, otherwise 0. The answers are projected back with the transpose.

    Guarantee: what is perturbed is the pair (counts, largest count of each histogram divided by r), all with Gaussian
    noise of one std s, so the largest counts meet noise r s; everything after that is post-processing. Let a row send q
    vectors of m coordinates. One that changes moves each histogram by at most sqrt(2) and its maximum by at most 1: L2
    sensitivity sqrt(q m (2 + 1/r^2)). One that appears moves them by 1 and 1: sqrt(q m (1 + 1/r^2)). The whole noisy
    histogram is paid for, whatever its winner was, so the price depends on no data.

    The paper's noise levels (s1 for the largest count, s2 for the counts) are threshold_noise_ratio = s1 / s2 and
    privacy.noise_multiplier = s2 / sqrt(q m (2 + (s2 / s1)^2)); the test then takes the share 1 / (1 + 2 r^2) of the
    budget (in mu^2).

    Differs: the published accountant uses the raw counts, so its epsilon is private itself; ours does not, and does not
    refund unanswered coordinates (that would need a filter fixed beforehand). A vector without any non-zero finite
    entry abstains. Projections are drawn from public numbers, fresh for every vector and release.

    Args:
        num_projections: m, random projections of one vector, >= 1.
        num_bins: Bins on [-max_value, max_value], >= 2, equally wide.
        max_value: Largest projected value told apart, > 0, in units of the rows; others fall into the outer bins.
        threshold: Share of the public number of rows that the largest count must reach, in [0, 1].
        threshold_noise_ratio: r, std of the noise on the largest count over that on the counts, > 0. Null tests the
            noisy counts themselves, which costs nothing more (their largest is biased upwards, by 1.54 std of ten).
        noise: As for `TopAgg`; whole numbers are steps of 1 / r, so r has to be whole, or noise gaussian.

    Raises:
        ConfigurationError: An option is out of range.

    References:
        Long et al. (2021) "G-PATE", Algorithm 2; Papernot et al. (2018) "Scalable private learning with PATE".
    """

    kinds = frozenset({"teacher"})
    total_dtype = torch.int32

    def __init__(
        self,
        *,
        num_projections: int = 10,
        num_bins: int = 10,
        max_value: float = 1e-4,
        threshold: float = 0.5,
        threshold_noise_ratio: float | None = 3.0,
        noise: NoiseLaw = "rounded_gaussian",
    ) -> None:
        for name, count, least in (("num_projections", num_projections, 1), ("num_bins", num_bins, 2)):
            if count < least:
                raise ConfigurationError(f"Expected mechanism.{name} >= {least}, got {name}={count}.")
        if not (math.isfinite(max_value) and max_value > 0):
            raise ConfigurationError(f"Expected a finite mechanism.max_value > 0, got max_value={max_value}.")
        if not 0 <= threshold <= 1:
            raise ConfigurationError(f"Expected 0 <= mechanism.threshold <= 1, got threshold={threshold}.")
        ratio = threshold_noise_ratio
        if ratio is not None and not (math.isfinite(ratio) and ratio > 0):
            raise ConfigurationError(
                f"Expected a finite mechanism.threshold_noise_ratio > 0 (or null), got threshold_noise_ratio={ratio}."
            )
        if noise != "gaussian" and ratio is not None and not float(ratio).is_integer():
            raise ConfigurationError(
                f"mechanism.noise={noise} needs a whole mechanism.threshold_noise_ratio (or null), got "
                f"threshold_noise_ratio={ratio}. Round it, or set mechanism.noise to gaussian."
            )
        self.noise = noise
        self.num_projections = num_projections
        self.num_bins = num_bins
        self.max_value = float(max_value)
        self.threshold = float(threshold)
        self.threshold_noise_ratio = None if ratio is None else float(ratio)

    @property
    def _squared_test_share(self) -> float:
        """1 / r^2: how far a largest count moves, squared, in the units of the counts; 0 where it is not measured."""
        return 0.0 if self.threshold_noise_ratio is None else self.threshold_noise_ratio**-2

    def row_bound(self, spec: ContributionSpec) -> float:
        """Return sqrt(q m (1 + 1/r^2)): a row that appears adds one to one bin of each histogram."""
        return math.sqrt(spec.vectors_per_row * self.num_projections * (1 + self._squared_test_share))

    def row_diameter(self, spec: ContributionSpec) -> float:
        """Return sqrt(q m (2 + 1/r^2)): a changed vote leaves one bin and enters another; a maximum moves by 1."""
        return math.sqrt(spec.vectors_per_row * self.num_projections * (2 + self._squared_test_share))

    def grid_step(self, spec: ContributionSpec) -> float:
        """Return 1 / r, of which counts and largest counts divided by r are whole multiples; 1 without a test."""
        return 1.0 if self.threshold_noise_ratio is None else 1 / self.threshold_noise_ratio

    def encoded_dim(self, spec: ContributionSpec) -> int:
        """Return the bins of all projections of one vector."""
        return self.num_projections * self.num_bins

    def encode(self, rows: Tensor, spec: ContributionSpec, context: EncodeContext) -> Tensor:
        """Return one vote per projection, int8, (num_rows, num_vectors, num_projections * num_bins)."""
        rows = zero_non_finite(rows).to(torch.float64)
        num_vectors, dim = rows.shape[1:]
        normals = public_normals(
            dim,
            self.num_projections,
            public_seed=context.public_seed,
            release_number=context.release_number,
            vectors=range(context.first_vector, context.first_vector + num_vectors),
        ).to(rows.device)
        row_bits = _row_bits(dim)
        limit = 2.0 ** (_ROW_RANGE_BITS + row_bits)
        whole = (rows / self.max_value * 2.0**row_bits).clamp(-limit, limit).round()
        values = torch.einsum("nqd,qdm->nqm", whole, normals)  # exact, in units of
        unit = 2.0 ** -(row_bits + _NORMAL_BITS) / math.sqrt(self.num_projections)  # this times max_value
        bins = ((values * unit + 1) * (self.num_bins / 2)).floor().clamp(0, self.num_bins - 1)
        votes = torch.zeros(*values.shape, self.num_bins, dtype=torch.int8, device=rows.device)
        speaks = (rows != 0).any(dim=-1)[:, :, None, None].expand(*values.shape, 1)
        return votes.scatter_(-1, bins[..., None].long(), speaks.to(torch.int8)).flatten(2)

    def measure(self, total: Tensor, spec: ContributionSpec) -> Tensor:
        """Return counts and, behind them, the largest count of each histogram divided by r."""
        if self.threshold_noise_ratio is None:
            return total
        return torch.cat([total, self._histograms(total).amax(dim=-1) / self.threshold_noise_ratio], dim=-1)

    def decode(self, noisy: Tensor, plan: ReleasePlan, release_number: int, public_seed: int) -> Tensor:
        """Return the answered bin centres, projected back."""
        counts = self._histograms(noisy[..., : self.num_projections * self.num_bins])  # (Q, m, bins)
        if self.threshold_noise_ratio is None:
            largest = counts.amax(dim=-1)
        else:
            largest = noisy[..., self.num_projections * self.num_bins :] * self.threshold_noise_ratio
        answers = self.bin_centres().to(counts)[counts.argmax(dim=-1)]
        answers = torch.where(largest >= self.threshold * plan.spec.rows_per_vector, answers, 0.0)  # (Q, m)
        basis = public_projections(
            plan.spec.vector_dim,
            self.num_projections,
            public_seed=public_seed,
            release_number=release_number,
            vectors=range(len(noisy)),
        ).to(answers)
        return torch.einsum("qm,qdm->qd", answers, basis)

    def bin_centres(self) -> Tensor:
        """Return the centres of the bins, float64, (num_bins,)."""
        steps = 2 * torch.arange(self.num_bins, dtype=torch.float64) + 1 - self.num_bins
        return steps * (self.max_value / self.num_bins)

    def _histograms(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (self.num_projections, self.num_bins))


def public_projections(
    dim: int, num_projections: int, *, public_seed: int, release_number: int, vectors: range
) -> Tensor:
    """Return random projections, one matrix P per vector, a function of public numbers only; E[P P^T] = I.

    Args:
        dim: Length of a vector.
        num_projections: m, columns of each matrix.
        public_seed: Seed of public randomness.
        release_number: Number of the release.
        vectors: Which vectors of the release.

    Returns:
        Independent normal entries of variance 1 / m, float64, (num_vectors, dim, m).
    """
    normals = public_normals(
        dim, num_projections, public_seed=public_seed, release_number=release_number, vectors=vectors
    )
    return normals * (2.0**-_NORMAL_BITS / math.sqrt(num_projections))


@lru_cache(maxsize=32)  # the same projections serve every chunk of a release
def public_normals(dim: int, num_projections: int, *, public_seed: int, release_number: int, vectors: range) -> Tensor:
    """Return the entries of `public_projections` times sqrt(m), as whole multiples of 2^-15 (that many units).

    Args:
        dim: Length of a vector.
        num_projections: m.
        public_seed: Seed of public randomness.
        release_number: Each release has projections of its own.
        vectors: Places of the vectors in the release; each has projections of its own.

    Returns:
        (len(vectors), dim, m), float64.
    """
    drawn = np.empty((len(vectors), dim, num_projections))
    for place, vector in enumerate(vectors):
        stream = np.random.default_rng((public_seed % 2**63, release_number, vector))
        drawn[place] = stream.standard_normal((dim, num_projections))
    return torch.from_numpy(np.rint(drawn.clip(-8, 8) * 2**_NORMAL_BITS))


def _row_bits(dim: int) -> int:
    """Return how finely entries of rows are rounded (to max_value * 2^-bits): sums of `dim` products stay exact."""
    return _EXACT_BITS - _ROW_RANGE_BITS - (_NORMAL_BITS + 3) - math.ceil(math.log2(dim)) - 1

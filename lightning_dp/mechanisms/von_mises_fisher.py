"""Directional noise: a von Mises-Fisher direction around the summed rows, or around each row (Faustini et al. 2022)."""

import math
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from lightning_dp.accounting.bessel import mean_resultant_length
from lightning_dp.accounting.events import ReleaseEvent, VonMisesFisherRelease, ZCDPRelease
from lightning_dp.errors import ConfigurationError, PrivacyProtocolError
from lightning_dp.mechanisms.base import ContributionSpec, EncodeContext, Mechanism, ReleasePlan, zero_non_finite
from lightning_dp.mechanisms.noise import NoiseSource
from lightning_dp.mechanisms.sphere import sample_directions

# Clipped norms are kept this much (relative) inside the bound, so that rounding cannot carry a row across it.
_ROUNDING_MARGIN = 1e-6


@final
class VonMisesFisher(Mechanism):
    """Release directions y with density proportional to exp(lambda <s, y>) on the unit sphere.

    central: s is the sum of the clipped vectors of all rows, the whole release flattened into one vector of D numbers,
    and one direction is drawn. The length of s is not released: it only makes the direction surer, so the rows of a
    batch help each other as under Gaussian noise.

    per_unit: every vector of every row is replaced by its own direction (s the clipped vector, D its length) before
    anything is summed. The guarantee then holds against whoever does the sum; the noise is that of one row times the
    root of their number. Only for replace-one and the like: an absent row would send no direction, which is seen.

    Guarantee: neighbours' natural parameters lie lambda * sensitivity apart, so a release is rho-zCDP with
    rho = lambda^2 sensitivity^2 / (2 D) (derived in `lightning_dp.accounting.von_mises_fisher`). With

        lambda = sqrt(D) / (noise_multiplier * l2_sensitivity),

    rho = 1 / (2 noise_multiplier^2), as for Gaussian noise of the same multiplier, and a decoded direction is about as
    long as that noise. The Gaussian's exact curve is not valid here, so the same (epsilon, delta) takes 6 % (at epsilon
    10) to 10 % (at 0.2) more noise. Poisson sampling is allowed and earns nothing: no gain has been proved for it here.

    Differs: the published mechanism normalises each gradient (clipping unit, form per_unit) and reports its
    concentration as epsilon, which is metric privacy; see `other_statements`. A direction around the normalised mean of
    a batch is not offered: its mean may turn around when one record changes.

    Args:
        max_grad_norm: L2 bound of one vector of a row, > 0, in units of the gradient.
        clipping: flat scales vectors above the bound down to it; unit scales every vector to the bound.
        form: central or per_unit.
        charge: zcdp charges rho; renyi the exact Renyi curve (per_unit) or a bound below a * rho (central). They differ
            where D is small, or lambda above D.

    Raises:
        ConfigurationError: `max_grad_norm` is not a finite positive number.

    References:
        Faustini et al. (2022) "Directional privacy for deep learning"; Weggenmann and Kerschbaum (2021).
    """

    kinds = frozenset({"record", "teacher", "joint"})

    def __init__(
        self,
        *,
        max_grad_norm: float = 1.0,
        clipping: Literal["flat", "unit"] = "flat",
        form: Literal["central", "per_unit"] = "central",
        charge: Literal["zcdp", "renyi"] = "zcdp",
    ) -> None:
        if not (math.isfinite(max_grad_norm) and max_grad_norm > 0):
            raise ConfigurationError(f"Expected a finite mechanism.max_grad_norm > 0, got {max_grad_norm=}.")
        self.max_grad_norm = float(max_grad_norm)
        self.clipping = clipping
        self.form = form
        self.charge = charge

    def check(self, spec: ContributionSpec) -> None:
        """Refuse one-dimensional spheres, and the local form for rows whose presence depends on the records."""
        super().check(spec)
        if self._sphere_dim(spec) < 2:
            raise ConfigurationError(
                f"--mechanism VonMisesFisher needs at least two numbers to give a direction to, got "
                f"{self._sphere_dim(spec)}; use Gaussian."
            )
        if self.form == "per_unit" and (spec.kind == "joint" or not spec.has_fixed_rows):
            raise ConfigurationError(
                f"mechanism.form=per_unit has no proof for these {spec.kind} contributions: the records decide how "
                "many rows there are, and every row would be seen; use form central."
            )

    def row_bound(self, spec: ContributionSpec) -> float:
        """Return sqrt(vectors per row) * max_grad_norm."""
        return math.sqrt(spec.vectors_per_row) * self.max_grad_norm

    def concentration(self, plan: ReleasePlan) -> float:
        """Return lambda, per unit of the gradient; public."""
        return math.sqrt(self._sphere_dim(plan.spec)) / self.noise_std(plan)

    def encode(self, rows: Tensor, spec: ContributionSpec, context: EncodeContext) -> Tensor:
        """Return clipped rows in float64."""
        rows = zero_non_finite(rows.to(torch.float64))
        norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        bound = self.max_grad_norm * (1 - _ROUNDING_MARGIN)
        if self.clipping == "flat":
            return rows * (bound / norms.clamp(min=bound))
        return torch.where(norms > 0, rows * (bound / norms), 0.0)

    def perturb_rows(self, encoded: Tensor, plan: ReleasePlan, context: EncodeContext) -> Tensor:
        """Return one direction for each vector, drawn by its row alone; only where the form is per_unit."""
        if self.form == "central":
            return encoded
        natural = self.concentration(plan) * encoded.cpu().numpy()
        ids = context.row_ids.tolist()
        if len(set(ids)) != len(natural):
            raise PrivacyProtocolError(
                f"Expected {len(natural)} different row ids, got {len(set(ids))}: rows of one id would share noise. "
                "Give every row of a release an id of its own."
            )
        drawn = np.empty_like(natural)
        for place, row_id in enumerate(ids):
            leaf = f"row:{row_id}:{context.first_vector}"
            stream = context.noise.borrowed(release_number=context.release_number, leaf=leaf)
            drawn[place] = sample_directions(natural[place], stream)
        return torch.from_numpy(drawn).to(encoded.device)

    def perturb(self, measured: Tensor, plan: ReleasePlan, noise: NoiseSource, *, release_number: int) -> Tensor:
        """Return one direction, of the shape of the release; the sum as it is where each row has drawn its own."""
        if self.form == "per_unit":
            return measured
        if measured.numel() != self._sphere_dim(plan.spec):
            raise PrivacyProtocolError(
                f"Expected a release of {self._sphere_dim(plan.spec)} numbers, got {measured.numel()}: the "
                "concentration was planned for another dimension. Make ContributionSpec.num_vectors and the released "
                "shape agree."
            )
        natural = self.concentration(plan) * measured.cpu().numpy().reshape(1, -1)
        drawn = sample_directions(natural, noise.borrowed(release_number=release_number, leaf="noise"))
        return torch.from_numpy(drawn).reshape(measured.shape).to(measured.device)

    def mean(self, measured: Tensor, plan: ReleasePlan) -> Tensor:
        """Return the mean of the direction; for per_unit that of rows on the bound, scaled."""
        if self.form == "per_unit":
            return measured * (self._mean_length(plan) / self.max_grad_norm)
        norm = float(measured.norm())
        if norm == 0:
            return measured
        length = mean_resultant_length(self._sphere_dim(plan.spec), self.concentration(plan) * norm)
        return measured * (float(length) / norm)

    def decode(self, noisy: Tensor, plan: ReleasePlan, release_number: int, public_seed: int) -> Tensor:
        """Return the direction in units of the gradient: unbiased for short sums, or for rows on the bound."""
        if self.form == "central":
            # E[y] = lambda s / D, to first order in |s|
            scale = self._sphere_dim(plan.spec) / self.concentration(plan)
        else:
            scale = self.max_grad_norm / self._mean_length(plan)
        return noisy * (scale / plan.spec.rows_per_vector)

    def step_event(self, plan: ReleasePlan) -> ReleaseEvent:
        """Return the zCDP event, or the one with the Renyi curve."""
        changes = plan.spec.alternatives(plan.relation)
        if self.form == "per_unit" and any(change.num_toggled for change in changes):
            raise ConfigurationError(
                "mechanism.form=per_unit has no proof where a row can appear or disappear, because its direction would "
                "be seen; use privacy.neighboring_relation=replace_one, or form central."
            )
        if self.charge == "zcdp":
            return ZCDPRelease(rho=1 / (2 * plan.noise_multiplier * plan.noise_multiplier))
        concentration, dim = self.concentration(plan), self._sphere_dim(plan.spec)
        if self.form == "central":
            return VonMisesFisherRelease(
                distance=concentration * self.l2_sensitivity(plan.spec, plan.relation), dim=dim
            )
        return VonMisesFisherRelease(
            distance=2 * concentration * self.max_grad_norm,
            dim=dim,
            num_draws=max(change.num_replaced for change in changes) * plan.spec.vectors_per_row,
            is_centred=True,
        )

    def other_statements(self, plan: ReleasePlan) -> tuple[str, ...]:
        """Return the metric guarantee of one release and, for per_unit, the local one."""
        concentration = self.concentration(plan)
        metric = (
            "Metric privacy, not an (epsilon, delta): the log-likelihood ratio of one release is at most "
            f"{2 * concentration:.6g} times the Euclidean distance between the clipped "
            f"{'sums' if self.form == 'central' else 'vectors'}, in units of the gradient; releases add up"
        )
        if self.form == "central":
            return (metric,)
        if self.clipping == "unit":
            metric += f"; {concentration:.6g} times for vectors other than zero, whose clipped norms are equal"
        draws = plan.spec.vectors_per_row
        local = (
            f"Local privacy: what one row sends in one release hides that row from whoever sums the rows; it is "
            f"{draws * 2 * (concentration * self.max_grad_norm) ** 2 / plan.spec.vector_dim:.6g}-zCDP, and its "
            f"log-likelihood ratio is at most {draws * 2 * concentration * self.max_grad_norm:.6g}"
        )
        return (metric, local)

    def _sphere_dim(self, spec: ContributionSpec) -> int:
        return spec.vector_dim * (spec.num_vectors if self.form == "central" else 1)

    def _mean_length(self, plan: ReleasePlan) -> float:
        """Norm of the mean direction of a row on the bound."""
        return float(mean_resultant_length(self._sphere_dim(plan.spec), self.concentration(plan) * self.max_grad_norm))

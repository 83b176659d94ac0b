"""Noisy sums of moments per class or cell: the rows that records send, and the exactness of their sums."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.base import ContributionSpec
from lightning_dp.modules.moment_rows import ROW_STEPS, MomentRows, whole_steps
from lightning_dp.networks.class_gaussian import ClassGaussianGenerator

# Everything a record sends lies on fixed grids, so that sums are exact and no record moves another one's rounding.
_COEFFICIENT_STEPS = 2.0**14
_MAX_RECORDS = 2**24  # so many rows of at most 1 add up to less than 2^53 steps
_MAX_CENTRE = 100.0  # noise can throw a centre far away; squared distances stay below 2^53 steps

# Rows stay this far (relative) inside the unit ball, more than a mechanism's own margin, so that none is scaled.
_ROW_MARGIN = 2e-6
# The least inner product that the weights must leave between rows of one cell; rounding moves it by less.
_INNER_MARGIN = 1e-4
_PROJECTED = 4096  # records projected at a time
_CORNER = 4.0  # frequency from which amplitudes of natural images fall


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the cells of a release are: public, or computed from earlier releases.

    Attributes:
        centres: Coefficients, (classes, components, D).
        in_use: Whether records may join a cell, (classes, components); at least one of each class.
        clip: Radius of the ball around a centre, in units of scaled coefficients.
    """

    centres: Tensor
    in_use: Tensor
    clip: float


@dataclass(frozen=True, eq=False)
class CellMoments:
    """Noisy moments of the cells of a release. Released.

    Attributes:
        counts: (cells,).
        means: Of the coefficients, (cells, D).
        covariances: Of the scaled coefficients, (cells, D, D), symmetric, not yet positive.
        count_noise: Std of the noise on a count.
        mean_noise: Std of the noise on a mean, (cells, D).
        covariance_noise: Std of the noise on a diagonal entry of a second moment, (cells,); off the diagonal it is
            smaller by sqrt 2.
    """

    counts: Tensor
    means: Tensor
    covariances: Tensor
    count_noise: float
    mean_noise: Tensor
    covariance_noise: Tensor


class ClassMoments:
    """Sums per cell of 1, u and u u^T, where u is a record's clipped coefficient vector in a public basis.

    A record of class y with coefficients c belongs to the cell of class y whose centre is nearest. With x = (c -
    centre) * scale, scale public, and u = x / max(clip, |x|) it sends the row (w0, w1 u, w2 S(u)) there. S(u) lists
    u_a^2 and sqrt 2 u_a u_b for a < b: |S(u)| = |u|^2 and S(u) S(v) = (u v)^2, and each pair is released once.

    Guarantee: |row|^2 = w0^2 + w1^2 |u|^2 + w2^2 |u|^4 <= w0^2 + w1^2 + w2^2 <= 1. Two rows of one cell have the inner
    product w0^2 + w1^2 t + w2^2 t^2 with t = u v, which is positive for every t if w1^4 < 4 w0^2 w2^2; the constructor
    demands it. So a record that joins or leaves moves the sum by at most 1, one that changes by at most sqrt 2. Given
    the centres, a row depends on its record alone, to the last bit: products and squared distances are whole numbers
    below 2^53.

    Args:
        generator: Tells basis, classes and components.
        emphasis: Coefficients at frequency f are scaled by (1 + (f / 4)^2)^emphasis, in [0, 1]. High frequencies vary
            less in natural images, and the noise is the same for all.
        block_weights: Parts (w0, w1, w2) of count, mean and second moment in a row; scaled to the joint norm 1.
        chunk_size: Records whose rows are held at a time; memory only.

    Raises:
        ConfigurationError: A value is out of range.
    """

    def __init__(
        self,
        generator: ClassGaussianGenerator,
        *,
        emphasis: float,
        block_weights: tuple[float, float, float],
        chunk_size: int,
    ) -> None:
        if not 0 <= emphasis <= 1:
            raise ConfigurationError(f"Expected 0 <= emphasis <= 1, got {emphasis=}.")
        if len(block_weights) != 3 or not all(math.isfinite(w) and w > 0 for w in block_weights):
            raise ConfigurationError(f"Expected three finite block_weights > 0, got {block_weights=}.")
        if chunk_size < 1:
            raise ConfigurationError(f"Expected chunk_size >= 1, got {chunk_size=}.")
        length = math.hypot(*block_weights) / (1 - _ROW_MARGIN)
        self.weights = tuple(weight / length for weight in block_weights)
        least = self.weights[0] ** 2 - self.weights[1] ** 4 / (4 * self.weights[2] ** 2)
        if least < _INNER_MARGIN:
            raise ConfigurationError(
                f"Expected block_weights with w1^4 < 4 w0^2 w2^2, so that rows never oppose each other, got "
                f"{block_weights=}. Raise the part of the count."
            )
        self.chunk_size = chunk_size
        self.num_classes, self.num_components = generator.num_classes, generator.num_components
        self.dim = generator.basis.dim
        self.scale = (1 + (generator.basis.vector_radii / _CORNER) ** 2) ** emphasis
        self._basis = generator.basis
        self._pairs = torch.triu_indices(self.dim, self.dim)  # row by row, the diagonal included

    # What records send -----------------------------------------------------------------------------------------------

    def contribution_spec(self) -> ContributionSpec:
        """Describe the rows: one vector to one cell, never opposed."""
        num_cells, vector_dim = self.release_shape
        return ContributionSpec.statistics(num_cells=num_cells, vector_dim=vector_dim, rows_never_oppose=True)

    @property
    def release_shape(self) -> tuple[int, int]:
        """(cells, numbers in a row)."""
        return self.num_classes * self.num_components, 1 + self.dim + self._pairs.shape[1]

    def rows(
        self, images: Tensor, labels: Tensor, placement: Placement, records: range | None = None
    ) -> Iterator[MomentRows]:
        """Yield the rows of records, cell by cell.

        Args:
            images: uint8, (n, C, H, W). Private.
            labels: int64, (n,). Private.
            placement: Public or released.
            records: Ids of these records among all, in their order; None if these are all.

        Raises:
            ConfigurationError: More records in all than the sums can hold exactly.
        """
        records = range(len(images)) if records is None else records
        if records.stop > _MAX_RECORDS:
            raise ConfigurationError(f"Expected at most {_MAX_RECORDS} records for exact sums, got {records.stop}.")
        parts = zip(images.split(_PROJECTED), labels.split(_PROJECTED), strict=True)
        found = [self.directions(some, classes, placement) for some, classes in parts]
        cells, directions = torch.cat([c for c, _ in found]), torch.cat([u for _, u in found])
        for cell in cells.unique().tolist():
            ids = (cells == cell).nonzero()[:, 0]
            yield MomentRows(
                records.start + records.step * ids,
                cell,
                directions[ids],
                weights=self.weights,
                pair_weights=self._pair_weights(),
                form=self.encoded,
                chunk_size=self.chunk_size,
            )

    def directions(self, images: Tensor, labels: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
        """Return cell, (n,), and u, float64, (n, D), of each record; each by itself, whatever the others are.

        Args:
            images: uint8, (n, C, H, W).
            labels: int64, (n,).
            placement: Public or released.
        """
        steps = self._basis.in_steps(images, _COEFFICIENT_STEPS)
        centres = placement.centres.double().nan_to_num().clamp(-_MAX_CENTRE, _MAX_CENTRE)
        offsets = steps[:, None] - (centres * _COEFFICIENT_STEPS).round()[labels]  # (n, components, D)
        distances = offsets.square().sum(dim=2).masked_fill(~placement.in_use[labels], math.inf)
        nearest = distances.argmin(dim=1)  # the first of equal ones
        own = offsets[torch.arange(len(offsets), device=offsets.device), nearest]
        scaled = (own * self.scale.to(own.device)).round()
        norms = scaled.square().sum(dim=1, keepdim=True).sqrt()  # of a sum of whole numbers again
        directions = scaled / norms.clamp(min=placement.clip * _COEFFICIENT_STEPS)
        return labels * self.num_components + nearest, directions

    def encoded(self, directions: Tensor) -> Tensor:
        """Return (w0, w1 u, w2 S(u)) of each u, (n, numbers in a row), rounded towards zero to the grid of rows."""
        first, second = self._pairs.to(directions.device)
        rows = torch.empty(len(directions), self.release_shape[1], dtype=torch.float64, device=directions.device)
        rows[:, 0] = self.weights[0]
        rows[:, 1 : 1 + self.dim] = self.weights[1] * directions
        pairs = rows[:, 1 + self.dim :]
        torch.mul(directions.index_select(1, first), directions.index_select(1, second), out=pairs)
        pairs.mul_(self._pair_weights().to(pairs.device))
        return whole_steps(rows).div_(ROW_STEPS)

    def _pair_weights(self) -> Tensor:
        first, second = self._pairs
        return torch.where(first == second, 1.0, math.sqrt(2.0)).double() * self.weights[2]

    # What their sums tell --------------------------------------------------------------------------------------------

    def moments(self, sums: Tensor, noise_std: float, placement: Placement) -> CellMoments:
        """Return moments of the cells from noisy sums.

        Args:
            sums: Released sums, (cells, numbers in a row).
            noise_std: Std of their noise.
            placement: The placement of the release.
        """
        sums = sums.double()
        counts = sums[:, 0] / self.weights[0]
        divisor = counts.clamp(min=1.0)[:, None]
        means = sums[:, 1 : 1 + self.dim] / self.weights[1] / divisor
        first, second = self._pairs.to(sums.device)
        unscale = torch.where(first == second, 1.0, math.sqrt(0.5)).double() / self.weights[2]
        squares = torch.zeros(len(sums), self.dim, self.dim, dtype=torch.float64, device=sums.device)
        squares[:, first, second] = sums[:, 1 + self.dim :] * unscale / divisor
        squares[:, second, first] = squares[:, first, second]
        clip, scale = placement.clip, self.scale.to(sums.device)
        return CellMoments(
            counts=counts,
            means=means * clip / scale + placement.centres.flatten(0, 1).to(means),
            covariances=(squares - means[:, :, None] * means[:, None, :]) * clip**2,
            count_noise=noise_std / self.weights[0],
            mean_noise=noise_std * clip / self.weights[1] / divisor / scale,
            covariance_noise=noise_std * clip**2 / self.weights[2] / divisor[:, 0],
        )

"""One release of the moments of every class: the rows that records send, and what their noisy sums tell.

Kept apart from Lightning, so that any method may make this release first and train on samples of it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.teachers import RowChunk
from lightning_dp.mechanisms.base import ContributionSpec
from lightning_dp.networks.class_gaussian import ClassGaussianGenerator

# Everything a record sends lies on fixed grids, so that sums are exact and no record moves another one's rounding.
_BASIS_STEPS = 2.0**24
_COEFFICIENT_STEPS = 2.0**18
_ROW_STEPS = 2.0**30
_MAX_RECORDS = 2**22  # so many rows of at most 1 add up to less than 2^53 steps

# Rows stay this far (relative) inside the unit ball, more than a mechanism's own margin, so that none is scaled.
_ROW_MARGIN = 2e-6
# The least inner product that the weights must leave between rows of one cell; rounding moves it by less.
_INNER_MARGIN = 1e-4


@dataclass(frozen=True, eq=False)
class CellMoments:
    """Noisy moments of the coefficients in each cell, and how noisy they are. Released.

    Attributes:
        counts: (cells,), at least 1.
        means: (cells, D).
        covariances: (cells, D, D), symmetric, not yet positive.
        mean_noise: Std of the noise on each entry of a mean, (cells,).
        covariance_noise: Std of the noise on a diagonal entry of a second moment, (cells,); off the diagonal it is
            smaller by sqrt 2.
    """

    counts: Tensor
    means: Tensor
    covariances: Tensor
    mean_noise: Tensor
    covariance_noise: Tensor


class ClassMoments:
    """Sums per class of 1, u and u u^T, where u is a record's clipped coefficient vector in a public basis.

    A record x of class y has coefficients c, u = (c - centre) / max(clip, |c - centre|), and sends the row
    (w0, w1 u, w2 S(u)) to cell y. S(u) lists u_a^2 and sqrt 2 u_a u_b for a < b: |S(u)| = |u|^2, and S(u) S(v) =
    (u v)^2, so that each pair is released once.

    Guarantee: |row|^2 = w0^2 + w1^2 |u|^2 + w2^2 |u|^4 <= w0^2 + w1^2 + w2^2 <= 1. Two rows of one cell have the inner
    product w0^2 + w1^2 t + w2^2 t^2 with t = u v, which is positive for every t if w1^4 < 4 w0^2 w2^2; the constructor
    demands it. So a record that joins or leaves moves the sum by at most 1, one that changes by at most sqrt 2. A row
    depends on its record alone, to the last bit: the matrix product runs in whole numbers below 2^53.

    Args:
        generator: Tells basis and cells, and is what the moments are fitted to.
        clip: Radius of the ball around the centre, in units of the coefficients (pixels in [0, 1]).
        centre: Public centre of the constant coefficient of every channel; all others have centre 0.
        block_weights: Parts (w0, w1, w2) of count, mean and second moment in a row; scaled to the joint norm 1.
        chunk_size: Records whose rows are held at a time; memory only.

    Raises:
        ConfigurationError: A value is out of range.
    """

    def __init__(
        self,
        generator: ClassGaussianGenerator,
        *,
        clip: float = 6.0,
        centre: float = 3.0,
        block_weights: tuple[float, float, float] = (0.15, 0.35, 0.92),
        chunk_size: int = 512,
    ) -> None:
        if not (math.isfinite(clip) and clip > 0 and math.isfinite(centre)):
            raise ConfigurationError(f"Expected a finite clip > 0 and a finite centre, got {clip=}, {centre=}.")
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
        self.generator, self.clip, self.centre, self.chunk_size = generator, clip, centre, chunk_size
        self.dim = generator.basis.dim
        self.num_cells = generator.num_classes
        self._pairs = torch.triu_indices(self.dim, self.dim)  # row by row, the diagonal included

    # What records send -----------------------------------------------------------------------------------------------

    def contribution_spec(self) -> ContributionSpec:
        """Describe the rows: one vector to one cell, never opposed."""
        num_cells, vector_dim = self.release_shape
        return ContributionSpec.statistics(num_cells=num_cells, vector_dim=vector_dim, rows_never_oppose=True)

    @property
    def release_shape(self) -> tuple[int, int]:
        """(cells, numbers in a row)."""
        return self.num_cells, 1 + self.dim + self._pairs.shape[1]

    def rows(self, images: Tensor, labels: Tensor) -> Iterator[RowChunk]:
        """Yield the rows of records, grouped by cell within each chunk.

        Args:
            images: uint8, (N, C, H, W). Private.
            labels: int64, (N,). Private.

        Raises:
            ConfigurationError: More records than the sums can hold exactly.
        """
        if len(images) > _MAX_RECORDS:
            raise ConfigurationError(f"Expected at most {_MAX_RECORDS} records for exact sums, got {len(images)}.")
        records = torch.arange(len(images), device=images.device)
        parts = zip(*(t.split(self.chunk_size) for t in (records, images, labels)), strict=True)
        for ids, some, cells in parts:
            rows = self.encoded(self.directions(some))
            for cell in cells.unique().tolist():
                mine = cells == cell
                yield RowChunk(teacher_ids=ids[mine], values=rows[mine, None], queries=slice(cell, cell + 1))

    def directions(self, images: Tensor) -> Tensor:
        """Return u of each image, float64, (n, D), of norm at most 1; each by itself, whatever the others are.

        Args:
            images: uint8, (n, C, H, W).
        """
        basis = (self.generator.basis.matrix.double() * _BASIS_STEPS).round()
        products = images.flatten(2).double() @ basis.T.to(images.device)  # whole numbers: exact in any order
        coefficients = (products / (255 * _BASIS_STEPS)).flatten(1) - self._centre_vector().to(images.device)
        steps = (coefficients * _COEFFICIENT_STEPS).round()
        norms = steps.square().sum(dim=1, keepdim=True).sqrt()  # a sum of whole numbers again
        return steps / norms.clamp(min=self.clip * _COEFFICIENT_STEPS)

    def encoded(self, directions: Tensor) -> Tensor:
        """Return (w0, w1 u, w2 S(u)) of each u, (n, numbers in a row), rounded towards zero to the grid of rows."""
        first, second = self._pairs.to(directions.device)
        scale = torch.where(first == second, 1.0, math.sqrt(2.0)).double() * self.weights[2]
        rows = torch.empty(len(directions), self.release_shape[1], dtype=torch.float64, device=directions.device)
        rows[:, 0] = self.weights[0]
        rows[:, 1 : 1 + self.dim] = self.weights[1] * directions
        rows[:, 1 + self.dim :] = directions[:, first] * directions[:, second] * scale
        return rows.mul_(_ROW_STEPS).trunc_().div_(_ROW_STEPS)

    def _centre_vector(self) -> Tensor:
        centre = torch.zeros(self.generator.image_shape[0], self.generator.num_coefficients, dtype=torch.float64)
        centre[:, 0] = self.centre  # the constant comes first
        return centre.flatten()

    # What their sums tell: post-processing ---------------------------------------------------------------------------

    def moments(self, sums: Tensor, noise_std: float) -> CellMoments:
        """Return moments of the coefficients from noisy sums.

        Args:
            sums: Released sums, (cells, numbers in a row).
            noise_std: Std of their noise.
        """
        sums = sums.double()
        counts = (sums[:, 0] / self.weights[0]).clamp(min=1.0)
        means = sums[:, 1 : 1 + self.dim] / self.weights[1] / counts[:, None]
        first, second = self._pairs.to(sums.device)
        scale = torch.where(first == second, 1.0, math.sqrt(0.5)).double() / self.weights[2]
        squares = torch.zeros(len(sums), self.dim, self.dim, dtype=torch.float64, device=sums.device)
        squares[:, first, second] = sums[:, 1 + self.dim :] * scale / counts[:, None]
        squares[:, second, first] = squares[:, first, second]
        covariances = squares - means[:, :, None] * means[:, None, :]
        return CellMoments(
            counts=counts,
            means=means * self.clip + self._centre_vector().to(sums.device),
            covariances=covariances * self.clip**2,
            mean_noise=noise_std * self.clip / self.weights[1] / counts,
            covariance_noise=noise_std * self.clip**2 / self.weights[2] / counts,
        )

    def fitted(self, sums: Tensor, noise_std: float) -> dict[str, Tensor]:
        """Return the parameters of the generator that noisy sums describe, by name.

        Args:
            sums: Released sums, (cells, numbers in a row).
            noise_std: Std of their noise.
        """
        found = self.moments(sums, noise_std)
        edges = spectral_edge(found.covariance_noise, self.dim)
        covariances = denoised(found.covariances, edges)
        cells = (self.generator.num_classes, self.generator.num_components)
        return {
            "logits": torch.zeros(cells),
            "means": found.means.reshape(*cells, -1).float(),
            "factors": symmetric_root(covariances).reshape(*cells, self.dim, self.dim).float(),
        }


def spectral_edge(noise: Tensor, dim: int) -> Tensor:
    """Return the largest eigenvalue that symmetric Gaussian noise alone makes in high dimension.

    Args:
        noise: Std on the diagonal; smaller by sqrt 2 off it.
        dim: Rows of the matrix.
    """
    return noise * math.sqrt(2 * dim)


def denoised(covariances: Tensor, edges: Tensor) -> Tensor:
    """Return covariances without what noise may have made: eigenvalues shrunk, variances of single coefficients kept.

    Above the edge an eigenvalue l becomes sqrt(l^2 - edge^2), which is the best in Frobenius norm for a few strong
    directions in symmetric noise; below it nothing is left. Shrinking also removes true variance, so what is missing on
    the diagonal, where noise is small, is put back as independent variance.

    Args:
        covariances: (cells, D, D), symmetric.
        edges: (cells,), largest eigenvalue of the noise alone.

    Returns:
        Positive semi-definite, (cells, D, D).
    """
    values, vectors = torch.linalg.eigh(covariances)
    kept = (values.square() - edges[:, None].square()).clamp(min=0).sqrt() * (values > 0)
    low_rank = (vectors * kept[:, None, :]) @ vectors.mT
    rest = (covariances.diagonal(dim1=1, dim2=2) - low_rank.diagonal(dim1=1, dim2=2)).clamp(min=0)
    return low_rank + torch.diag_embed(rest)


def symmetric_root(matrices: Tensor) -> Tensor:
    """Return the symmetric roots of positive semi-definite matrices, (..., D, D)."""
    values, vectors = torch.linalg.eigh(matrices)
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT

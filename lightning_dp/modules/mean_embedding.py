"""One release of the mean embedding of every class: random Fourier features in public frequencies (DP-MERF)."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.teachers import RowChunk
from lightning_dp.mechanisms.base import ContributionSpec
from lightning_dp.networks.basis import LowFrequencyDCT

# What a record sends is a function of it alone, to the last bit: projections are whole numbers below 2^53, cosines come
# from a table, rows lie on a grid on which sums are exact.
_POINT_STEPS = 2.0**12
_TURN_STEPS = 2.0**22
_PHASES = 2**16
_ROW_STEPS = 2.0**28
_MAX_RECORDS = 2**24
_ROW_MARGIN = 2e-6


class MeanEmbedding:
    """Sums per class of 1 and phi(x) = [cos w_j x, sin w_j x] / sqrt(J), with J public random frequencies w_j.

    A record x of class y sends the row (a, b phi(x)) to class y, with a^2 + b^2 = 1 and |phi| = 1, so a record that
    joins or leaves moves the sum by at most 1. Features can be antipodal: one that changes moves it by up to 2.

    Frequencies are normal with variance 1 / l for each squared length scale l, in equal parts, so that E phi(x) phi(y)
    is the mean of exp(-|x - y|^2 / 2 l). All share one row and its norm.

    Args:
        image_shape: (C, H, W).
        num_classes: Number of labels.
        basis: Public basis in which images are compared; null compares pixels in [0, 1].
        num_frequencies: J; a row holds 2 J + 1 numbers.
        length_scales: Squared length scales, in units of squared distances of images in [0, 1].
        count_weight: a, the part of the count in a row, in (0, 1).
        chunk_size: Records whose rows are held at a time; memory only.
        public_seed: Seed of the frequencies.

    Raises:
        ConfigurationError: A value is out of range.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        basis: LowFrequencyDCT | None,
        num_frequencies: int,
        length_scales: Sequence[float],
        count_weight: float,
        chunk_size: int,
        public_seed: int,
    ) -> None:
        if num_frequencies < len(length_scales) or not all(math.isfinite(s) and s > 0 for s in length_scales):
            raise ConfigurationError(
                f"Expected finite length_scales > 0 and at least one frequency for each, got {length_scales=}, "
                f"{num_frequencies=}."
            )
        if not length_scales or not 0 < count_weight < 1 or chunk_size < 1:
            raise ConfigurationError(
                f"Expected at least one of length_scales, 0 < count_weight < 1 and chunk_size >= 1, got "
                f"{length_scales=}, {count_weight=}, {chunk_size=}."
            )
        self.basis, self.num_classes, self.num_frequencies = basis, num_classes, num_frequencies
        self.chunk_size = chunk_size
        self.weights = tuple(w * (1 - _ROW_MARGIN) for w in (count_weight, math.sqrt(1 - count_weight**2)))
        dim = math.prod(image_shape) if basis is None else basis.dim
        stream = torch.Generator().manual_seed(public_seed)
        draws = torch.randn(num_frequencies, dim, generator=stream, dtype=torch.float64)
        each = torch.tensor([length_scales[j % len(length_scales)] for j in range(num_frequencies)])
        # In turns per unit of a point, on a grid.
        self._turns = (draws / each.double().sqrt()[:, None] / (2 * math.pi) * _TURN_STEPS).round()
        self._table = (2 * math.pi / _PHASES * (torch.arange(_PHASES, dtype=torch.float64) + 0.5)).cos()

    # What records send -----------------------------------------------------------------------------------------------

    def contribution_spec(self) -> ContributionSpec:
        """Describe the rows: one vector to one class, possibly opposed."""
        num_cells, vector_dim = self.release_shape
        return ContributionSpec.statistics(num_cells=num_cells, vector_dim=vector_dim)

    @property
    def release_shape(self) -> tuple[int, int]:
        """(classes, numbers in a row)."""
        return self.num_classes, 2 * self.num_frequencies + 1

    def rows(self, images: Tensor, labels: Tensor, records: range | None = None) -> Iterator[RowChunk]:
        """Yield the rows of records, grouped by class within each chunk.

        Args:
            images: uint8, (n, C, H, W). Private.
            labels: int64, (n,). Private.
            records: Ids of these records among all, in their order; None if these are all.

        Raises:
            ConfigurationError: More records in all than the sums can hold exactly.
        """
        records = range(len(images)) if records is None else records
        if records.stop > _MAX_RECORDS:
            raise ConfigurationError(f"Expected at most {_MAX_RECORDS} records for exact sums, got {records.stop}.")
        of_all = records.start + records.step * torch.arange(len(images), device=images.device)
        parts = zip(*(t.split(self.chunk_size) for t in (of_all, images, labels)), strict=True)
        for ids, some, classes in parts:
            rows = self.encoded(some)
            for label in classes.unique().tolist():
                mine = classes == label
                yield RowChunk(teacher_ids=ids[mine], values=rows[mine, None], queries=slice(label, label + 1))

    def encoded(self, images: Tensor) -> Tensor:
        """Return (a, b phi) of each image, float64, (n, 2 J + 1), rounded towards zero to the grid of rows.

        Args:
            images: uint8, (n, C, H, W).
        """
        turns = self._exact_points(images) @ self._turns.T.to(images.device)  # whole numbers: exact in any order
        phases = (turns / (_POINT_STEPS * _TURN_STEPS / _PHASES)).floor().remainder(_PHASES).long()
        table = self._table.to(images.device)
        scale = self.weights[1] / math.sqrt(self.num_frequencies)
        quarter = _PHASES // 4  # sin x = cos(x - a quarter turn)
        rows = torch.cat([table[phases], table[(phases - quarter) % _PHASES]], dim=1).mul_(scale)
        rows = torch.cat([torch.full_like(rows[:, :1], self.weights[0]), rows], dim=1)
        return rows.mul_(_ROW_STEPS).trunc_().div_(_ROW_STEPS)

    def _exact_points(self, images: Tensor) -> Tensor:
        """Return points in whole steps, float64, (n, dim), each image by itself."""
        if self.basis is None:
            return (images.flatten(1).double() / 255 * _POINT_STEPS).round()
        return self.basis.in_steps(images, _POINT_STEPS)

    # What their sums tell, and generated images are compared with: post-processing ----------------------------------

    def class_means(self, sums: Tensor) -> Tensor:
        """Return the mean features of every class, (classes, 2 J), from noisy sums, (classes, 2 J + 1)."""
        counts = (sums[:, :1] / self.weights[0]).clamp(min=1.0)
        return sums[:, 1:] / self.weights[1] / counts

    def features(self, images: Tensor) -> Tensor:
        """Return phi of generated images, (B, 2 J), with a graph.

        Args:
            images: (B, C, H, W), in [0, 1].
        """
        points = images.flatten(1) if self.basis is None else self.basis(images)
        turns = points @ (self._turns * (2 * math.pi / _TURN_STEPS)).to(points).T
        return torch.cat([turns.cos(), turns.sin()], dim=1) / math.sqrt(self.num_frequencies)

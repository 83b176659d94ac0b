"""Labelled points and what it costs to move one onto another, without a tensor over pairs and coordinates.

Symbols: n and m points, d coordinates, C the (n, m) cost matrix.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dp.errors import ConfigurationError

# Differences that the L1 part holds at a time: 2 MB of float32, which stay in a CPU's cache; 64 MB elsewhere.
_CACHE_NUMBERS, _DEVICE_NUMBERS = 2**19, 2**24


@dataclass(frozen=True, eq=False)
class PointCloud:
    """Weighted points with labels.

    Attributes:
        points: (n, d), floating point, n >= 1.
        labels: (n,), integers; None leaves the labels out of the cost.
        log_weights: (n,), logarithms of weights that sum to 1; None for uniform ones. A point of weight zero (-inf)
            changes nothing, so a cloud can be padded to a fixed size.
    """

    points: Tensor
    labels: Tensor | None = None
    log_weights: Tensor | None = None

    def __post_init__(self) -> None:
        num = self.points.shape[0]
        if self.points.ndim != 2 or num == 0:
            raise ValueError(f"Expected points of shape (n, d) with n >= 1, got shape={tuple(self.points.shape)}.")
        for name, value in (("labels", self.labels), ("log_weights", self.log_weights)):
            if value is not None and value.shape != (num,):
                raise ValueError(f"Expected {name} of shape ({num},), one per point, got {tuple(value.shape)}.")

    def __getitem__(self, part: slice) -> "PointCloud":
        """Return a part of the points with their labels, with uniform weights."""
        return PointCloud(self.points[part], None if self.labels is None else self.labels[part])

    def log_masses(self) -> Tensor:
        """Return the logarithms of the weights, (n,), float64."""
        if self.log_weights is not None:
            return self.log_weights.double()
        num = self.points.shape[0]
        return torch.full((num,), -math.log(num), dtype=torch.float64, device=self.points.device)


@dataclass(frozen=True, kw_only=True)
class TransportCost:
    """What it costs to move a point onto another one.

    The squared L2 distance plus `l1_weight` times the L1 distance of the features (x, label_weight * onehot(label)):
    labels that differ add 2 w^2 + 2 w l1_weight.

    Args:
        l1_weight: Weight m of the L1 distance, >= 0; 1 or 3 in the paper.
        label_weight: Scale w of the one-hot label, >= 0; 15 in the paper, for pixels in [-1, 1].

    Raises:
        ConfigurationError: A weight is negative or not finite.

    Example:
        >>> first = PointCloud(torch.tensor([[0.0]]), torch.tensor([0]))
        >>> second = PointCloud(torch.tensor([[3.0]]), torch.tensor([1]))
        >>> TransportCost(l1_weight=1, label_weight=15).matrix(first, second).item()
        492.0
    """

    l1_weight: float = 1.0
    label_weight: float = 15.0

    def __post_init__(self) -> None:
        for name, value in (("l1_weight", self.l1_weight), ("label_weight", self.label_weight)):
            if not (math.isfinite(value) and value >= 0):
                raise ConfigurationError(f"Expected a finite cost.{name} >= 0, got {name}={value}.")

    @property
    def label_cost(self) -> float:
        """What two different labels add."""
        return 2 * self.label_weight**2 + 2 * self.l1_weight * self.label_weight

    def matrix(self, first: PointCloud, second: PointCloud, *, at_once: bool = False) -> Tensor:
        """Return the costs between all pairs, (n, m), float64.

        Products are taken in float64, which neither TF32 nor autocast rounds: |x|^2 + |y|^2 - 2xy in lower precision
        is off by more than the temperature.

        Args:
            first: n points.
            second: m points.
            at_once: Write the formula of all pairs and coordinates, for a compiler that makes one loop of it; without
                one it would hold them all.

        Raises:
            ValueError: One cloud has labels and the other has none.
        """
        if at_once:
            total = self._costs_at_once(_wide(first.points), _wide(second.points))
        else:
            x, y = first.points.double(), second.points.double()
            total = torch.addmm(x.square().sum(1)[:, None] + y.square().sum(1)[None, :], x, y.T, alpha=-2)
            if self.l1_weight > 0:
                total.add_(_l1_distances(first.points, second.points), alpha=self.l1_weight)
        if first.labels is not None and second.labels is not None:
            total += self.label_cost * (first.labels[:, None] != second.labels[None, :])
        elif first.labels is not second.labels:
            raise ValueError("Expected labels for both clouds or for none of them; one has labels.")
        return total

    def gradient(self, first: PointCloud, second: PointCloud, weights: Tensor, *, at_once: bool = False) -> Tensor:
        """Return sum_j weights_ij dC_ij/dx_i, the gradient of <weights, C> with respect to the first points.

        The squared part is 2 (x_i sum_j weights_ij - (weights y)_i); the L1 part sums signs, zero at equal coordinates.

        Args:
            first: n points x.
            second: m points y.
            weights: (n, m), float64.
            at_once: As in `matrix`.

        Returns:
            (n, d), of the type of the first points.
        """
        if at_once:
            return self._slopes_at_once(_wide(first.points), _wide(second.points), weights).to(first.points.dtype)
        x, y = first.points.double(), second.points.double()
        total = torch.addmm(x * weights.sum(1, keepdim=True), weights, y, alpha=-2, beta=2)
        if self.l1_weight > 0:
            total.add_(_weighted_signs(first.points, second.points, weights), alpha=self.l1_weight)
        return total.to(first.points.dtype)

    def _costs_at_once(self, x: Tensor, y: Tensor) -> Tensor:
        difference = x[:, None] - y[None]
        total = difference.square().sum(-1)
        if self.l1_weight > 0:
            total = total + self.l1_weight * difference.abs().sum(-1)
        return total.double()

    def _slopes_at_once(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        weights = weights.to(x.dtype)[:, :, None]
        difference = x[:, None] - y[None]
        total = 2 * (weights * difference).sum(1)
        if self.l1_weight > 0:
            # 1 - relu(2 - relu(z + 1)) is z held between -1 and 1: the sign of whatever is not denormal, in four
            # operations; a compiler makes three times as many of `sign`.
            steep = difference * (0.5 / torch.finfo(x.dtype).tiny)
            missing = (weights * torch.relu(2 - torch.relu(steep + 1))).sum(1)
            total = total + self.l1_weight * (weights.sum(1) - missing)
        return total


def _wide(points: Tensor) -> Tensor:
    """Return the points in float32 at least."""
    return points.to(torch.promote_types(points.dtype, torch.float32))


def _l1_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return the L1 distances of all pairs, (n, m), a few rows at a time."""
    result = x.new_empty(x.shape[0], y.shape[0])
    ones = x.new_ones(x.shape[1])
    for rows, difference in _differences(x, y):
        torch.mv(difference.abs_().flatten(0, 1), ones, out=result[rows].view(-1))
    return result


def _weighted_signs(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Return sum_j weights_ij sign(x_i - y_j), (n, d), a few rows at a time."""
    result, weights = torch.empty_like(x), weights.to(x.dtype)
    for rows, difference in _differences(x, y):
        torch.bmm(weights[rows, None], difference.sign_(), out=result[rows, None])
    return result


def _differences(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield x_i - y_j for a few rows i, (rows, m, d), in one buffer that the next rows overwrite."""
    numbers = _CACHE_NUMBERS if x.device.type == "cpu" else _DEVICE_NUMBERS
    size = max(1, min(x.shape[0], numbers // y.numel()))
    buffer = x.new_empty(size, *y.shape)
    for start in range(0, x.shape[0], size):
        rows = slice(start, min(start + size, x.shape[0]))
        yield rows, torch.sub(x[rows, None], y[None], out=buffer[: rows.stop - start])

"""Fidelity of synthetic images in a feature space: Fréchet distance, kernel distance, precision and recall.

Pure functions of two sets of feature vectors, `real` (N, d) and `fake` (M, d); chunked, so that no (N, M, d) array and
no more than `chunk` rows of a distance table exist at a time.
"""

import torch
from torch import Tensor

from lightning_dp.errors import ConfigurationError


def _check(real: Tensor, fake: Tensor, least: int) -> None:
    """Refuse sets that are too small, of unequal width, or not finite."""
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ConfigurationError(
            "Expected real and fake features of shape (N, d) and (M, d), "
            f"got {tuple(real.shape)} and {tuple(fake.shape)}."
        )
    if min(len(real), len(fake)) < least:
        raise ConfigurationError(
            f"Expected at least {least} real and fake feature vectors, got {len(real)} and {len(fake)}. "
            "Evaluate more images."
        )
    if not (torch.isfinite(real).all() and torch.isfinite(fake).all()):
        raise ConfigurationError("Expected finite features, got NaN or infinity. Check the images.")


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (d,) and unbiased covariance (d, d) in float64."""
    values = features.double()
    mean = values.mean(dim=0)
    centred = values - mean
    return mean, centred.T @ centred / (len(values) - 1)


def _square_root(matrix: Tensor) -> Tensor:
    """Return the square root of a symmetric matrix, eigenvalues below 0 (rounding) taken as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def gaussian_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Return the squared 2-Wasserstein distance of two Gaussians.

    |m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2): the symmetric form, real also for singular covariances, where
    the usual root of A B may turn complex.

    References: `Dowson and Landau (1982) <https://doi.org/10.1016/0047-259X(82)90077-X>`_.
    """
    root = _square_root(covariance_a)
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(0.0, float(distance))  # rounding of two equal sets may fall a hair below 0


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Return the Fréchet distance (FID) of two sets of features, in float64.

    Args:
        real: (N, d), N >= 2.
        fake: (M, d), M >= 2.

    Returns: The distance, >= 0. It falls with growing N and M (bias), so sizes belong beside it.

    Raises:
        ConfigurationError: Too few vectors, unequal widths, or values that are not finite.

    References: `Heusel et al. (2017) <https://arxiv.org/abs/1706.08500>`_.
    """
    _check(real, fake, least=2)
    return gaussian_distance(*_moments(real), *_moments(fake))


def _mean_kernel(left: Tensor, right: Tensor, chunk: int, *, same: bool) -> float:
    """Return the mean of k(x, y) = (x.y / d + 1)^3 over all pairs, the pairs (x, x) left out if `same`."""
    dim = left.shape[1]
    total = 0.0
    for rows in left.split(chunk):
        base = torch.addmm(torch.ones((), device=left.device), rows, right.T, alpha=1 / dim)
        total += float((base * base * base).sum(dim=1).double().sum())
    if not same:
        return total / (len(left) * len(right))
    total -= float(((left * left).sum(dim=1) / dim + 1).pow(3).sum(dtype=torch.float64))
    return total / (len(left) * (len(left) - 1))


def kernel_distance(real: Tensor, fake: Tensor, *, chunk: int = 200) -> float:
    """Return the unbiased squared maximum mean discrepancy with the cubic kernel of KID.

    Differs: the paper averages over random subsets of 1,000; this takes all pairs once. It estimates the same
    quantity with less variance, and nothing is random. May fall slightly below 0 for equal distributions.

    Args:
        real: (N, d), N >= 2.
        fake: (M, d), M >= 2.
        chunk: Rows per block of the kernel table.

    Returns: The estimate.

    Raises:
        ConfigurationError: As for `frechet_distance`.

    References: `Binkowski et al. (2018) <https://arxiv.org/abs/1801.01401>`_.
    """
    _check(real, fake, least=2)
    real, fake = real.float(), fake.float()
    return (
        _mean_kernel(real, real, chunk, same=True)
        + _mean_kernel(fake, fake, chunk, same=True)
        - 2 * _mean_kernel(real, fake, chunk, same=False)
    )


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Return |r - c|^2, (R, C)."""
    table = torch.addmm((rows * rows).sum(1)[:, None], rows, columns.T, beta=1, alpha=-2)
    return table.add_((columns * columns).sum(1)[None]).clamp_min_(0)


def _squared_radii(points: Tensor, neighbours: int, chunk: int) -> Tensor:
    """Return the squared distance of each point to its k-th nearest other point, (N,)."""
    radii = []
    for rows in points.split(chunk):
        # the point itself is among the k + 1 nearest, at distance 0
        radii.append(_squared_distances(rows, points).topk(neighbours + 1, dim=1, largest=False).values[:, -1])
    return torch.cat(radii)


def _coverage(points: Tensor, centres: Tensor, squared_radii: Tensor, chunk: int) -> float:
    """Return the share of points inside at least one ball around a centre."""
    inside = [(_squared_distances(rows, centres) <= squared_radii).any(dim=1) for rows in points.split(chunk)]
    return float(torch.cat(inside).double().mean())


def precision_recall(real: Tensor, fake: Tensor, *, neighbours: int = 3, chunk: int = 1000) -> tuple[float, float]:
    """Return precision (fakes that lie on the real manifold) and recall (reals that lie on the fake manifold).

    A manifold is the union of balls around a set's points, each reaching to its k-th nearest other point. Precision
    is high for plausible images, recall for varied ones; torch-fidelity before 0.4 gave them in the other order.

    Args:
        real: (N, d), N > neighbours.
        fake: (M, d), M > neighbours.
        neighbours: k.
        chunk: Rows per block of the distance table.

    Returns: (precision, recall), each in [0, 1].

    Raises:
        ConfigurationError: Too few vectors, unequal widths, or values that are not finite.

    References: `Kynkäänniemi et al. (2019) <https://arxiv.org/abs/1904.06991>`_, Equations 1 to 3.
    """
    _check(real, fake, least=neighbours + 1)
    centre = real.double().mean(dim=0)  # a common shift: smaller numbers, so less cancellation in |r|^2 - 2rc + |c|^2
    real, fake = (real.double() - centre).float(), (fake.double() - centre).float()
    precision = _coverage(fake, real, _squared_radii(real, neighbours, chunk), chunk)
    recall = _coverage(real, fake, _squared_radii(fake, neighbours, chunk), chunk)
    return precision, recall

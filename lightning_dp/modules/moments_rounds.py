"""Rounds of moment releases: classes first, then cells inside of them. The whole of DP-Moments but for Lightning.

Kept apart from a module, so that any method may make these releases first and train on samples of the result.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_dp.errors import ConfigurationError
from lightning_dp.modules.class_moments import CellMoments, ClassMoments, Placement
from lightning_dp.modules.moment_rows import MomentRows
from lightning_dp.modules.release import Released
from lightning_dp.networks.class_gaussian import ClassGaussianGenerator

_CODEBOOK_SAMPLES = 1500  # per class
_CODEBOOK_ROUNDS = 10
_EMPTY_DEVIATIONS = 4.0  # a cell whose noisy count is below so many noise stds is taken as empty
_NEVER = -1e4  # logit of a component that is not used


class MomentsRounds(nn.Module):
    """Releases moments round by round, and fits a mixture of Gaussians per class to the last round.

    The first of several rounds has one cell per class. What it releases places the `num_components` centres of the
    generator: k-means on samples of the released Gaussians, in public random numbers. `search_rounds` rounds then move
    the centres to the noisy means of their cells (Lloyd's algorithm). All that are left release the same sums, whose
    average tells the mixture: at one noise level for all releases, numbers of rounds are shares of the budget. A single
    round has one cell per class.

    Guarantee: every round is a release of `ClassMoments` whose placement was computed from earlier releases, so rounds
    compose adaptively. All else is post-processing.

    Args:
        generator: The mixture that is fitted. Not a submodule.
        centre: Public first centre of the constant coefficient of every channel; all others have centre 0.
        clip: Radius of the ball in the first round, in units of scaled coefficients (pixels in [0, 1]).
        cell_clip: Radius of the balls in later rounds, around released centres.
        search_rounds: Rounds between the first and those that are averaged, as far as there are enough.
        keep_diagonal: Put variance of single coefficients back where shrinking took it (`denoised`).
        emphasis: See `ClassMoments`, as all that follow.
        block_weights: See `ClassMoments`.
        chunk_size: See `ClassMoments`.
        public_seed: Seed of the codebook.

    Raises:
        ConfigurationError: A value is out of range.
    """

    def __init__(
        self,
        generator: ClassGaussianGenerator,
        *,
        centre: float = 3.0,
        clip: float = 6.0,
        cell_clip: float = 6.0,
        search_rounds: int = 1,
        keep_diagonal: bool = True,
        emphasis: float = 0.0,
        block_weights: tuple[float, float, float] = (0.15, 0.35, 0.92),
        chunk_size: int = 64,
        public_seed: int = 0,
    ) -> None:
        super().__init__()
        if not (math.isfinite(centre) and 0 < clip < math.inf and 0 < cell_clip < math.inf):
            raise ConfigurationError(
                f"Expected finite clip > 0 and cell_clip > 0 and a finite centre, got {clip=}, {cell_clip=}, {centre=}."
            )
        if search_rounds < 0:
            raise ConfigurationError(f"Expected search_rounds >= 0, got {search_rounds=}.")
        self.statistics = ClassMoments(generator, emphasis=emphasis, block_weights=block_weights, chunk_size=chunk_size)
        self.clip, self.cell_clip, self.public_seed = float(clip), float(cell_clip), public_seed
        self.search_rounds, self.keep_diagonal = search_rounds, keep_diagonal
        cells = (generator.num_classes, generator.num_components)
        centres = torch.zeros(*cells, self.statistics.dim, dtype=torch.float64)
        of_channels = generator.image_shape[0] * generator.num_coefficients
        centres[..., 0 : of_channels : generator.num_coefficients] = centre  # the constants
        self.centres: Tensor
        self.register_buffer("centres", centres)
        self.in_use: Tensor
        self.register_buffer("in_use", torch.arange(cells[1]).expand(cells) == 0)
        self.num_done: Tensor
        self.register_buffer("num_done", torch.zeros((), dtype=torch.int64))
        self.average: Tensor
        self.register_buffer("average", torch.zeros(self.statistics.release_shape))
        self.num_averaged: Tensor
        self.register_buffer("num_averaged", torch.zeros((), dtype=torch.int64))

    # Releases --------------------------------------------------------------------------------------------------------

    @property
    def placement(self) -> Placement:
        """Cells of the next release: public or released."""
        clip = self.clip if self.num_done == 0 else self.cell_clip
        return Placement(centres=self.centres, in_use=self.in_use, clip=clip)

    def rows(self, images: Tensor, labels: Tensor, records: range | None = None) -> Iterator[MomentRows]:
        """Yield the private rows of the next release; see `ClassMoments.rows`."""
        return self.statistics.rows(images, labels, self.placement, records)

    # What they tell: post-processing ---------------------------------------------------------------------------------

    def absorb(self, released: Released, num_rounds: int) -> dict[str, Tensor]:
        """Take a release: place the cells of the next one, and return the generator's parameters by name.

        Args:
            released: The sums of the rows that `rows` has just given.
            num_rounds: Rounds in all, as planned before the first.
        """
        number = int(self.num_done)
        num_placing = 0 if num_rounds == 1 else 1 + min(self.search_rounds, num_rounds - 2)
        if number < num_placing:
            sums, noise_std = released.value, released.noise_std
        else:
            self.num_averaged += 1
            self.average += (released.value - self.average) / self.num_averaged
            sums, noise_std = self.average, released.noise_std / math.sqrt(int(self.num_averaged))
        found = self.statistics.moments(sums, noise_std, self.placement)
        fitted, means, covariances = self._mixture(found)
        if number < num_placing:
            self._place(fitted["logits"] > _NEVER, means, covariances, split=number == 0)
        self.num_done += 1
        return fitted

    def _mixture(self, found: CellMoments) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return the generator's parameters, means (classes, components, D) and covariances (the same, D)."""
        cells = (self.statistics.num_classes, self.statistics.num_components)
        counts = found.counts.reshape(cells)
        in_use = self.in_use & (counts > max(_EMPTY_DEVIATIONS * found.count_noise, 1.0))
        in_use[:, 0] |= ~in_use.any(dim=1)
        shares = torch.where(in_use, counts.clamp(min=1.0), 0.0)
        means = shrunk_means(found, shares)
        edges = spectral_edge(found.covariance_noise, self.statistics.dim)
        scale = self.statistics.scale.to(means)
        scaled = denoised(found.covariances, edges, keep_diagonal=self.keep_diagonal)
        covariances = (scaled / scale / scale[:, None]).unflatten(0, cells)
        fitted = {
            "logits": torch.where(in_use, shares.clamp(min=1.0).log(), _NEVER).float(),
            "means": means.float(),
            "factors": symmetric_root(covariances).float(),
        }
        return fitted, means, covariances

    def _place(self, in_use: Tensor, means: Tensor, covariances: Tensor, *, split: bool) -> None:
        """Set the centres of the next release from the moments of this one."""
        num_components = self.statistics.num_components
        if split and num_components > 1:
            stream = torch.Generator().manual_seed(self.public_seed)
            self.centres.copy_(codebook(means[:, 0], covariances[:, 0], num_components, stream))
            self.in_use.fill_(value=True)
        else:
            self.centres.copy_(means)
            self.in_use.copy_(in_use)


def shrunk_means(found: CellMoments, shares: Tensor) -> Tensor:
    """Return the means of cells, (classes, components, D), drawn towards those of their classes as noise demands.

    How far cells truly differ is estimated per coefficient over all classes (empirical Bayes).

    Args:
        found: Noisy moments.
        shares: Weights of the cells, (classes, components), zero for unused ones.
    """
    weights = (shares / shares.sum(dim=1, keepdim=True).clamp(min=1e-9))[..., None]
    means, noise = (t.unflatten(0, shares.shape) for t in (found.means, found.mean_noise.square()))
    of_class = (weights * means).sum(dim=1, keepdim=True)
    offsets = means - of_class
    spread = (weights * (offsets.square() - noise)).sum(dim=(0, 1)).clamp(min=0) / len(shares)
    return of_class + offsets * (spread / (spread + noise).clamp(min=1e-12))


def codebook(means: Tensor, covariances: Tensor, num: int, stream: torch.Generator) -> Tensor:
    """Return `num` centres per class, (classes, num, D), by k-means on samples of released Gaussians.

    Args:
        means: (classes, D).
        covariances: (classes, D, D), positive semi-definite.
        num: Centres per class.
        stream: Public randomness, on the CPU.
    """
    found = []
    for mean, root in zip(means, symmetric_root(covariances), strict=True):
        draws = torch.randn(max(_CODEBOOK_SAMPLES, num), len(mean), generator=stream, dtype=torch.float64)
        points = mean + draws.to(mean.device) @ root
        centres = points[:num].clone()
        for _ in range(_CODEBOOK_ROUNDS):
            nearest = torch.cdist(points, centres).argmin(dim=1)
            for index in range(num):
                mine = points[nearest == index]
                centres[index] = mine.mean(dim=0) if len(mine) else points[index]
        found.append(centres)
    return torch.stack(found)


def spectral_edge(noise: Tensor, dim: int) -> Tensor:
    """Return the largest eigenvalue that symmetric Gaussian noise alone makes in high dimension.

    Args:
        noise: Std on the diagonal; smaller by sqrt 2 off it.
        dim: Rows of the matrix.
    """
    return noise * math.sqrt(2 * dim)


def denoised(covariances: Tensor, edges: Tensor, *, keep_diagonal: bool = True) -> Tensor:
    """Return covariances without what noise may have made.

    Above the edge an eigenvalue l becomes sqrt(l^2 - edge^2), which is the best in Frobenius norm for a few strong
    directions in symmetric noise; below it nothing is left. Shrinking also takes true variance. What is missing on the
    diagonal, where noise is small, can be put back as independent variance.

    Args:
        covariances: (cells, D, D), symmetric.
        edges: (cells,), largest eigenvalue of the noise alone.
        keep_diagonal: Put the variances of single coefficients back.

    Returns:
        Positive semi-definite, (cells, D, D).
    """
    values, vectors = torch.linalg.eigh(covariances)
    kept = (values.square() - edges[:, None].square()).clamp(min=0).sqrt() * (values > 0)
    low_rank = (vectors * kept[:, None, :]) @ vectors.mT
    if not keep_diagonal:
        return low_rank
    rest = (covariances.diagonal(dim1=1, dim2=2) - low_rank.diagonal(dim1=1, dim2=2)).clamp(min=0)
    return low_rank + torch.diag_embed(rest)


def symmetric_root(matrices: Tensor) -> Tensor:
    """Return the symmetric roots of positive semi-definite matrices, (..., D, D)."""
    values, vectors = torch.linalg.eigh(matrices)
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT

"""DP-Moments: one release of counts, means and second moments per class, then samples of denoised Gaussians."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dp.mechanisms.base import ContributionSpec
from lightning_dp.modules.class_moments import ClassMoments
from lightning_dp.modules.one_shot import OneShotModule
from lightning_dp.modules.release import Released
from lightning_dp.networks.class_gaussian import ClassGaussianGenerator


class MomentsModule(OneShotModule):
    """A Gaussian per class in a public cosine basis, from one noisy sum over all records.

    With more than one release, the same sums are released again and averaged: at equal epsilon, the same estimate.

    Guarantee: that of `ClassMoments`; what follows the release is post-processing.

    Args:
        generator: The mixture of Gaussians that leaves; tells the basis.
        clip: See `ClassMoments`, as all that follow.
        centre: See `ClassMoments`.
        block_weights: See `ClassMoments`.
        chunk_size: See `ClassMoments`.
        public_seed: Unused: nothing is drawn in public.

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
        public_seed: int = 0,
    ) -> None:
        super().__init__(generator, public_seed=public_seed)
        self.statistics = ClassMoments(
            generator, clip=clip, centre=centre, block_weights=block_weights, chunk_size=chunk_size
        )
        self.average: Tensor
        self.register_buffer("average", torch.zeros(self.statistics.release_shape))
        self.num_averaged: Tensor
        self.register_buffer("num_averaged", torch.zeros((), dtype=torch.int64))

    @override
    def contribution_spec(self) -> ContributionSpec:
        return self.statistics.contribution_spec()

    @override
    def release_statistics(self) -> tuple[Released, dict[str, Tensor]]:
        rows = self.statistics.rows(self.private_images(), self.private_labels())
        released = self.release(rows, self.statistics.release_shape)
        self.num_averaged += 1
        self.average += (released.value - self.average) / self.num_averaged
        noise_std = released.noise_std / float(self.num_averaged) ** 0.5
        return released, self.statistics.fitted(self.average, noise_std)

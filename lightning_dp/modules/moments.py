"""DP-Moments: one release of counts, means and second moments per class, then samples of denoised Gaussians."""

from torch import Tensor
from typing_extensions import override

from lightning_dp.mechanisms.base import ContributionSpec
from lightning_dp.modules.moments_rounds import MomentsRounds
from lightning_dp.modules.one_shot import OneShotModule
from lightning_dp.modules.release import Released
from lightning_dp.networks.class_gaussian import ClassGaussianGenerator


class MomentsModule(OneShotModule):
    """A mixture of Gaussians per class in a public cosine basis, from noisy sums over all records.

    One release (--trainer.max_steps 1) fits one Gaussian per class. With two, the first places the components of the
    generator and the others fit them (see `MomentsRounds`).

    Guarantee: that of `ClassMoments` for each release; what follows the releases is post-processing.

    Args:
        generator: The mixture that leaves; tells basis and components.
        centre: See `MomentsRounds`, as all that follow.
        clip: See `MomentsRounds`.
        cell_clip: See `MomentsRounds`.
        search_rounds: See `MomentsRounds`.
        keep_diagonal: See `MomentsRounds`.
        emphasis: See `ClassMoments`.
        block_weights: See `ClassMoments`.
        chunk_size: See `ClassMoments`.
        public_seed: Seed of the codebook. The command line sets it to seed_everything.

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
        super().__init__(generator, public_seed=public_seed)
        self.rounds = MomentsRounds(
            generator,
            centre=centre,
            clip=clip,
            cell_clip=cell_clip,
            search_rounds=search_rounds,
            keep_diagonal=keep_diagonal,
            emphasis=emphasis,
            block_weights=block_weights,
            chunk_size=chunk_size,
        )

    @override
    def contribution_spec(self) -> ContributionSpec:
        return self.rounds.statistics.contribution_spec()

    @override
    def release_statistics(self) -> tuple[Released, dict[str, Tensor]]:
        rounds = self.rounds
        rounds.public_seed = self.public_seed
        rows = rounds.rows(self.private_images(), self.private_labels(), self.own_records)
        released = self.release(rows, rounds.statistics.release_shape)
        return released, rounds.absorb(released, self.planned_releases)

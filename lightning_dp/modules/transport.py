"""What methods share that move generated images, as points in a public basis, towards Poisson batches of records."""

import math

import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.errors import ConfigurationError
from lightning_dp.modules.imitation import imitate
from lightning_dp.modules.options import check_betas, check_positive, check_share
from lightning_dp.modules.records import PoissonModule
from lightning_dp.modules.release import PublicSamples
from lightning_dp.modules.schedule import with_cosine_schedule
from lightning_dp.networks.basis import PublicBasis
from lightning_dp.networks.generator import Generator


class TransportModule(PoissonModule):
    """A generator that follows a released direction for each of its images; Adam, moving average and warm start.

    Args:
        generator: The network that leaves.
        basis: See `DPSinkhorn`, as all that follow: the flags are those of the methods.
        expected_batch_size: See `DPSinkhorn`.
        learning_rate: See `DPSinkhorn`.
        weight_decay: See `DPSinkhorn`.
        betas: See `DPSinkhorn`.
        final_learning_rate_share: See `DPSinkhorn`.
        ema_decay: See `DPSinkhorn`.
        public_seed: See `DPSinkhorn`.

    Raises:
        ConfigurationError: A value is out of range.
    """

    def __init__(
        self,
        generator: Generator,
        basis: PublicBasis | None,
        *,
        expected_batch_size: float,
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        final_learning_rate_share: float,
        ema_decay: float,
        public_seed: int,
    ) -> None:
        super().__init__(expected_batch_size=expected_batch_size, public_seed=public_seed, ema_decay=ema_decay)
        check_positive(learning_rate=learning_rate)
        check_share(final_learning_rate_share=final_learning_rate_share)
        check_betas(betas)
        if not (math.isfinite(weight_decay) and weight_decay >= 0):
            raise ConfigurationError(f"Expected a finite model.weight_decay >= 0, got weight_decay={weight_decay}.")
        self.generator = generator
        self.keep_average(generator)
        self.basis = basis
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.final_learning_rate_share = final_learning_rate_share

    @property
    def point_dim(self) -> int:
        """Numbers by which one image is compared."""
        return self.basis.dim if self.basis is not None else math.prod(self.generator.image_shape)

    @override
    def released_networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator}

    @override
    def released_generator(self) -> Generator:
        """Return the generator that is sampled and published: the average if there is one."""
        return self.averaged(self.generator)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = self.generator.parameter_groups(self.learning_rate)
        optimizer = torch.optim.Adam(groups, betas=self.betas, weight_decay=self.weight_decay)
        return with_cosine_schedule(
            optimizer, num_steps=self.planned_releases, final_share=self.final_learning_rate_share
        )

    @override
    def learn_from_samples(self, samples: PublicSamples, *, steps: int, learning_rate: float, seed: int) -> None:
        imitate(self.generator, samples, steps=steps, learning_rate=learning_rate, seed=seed)
        self.start_average()

    def points_of(self, images: Tensor) -> Tensor:
        """Return images in [0, 1] as points of the scale of pixels in [-1, 1]; a shift would change no cost."""
        judged: Tensor = images.flatten(1) if self.basis is None else self.basis(images)
        return 2 * judged.float() if judged.dtype == torch.bfloat16 else 2 * judged

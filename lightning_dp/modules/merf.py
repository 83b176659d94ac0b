"""DP-MERF: one release of the mean embedding of every class, then a generator that matches it (Harder et al. 2021)."""

import copy
import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.base import ContributionSpec
from lightning_dp.modules.mean_embedding import MeanEmbedding
from lightning_dp.modules.one_shot import OneShotModule
from lightning_dp.modules.options import check_positive
from lightning_dp.modules.release import Released
from lightning_dp.networks.basis import LowFrequencyDCT
from lightning_dp.networks.generator import Generator


class DPMERF(OneShotModule):
    """A generator trained by maximum mean discrepancy to a noisy mean embedding, which is released once.

    With more than one release, the same embedding is released again and averaged: at equal epsilon, the same estimate.
    The generator is trained in the step of the last planned release, from released values and public draws alone.

    Guarantee: that of `MeanEmbedding`; training is post-processing.

    Args:
        generator: The network that leaves.
        basis: See `MeanEmbedding`, as what follows up to `count_weight`.
        num_frequencies: See `MeanEmbedding`.
        length_scales: See `MeanEmbedding`; 105 is the published one for MNIST.
        count_weight: See `MeanEmbedding`.
        train_steps: Steps of Adam on the discrepancy. Stopping by a fixed count keeps from fitting the noise.
        images_per_class: Generated images of each class in a step, >= 2.
        learning_rate: Adam's learning rate; falls along a half cosine to a fiftieth.
        chunk_size: Records whose rows are held at a time; memory only.
        public_seed: Seed of frequencies and latents. The command line sets it to seed_everything.

    Raises:
        ConfigurationError: A value is out of range.
    """

    def __init__(
        self,
        generator: Generator,
        basis: LowFrequencyDCT | None = None,
        *,
        num_frequencies: int = 2000,
        length_scales: tuple[float, ...] = (105.0,),
        count_weight: float = 0.1,
        train_steps: int = 2000,
        images_per_class: int = 20,
        learning_rate: float = 0.01,
        chunk_size: int = 512,
        public_seed: int = 0,
    ) -> None:
        super().__init__(generator, public_seed=public_seed)
        check_positive(train_steps=train_steps, learning_rate=learning_rate, num_frequencies=num_frequencies)
        if images_per_class < 2:
            raise ConfigurationError(f"Expected model.images_per_class >= 2, got {images_per_class=}.")
        self.basis, self.num_frequencies, self.length_scales = basis, num_frequencies, length_scales
        self.count_weight, self.chunk_size = count_weight, chunk_size
        self.train_steps, self.images_per_class, self.learning_rate = train_steps, images_per_class, learning_rate
        self.average: Tensor
        self.register_buffer("average", torch.zeros(self.embedding().release_shape))
        self.num_averaged: Tensor
        self.register_buffer("num_averaged", torch.zeros((), dtype=torch.int64))

    def embedding(self) -> MeanEmbedding:
        """Return the embedding at the present public seed."""
        return MeanEmbedding(
            self.generator.image_shape,
            self.generator.num_classes,
            basis=self.basis,
            num_frequencies=self.num_frequencies,
            length_scales=self.length_scales,
            count_weight=self.count_weight,
            chunk_size=self.chunk_size,
            public_seed=self.public_seed,
        )

    @override
    def contribution_spec(self) -> ContributionSpec:
        return self.embedding().contribution_spec()

    @override
    def release_statistics(self) -> tuple[Released, dict[str, Tensor]]:
        embedding = self.embedding()
        rows = embedding.rows(self.private_images(), self.private_labels(), self.own_records)
        released = self.release(rows, embedding.release_shape)
        self.num_averaged += 1
        self.average += (released.value - self.average) / self.num_averaged
        if self.num_averaged < self.planned_releases:
            return released, dict(self.generator.named_parameters())
        return released, self.matched(embedding, embedding.class_means(self.average))

    def matched(self, embedding: MeanEmbedding, targets: Tensor) -> dict[str, Tensor]:
        """Return the parameters of a copy of the generator, trained until its images have the target embedding.

        Args:
            embedding: The features.
            targets: Mean features of every class, (classes, 2 J). Released.
        """
        learner = copy.deepcopy(self.generator)
        optimizer = torch.optim.Adam(learner.parameter_groups(self.learning_rate))
        rates = [group["lr"] for group in optimizer.param_groups]
        stream = torch.Generator().manual_seed(self.public_seed)
        labels = torch.arange(learner.num_classes, device=self.device).repeat_interleave(self.images_per_class)
        for step in range(self.train_steps):
            share = 0.02 + 0.98 * (1 + math.cos(math.pi * step / self.train_steps)) / 2
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
            features = embedding.features(learner(learner.sample_latent(len(labels), stream), labels))
            optimizer.zero_grad()
            discrepancy(features.unflatten(0, (learner.num_classes, -1)), targets).backward()
            optimizer.step()
        return dict(learner.named_parameters())


def discrepancy(features: Tensor, targets: Tensor) -> Tensor:
    """Return the squared mean discrepancy, up to a constant and without bias, averaged over classes.

    Pairs of an image with itself are left out: they would reward samples that are too much alike.

    Args:
        features: Unit features of generated images, (classes, n, 2 J), n >= 2.
        targets: Mean features, (classes, 2 J).
    """
    num = features.shape[1]
    sums = features.sum(dim=1)
    among = (sums.square().sum(dim=1) - num) / (num * (num - 1))
    return (among - 2 * (sums * targets.to(sums)).sum(dim=1) / num).mean()

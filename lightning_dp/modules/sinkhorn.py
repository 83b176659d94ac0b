"""DP-Sinkhorn: a generator follows the released gradient of an optimal-transport loss (Cao et al. 2021, Algorithm 1).

What leaves is one vector a step: the gradient of the semi-debiased Sinkhorn loss between a fixed number of generated
images and a Poisson batch of records, with respect to the generated images.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.teachers import RowChunk
from lightning_dp.losses.sinkhorn import SinkhornSolver, cross_term, self_term
from lightning_dp.losses.transport_cost import PointCloud, TransportCost
from lightning_dp.mechanisms.base import ContributionSpec
from lightning_dp.modules.options import check_positive
from lightning_dp.modules.release import PublicRows, Released
from lightning_dp.modules.step_memory import generated_bytes, record_bytes
from lightning_dp.modules.transport import TransportModule
from lightning_dp.networks.basis import PublicBasis
from lightning_dp.networks.generator import Generator

# Purposes of public randomness.
_LATENT, _LABELS, _EXTRA_LATENT = range(3)

# Batches are cut this many standard deviations above their mean: once in 30,000 steps.
_BATCH_DEVIATIONS = 4.0


class DPSinkhorn(TransportModule):
    """A generator trained by the semi-debiased Sinkhorn loss 2 W(X, Y) - W(X, Z) on Poisson batches Y.

    X holds `images_per_step` generated images, whatever the size of the batch, and Z is X with its first images
    replaced by fresh ones of the same labels. Optimal transport couples all records of a batch, so the gradient with
    respect to X is one joint contribution.

    Guarantee: every batch, the empty one too, gives a gradient inside the mechanism's ball of radius C (`batch`), or
    one in the ball for each image (`per_image`, joint radius C sqrt(n)). A record that joins or leaves moves it by at
    most twice that: 2C, and 2C sqrt(n). The sensitivity stands in `ContributionSpec.joint`. The number of records is
    padded to a public size, so no shape or divisor tells it.

    Args:
        generator: The network that leaves.
        basis: Public basis in which images are compared; null compares pixels, as the paper does.
        cost: What it costs to move an image onto another; null is L2^2 + L1 with label scale 15 (the paper, m = 1).
            Pixels are scaled to [-1, 1].
        solver: How transport is solved; null anneals through 13 temperatures down to 0.05, as published.
        expected_batch_size: Mean number of records of a step.
        images_per_step: Generated images n whose gradient is released.
        debias_ratio: Share of the images that the self term replaces by fresh ones, in [0, 1]; 0 biases towards
            collapse.
        clip_scope: batch bounds the gradient of all images together, per_image that of each by itself.
        released_term: loss releases the gradient of the whole loss, as the paper does; cross only that of 2 W(X, Y),
            and the self term, which no record enters, passes the same bound without noise.
        learning_rate: Adam's learning rate.
        weight_decay: Adam's weight decay, >= 0.
        betas: Adam's betas.
        final_learning_rate_share: The learning rate falls along a half cosine to this share of itself; 1 keeps it.
        ema_decay: Decay of the moving average of the generator that is released; 0 releases the last iterate.
        public_seed: Seed of latents and labels; not of the noise, nor of the sampling.

    Raises:
        ConfigurationError: A value is out of range.
    """

    def __init__(
        self,
        generator: Generator,
        basis: PublicBasis | None = None,
        cost: TransportCost | None = None,
        solver: SinkhornSolver | None = None,
        *,
        expected_batch_size: float = 50,
        images_per_step: int = 50,
        debias_ratio: float = 0.2,
        clip_scope: Literal["batch", "per_image"] = "batch",
        released_term: Literal["loss", "cross"] = "loss",
        learning_rate: float = 1e-5,
        weight_decay: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        final_learning_rate_share: float = 1.0,
        ema_decay: float = 0.0,
        public_seed: int = 0,
    ) -> None:
        super().__init__(
            generator,
            basis,
            expected_batch_size=expected_batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            betas=betas,
            final_learning_rate_share=final_learning_rate_share,
            ema_decay=ema_decay,
            public_seed=public_seed,
        )
        check_positive(images_per_step=images_per_step)
        if not 0 <= debias_ratio <= 1:
            raise ConfigurationError(f"Expected 0 <= model.debias_ratio <= 1, got debias_ratio={debias_ratio}.")
        self.cost = TransportCost() if cost is None else cost
        self.solver = SinkhornSolver() if solver is None else solver
        self.images_per_step, self.debias_ratio = images_per_step, debias_ratio
        self.clip_scope, self.released_term = clip_scope, released_term

    # Public facts ----------------------------------------------------------------------------------------------------

    @property
    def release_shape(self) -> tuple[int, int]:
        """(num_vectors, vector_dim) of a release: one vector of all images, or one of each."""
        if self.clip_scope == "batch":
            return 1, self.images_per_step * self.point_dim
        return self.images_per_step, self.point_dim

    @property
    def padded_batch_size(self) -> int:
        """Public number of points that stand for a batch: unused ones have weight zero, what is beyond is left out.

        Leaving records out is free, since every batch stays in the ball.
        """
        wanted = self.expected_batch_size + _BATCH_DEVIATIONS * math.sqrt(self.expected_batch_size)
        return min(math.ceil(wanted), self.facts.num_records)

    @override
    def step_bytes(self) -> dict[str, int]:
        num = self.images_per_step
        costs = 2 * 8 * num * int(self.debias_ratio * num)
        batch = self.padded_batch_size * (record_bytes(self.generator.image_shape) + 8 * num)  # and what each costs
        return {
            f"model.images_per_step={num}": generated_bytes(self.generator, num) + costs,
            f"model.expected_batch_size={self.expected_batch_size:g}": batch,
        }

    @override
    def contribution_spec(self) -> ContributionSpec:
        num_vectors, vector_dim = self.release_shape
        return ContributionSpec.joint(num_vectors=num_vectors, vector_dim=vector_dim)

    # Training --------------------------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        points, labels = self.generated_points()
        generated = PointCloud(points.detach(), labels)
        _, own = self_term(generated, self.images_per_step, cost=self.cost, solver=self.solver)
        # The batch comes together, and one process computes what couples it: the row counts once.
        records = self.ranks.gather(self.draw_records()).sort().values
        rows = self.joint_rows(records, generated[: self.images_per_step], own) if self.ranks.rank == 0 else ()
        released = self.release(rows, self.release_shape)
        self.backward_released(points, self._with_public_part(released, own))
        self.step_optimizer()

    def generated_points(self) -> tuple[Tensor, Tensor]:
        """Return the generated images of this step as points, with labels: n compared with records, then k more.

        The k = debias_ratio n fresh ones have the labels of the first k and a forward pass of their own, so that their
        batch statistics are their own.

        Returns:
            Points, (n + k, point_dim), with a graph to the generator, and labels, (n + k,). Public.
        """
        num, extra = self.images_per_step, int(self.debias_ratio * self.images_per_step)
        stream = self.public_stream(_LABELS)
        labels = torch.randint(self.generator.num_classes, (num,), generator=stream).to(self.device)
        latent = self.generator.sample_latent(num, self.public_stream(_LATENT))
        parts, labels_of_parts = [self.points_of(self.generator(latent, labels))], [labels]
        if extra > 0:
            latent = self.generator.sample_latent(extra, self.public_stream(_EXTRA_LATENT))
            parts.append(self.points_of(self.generator(latent, labels[:extra])))
            labels_of_parts.append(labels[:extra])
        return torch.cat(parts), torch.cat(labels_of_parts)

    def joint_rows(self, records: Tensor, generated: PointCloud, own_gradient: Tensor) -> Iterator[RowChunk]:
        """Yield the one row of a step: the descent direction for the generated points. None for an empty batch.

        Args:
            records: Private indices, int64 on the CPU, (m,); m may be 0.
            generated: X, n points.
            own_gradient: Gradient of the self term, (n or more, point_dim); public.
        """
        if len(records) == 0:
            return  # the release is then pure noise
        _, gradient = cross_term(generated, self._padded(records), cost=self.cost, solver=self.solver)
        if self.released_term == "loss":
            gradient = gradient + own_gradient[: self.images_per_step]
        yield self._as_row(-gradient)

    def _with_public_part(self, released: Released, own_gradient: Tensor) -> Released:
        """Return the direction for all generated points: add what the self term says and no record enters.

        It passes the mechanism's own bound, so that a clipped cross term is not drowned by an unclipped self term. The
        gradient of the k extra points is bounded as a whole, as in the paper.
        """
        num, number = self.images_per_step, released.number
        parts = own_gradient.split(num)
        if self.released_term == "cross":
            kept = self._bounded(-parts[0], number)
            released = released.map(lambda value: value + kept)
        if len(parts) == 1:
            return released
        extra = parts[1].shape[0]
        padded = F.pad(-parts[1], (0, 0, 0, num - extra))
        rest = self._bounded(padded, number).reshape(num, self.point_dim)[:extra]
        return released.map(lambda value: torch.cat([value.reshape(num, self.point_dim), rest]))

    def _bounded(self, direction: Tensor, number: int) -> Tensor:
        # Public: the self term has seen the generator and public draws only.
        rows = PublicRows([self._as_row(direction)])
        return self.reference(rows, self.release_shape, number=number, num_rows=1)

    def _as_row(self, direction: Tensor) -> RowChunk:
        values = direction.reshape(1, *self.release_shape)
        row = torch.zeros(1, dtype=torch.int64, device=values.device)
        return RowChunk(teacher_ids=row, values=values, queries=slice(0, values.shape[1]))

    def _padded(self, records: Tensor) -> PointCloud:
        """Return a batch as weighted points, padded with points of weight zero, or cut, to the public size."""
        size = self.padded_batch_size
        records = records[:size]
        missing = size - len(records)
        log_weights = torch.full((size,), -math.inf, dtype=torch.float64, device=self.device)
        log_weights[: len(records)] = -math.log(len(records))
        points = self.points_of(self.images_of(records))
        return PointCloud(F.pad(points, (0, 0, 0, missing)), F.pad(self.labels_of(records), (0, missing)), log_weights)

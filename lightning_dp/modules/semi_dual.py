"""DP-Sinkhorn by its semi-dual: a release is a sum over records, each clipped by itself, instead of one joint gradient.

The plan of a whole batch couples its records, so a record may turn the joint gradient around, and the noise has to
cover the diameter of the ball whatever the size of the batch. At potentials that are public, every record moves the
generated images by itself, and B records make a signal of B bounds against the same noise.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dp.gradients.parts import Part, Rows
from lightning_dp.gradients.record_gradients import RecordGradients
from lightning_dp.losses.semi_dual import balanced_potentials, directions_to
from lightning_dp.mechanisms.base import ContributionSpec
from lightning_dp.mechanisms.rows import entries_at_once
from lightning_dp.modules.options import check_positive
from lightning_dp.modules.release import PublicRows
from lightning_dp.modules.step_memory import generated_bytes
from lightning_dp.modules.transport import TransportModule
from lightning_dp.networks.basis import PublicBasis
from lightning_dp.networks.generator import Generator

# Purposes of public randomness.
_LATENT, _OTHER_LATENT = range(2)

_ENTRIES = 2**18  # of the rows that are held at a time
_PROJECTED = 4096  # records projected at a time


class SemiDualSinkhorn(TransportModule):
    """A generator that follows the semi-dual of entropic transport, class by class, on Poisson batches.

    Each step draws generated images X, and as many others Z. The potentials f of X in the transport of X to Z are
    public. A record y of class c spreads a mass of one over the images of its class, by the softmax of (f_i - |x_i -
    y|^2) / eps, and sends 2 pi_i (y - x_i) for each of them. The images of Z go through the same formula, clipping
    included, and the difference of the two means is followed. Where X, Z and records are alike it vanishes, and f is
    the potential of the records as well; before, f gives a lower bound of the transport.

    Guarantee: given X and f, which no record enters, a row depends on its own record alone, and on nothing of the
    batch. It is bounded by C; a record that joins or leaves moves the sum by C, one that changes by 2C
    (`ContributionSpec.records`). The divisor is the public expected batch size.

    Differs: Cao et al. (2021) release the gradient of the plan of a whole batch (`DPSinkhorn`), whose noise does not
    fall with the size of the batch.

    Args:
        generator: The network that leaves.
        basis: Public basis in which images are compared; null compares pixels.
        expected_batch_size: Mean number of records of a step.
        images_per_class: Generated images of each class that a step moves.
        entropic_reg: Temperature eps, in units of squared distances of images with pixels in [-1, 1].
        learning_rate: Adam's learning rate.
        weight_decay: Adam's weight decay, >= 0.
        betas: Adam's betas.
        final_learning_rate_share: The learning rate falls along a half cosine to this share of itself; 1 keeps it.
        ema_decay: Decay of the moving average of the generator that is released; 0 releases the last iterate.
        public_seed: Seed of latents; not of the noise, nor of the sampling.

    Raises:
        ConfigurationError: A value is out of range.
    """

    def __init__(
        self,
        generator: Generator,
        basis: PublicBasis | None = None,
        *,
        expected_batch_size: float = 1000,
        images_per_class: int = 10,
        entropic_reg: float = 50.0,
        learning_rate: float = 1e-2,
        weight_decay: float = 0.0,
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
        check_positive(images_per_class=images_per_class, entropic_reg=entropic_reg)
        self.images_per_class, self.entropic_reg = images_per_class, entropic_reg
        self._points: Tensor | None = None  # of all records; private, and no part of a checkpoint

    # Public facts ----------------------------------------------------------------------------------------------------

    @property
    def segments(self) -> tuple[int, ...]:
        """Numbers of a row that belong to each class."""
        return (self.images_per_class * self.point_dim,) * self.generator.num_classes

    @override
    def step_bytes(self) -> dict[str, int]:
        num = self.images_per_class * self.generator.num_classes
        return {f"model.images_per_class={self.images_per_class}": generated_bytes(self.generator, num)}

    @override
    def contribution_spec(self) -> ContributionSpec:
        return ContributionSpec.records(
            expected_batch_size=self.expected_batch_size, vector_dim=sum(self.segments), segments=self.segments
        )

    # Training --------------------------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._points = None  # another run may have other records: theirs must not be charged to these

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        points = self.generated_points(_LATENT)
        moved = points.detach()
        with torch.no_grad():
            others = self.generated_points(_OTHER_LATENT)
        potentials = balanced_potentials(moved, others, entropic_reg=self.entropic_reg)
        shape = (1, sum(self.segments))
        released = self.release(self.record_rows(self.draw_records(), moved, potentials), shape)
        labels = torch.arange(len(others), device=self.device).repeat_interleave(self.images_per_class)
        of_others = self._rows(
            torch.arange(len(labels), device=self.device), others.flatten(0, 1), labels, moved, potentials
        )
        own = self.reference(PublicRows(of_others), shape, number=released.number, num_rows=len(labels))
        self.backward_released(points, released.map(lambda of_records: of_records - own))
        self.step_optimizer()

    def generated_points(self, purpose: int) -> Tensor:
        """Return generated images of this step as points, (classes, images_per_class, point_dim). Public."""
        classes, per_class = self.generator.num_classes, self.images_per_class
        labels = torch.arange(classes, device=self.device).repeat_interleave(per_class)
        latent = self.generator.sample_latent(len(labels), self.public_stream(purpose))
        return self.points_of(self.generator(latent, labels)).unflatten(0, (classes, per_class))

    def record_rows(self, records: Tensor, points: Tensor, potentials: Tensor) -> Iterator[RecordGradients]:
        """Yield how each record moves the generated points: non-zero for the points of its own class only.

        Args:
            records: Private indices, int64 on the CPU, (n,); n may be 0.
            points: X, (classes, images_per_class, point_dim); public.
            potentials: f, (classes, images_per_class); public.
        """
        if len(records):
            targets, labels = self.record_points(records), self.labels_of(records)
            yield from self._rows(records.to(self.device), targets, labels, points, potentials)

    def record_points(self, ids: Tensor) -> Tensor:
        """Return the points of records, (n, point_dim). Private.

        They are computed once for all records, in parts of a public size: a matrix product of a batch rounds a record
        in a way that depends on how many others are in it.

        Args:
            ids: Private indices, int64 on the CPU, (n,).
        """
        if self.basis is None:
            return self.points_of(self.images_of(ids))
        if self._points is None:
            parts = torch.arange(self.facts.num_records).split(_PROJECTED)
            self._points = torch.cat([self.points_of(self.images_of(part)) for part in parts])
        return self._points[ids.to(self._points.device)]

    def _rows(
        self, ids: Tensor, targets: Tensor, labels: Tensor, points: Tensor, potentials: Tensor
    ) -> Iterator[RecordGradients]:
        sizes = list(self.segments)
        at_once = max(1, entries_at_once(_ENTRIES, targets.device) // sizes[0])
        for label in range(len(points)):
            for mine in (labels == label).nonzero()[:, 0].split(at_once):
                rows = directions_to(points[label], potentials[label], targets[mine], entropic_reg=self.entropic_reg)
                parts: list[list[Part]] = [[] for _ in sizes]
                parts[label] = [Rows(rows.flatten(1))]
                yield RecordGradients(ids[mine], parts, sizes)

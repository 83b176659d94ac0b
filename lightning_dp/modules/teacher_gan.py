"""Teacher-ensemble GAN: teachers of disjoint shards judge fake images; the generator follows their private aggregate.

DataLens (Wang et al. 2021, CCS, Algorithm 1) with mechanism TopAgg and discriminator teachers; G-PATE with GNMax;
GS-WGAN with Gaussian and Wasserstein critics, few of which judge at a time. What leaves is, per fake image, one
released direction in the generator's output space.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.accounting.events import Sampling
from lightning_dp.errors import ConfigurationError, PrivacyProtocolError
from lightning_dp.gradients.energy_teachers import DirectionChunk, PublicShapes
from lightning_dp.gradients.poisson import PoissonSampler
from lightning_dp.gradients.teachers import RowChunk, TeacherEnsemble, TeacherShards
from lightning_dp.mechanisms.base import ContributionSpec
from lightning_dp.modules.averaged import AveragedModule
from lightning_dp.modules.imitation import imitate
from lightning_dp.modules.options import check_betas, check_positive, check_share
from lightning_dp.modules.public_facts import PublicFacts
from lightning_dp.modules.release import PublicRows, PublicSamples
from lightning_dp.modules.schedule import with_cosine_schedule
from lightning_dp.modules.step_memory import generated_bytes
from lightning_dp.networks.basis import PublicBasis
from lightning_dp.networks.generator import Generator

# Purposes of public randomness; each has a stream of its own.
_LATENT, _LABELS, _TEACHER_LATENT, _POOL = range(4)


class TeacherEnsembleGAN(AveragedModule):
    """A generator that learns from the released votes of teachers on disjoint shards.

    Guarantee: a record reaches one teacher (class-wise: one per label it may have), whose rows the mechanism bounds;
    all else that the generator sees is public or released. The sensitivity stands in `ContributionSpec.teachers`,
    `ContributionSpec.class_wise_teachers` and `ContributionSpec.sampled_teachers`.

    Args:
        generator: The network that leaves.
        teachers: The ensemble; its records, parameters and optimizer states stay.
        basis: Public basis in which teachers judge images; null judges pixels, as the paper does.
        images_per_step: Fake images judged in one release.
        expected_judges: Mean number of teachers that judge in a release, each by a secret coin of its own; null lets
            all of them. Teachers are trained alike whether they judge or not: what the coins were worth would be lost
            if a teacher's state told that it had judged before.
        accounting: joint charges the images of a release as the one vector that they are. per_image charges one image
            instead of all, as the published program of GS-WGAN does; that holds for no run in which the images share
            their judges, so the claim is UNVERIFIED and states no epsilon.
        partition: How records are dealt to teachers: a fixed permutation of slots, or a keyed hash of record ids.
        partition_key: Public key of the partition.
        step_size: Scale of the released direction (alpha of the paper; Adam makes it nearly irrelevant).
        repulsion: Weight of the public half of the energy distance: fakes of one label push each other apart. Only
            generated images enter it. 0 leaves it out, as discriminator teachers want.
        pool_per_class: Fakes of each label that do the pushing.
        learning_rate: Adam's learning rate for the generator.
        betas: Adam's betas.
        final_learning_rate_share: The learning rate falls along a half cosine to this share of itself; 1 keeps it.
        ema_decay: Decay of the moving average of the generator that is released; 0 releases the last iterate.
        public_seed: Seed of latents, labels and teachers' initial weights; not of the noise. The command line sets it
            to seed_everything.

    Raises:
        ConfigurationError: A value is out of range, or generator and teachers do not fit.
    """

    def __init__(
        self,
        generator: Generator,
        teachers: TeacherEnsemble,
        basis: PublicBasis | None = None,
        *,
        images_per_step: int = 30,
        expected_judges: float | None = None,
        accounting: Literal["joint", "per_image"] = "joint",
        partition: Literal["permutation", "hash"] = "permutation",
        partition_key: int = 0,
        step_size: float = 1e-3,
        repulsion: float = 0.0,
        pool_per_class: int = 100,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.5, 0.999),
        final_learning_rate_share: float = 1.0,
        ema_decay: float = 0.0,
        public_seed: int = 0,
    ) -> None:
        super().__init__(ema_decay=ema_decay)
        check_positive(
            images_per_step=images_per_step,
            step_size=step_size,
            learning_rate=learning_rate,
            pool_per_class=pool_per_class,
            expected_judges=1 if expected_judges is None else expected_judges,
        )
        check_betas(betas)
        check_share(final_learning_rate_share=final_learning_rate_share)
        if not (math.isfinite(repulsion) and repulsion >= 0):
            raise ConfigurationError(f"Expected model.repulsion >= 0, got {repulsion=}.")
        self.generator = generator
        self.keep_average(generator)
        self.teachers = teachers
        self.basis = basis
        self.images_per_step = images_per_step
        self.expected_judges = expected_judges
        self.accounting = accounting
        self.partition: Literal["permutation", "hash"] = partition
        self.partition_key = partition_key
        self.step_size = step_size
        self.repulsion = repulsion
        self.pool_per_class = pool_per_class
        self.learning_rate = learning_rate
        self.betas = betas
        self.final_learning_rate_share = final_learning_rate_share
        self.public_seed = public_seed
        self._sampler: PoissonSampler | None = None
        self._class_wise = teachers.row_structure(images_per_step).class_wise
        if self._class_wise and (expected_judges is not None or accounting != "joint"):
            raise ConfigurationError(
                f"{type(teachers).__name__} all judge, and are charged jointly; leave {expected_judges=} and "
                f"{accounting=} out, or choose DiscriminatorTeachers."
            )
        if self._class_wise and images_per_step % generator.num_classes:
            raise ConfigurationError(
                f"Expected model.images_per_step to be a multiple of the {generator.num_classes} classes, got "
                f"{images_per_step=}: class-wise teachers judge a fixed number of images per class."
            )

    # Public facts ----------------------------------------------------------------------------------------------------

    @override
    def describe_data(self, data: PublicFacts) -> None:
        super().describe_data(data)
        data.teacher_partition(self._num_teachers, method=self.partition, key=self.partition_key)
        if self.expected_judges is not None and self.expected_judges > self._num_teachers:
            raise ConfigurationError(
                f"Expected model.expected_judges <= {self._num_teachers}, the number of teachers, got "
                f"expected_judges={self.expected_judges}."
            )

    @property
    @override
    def sampling(self) -> Sampling:
        if self.expected_judges is None:
            return super().sampling
        return Sampling(scheme="poisson", rate=self.expected_judges / self._num_teachers)

    @property
    @override
    def unverified(self) -> tuple[str, ...]:
        if self.accounting == "joint":
            return ()
        return (
            "that each image of a release is judged by teachers drawn for it alone, as the published accounting of "
            "GS-WGAN takes it; here, as there, all images share their judges",
        )

    @override
    def public_plan(self) -> dict[str, Any]:
        # Another partition in mid-run would put a record into two trained teachers.
        return super().public_plan() | {
            "teachers": type(self.teachers).__name__,
            "num_teachers": self._num_teachers,
            "partition": self.partition,
            "partition_key": self.partition_key,
            "images_per_step": self.images_per_step,
            "vector_dim": self.vector_dim,
        }

    @override
    def step_bytes(self) -> dict[str, int]:
        num, num_classes = self.images_per_step, self.generator.num_classes
        rows = self.teachers.row_bytes(
            num, self.vector_dim, num_records=self.facts.num_records, num_classes=num_classes
        )
        needs = {f"model.images_per_step={num}": generated_bytes(self.generator, num) + rows}
        if self.repulsion > 0:
            pushes = 4 * self.pool_per_class * (num // num_classes) * self.vector_dim
            needs[f"model.pool_per_class={self.pool_per_class}"] = pushes
        return needs

    @override
    def kept_bytes(self, device: torch.device) -> dict[str, int]:
        shape = self.generator.image_shape if self.basis is None else (self.basis.dim,)
        kept = self.teachers.state_bytes(shape, num_classes=self.generator.num_classes, device=device)
        return {f"model.teachers.num_teachers={self.teachers.num_teachers}": kept}

    @property
    def vector_dim(self) -> int:
        """Length of the vector that teachers judge for one image."""
        return self.basis.dim if self.basis is not None else math.prod(self.generator.image_shape)

    @property
    def _num_teachers(self) -> int:
        return self.teachers.num_teachers or self.facts.num_records

    @override
    def contribution_spec(self) -> ContributionSpec:
        structure = self.teachers.row_structure(self.images_per_step)
        if structure.class_wise:
            return ContributionSpec.class_wise_teachers(
                num_teachers=self._num_teachers,
                num_classes=self.generator.num_classes,
                images_per_class=self.images_per_step // self.generator.num_classes,
                vector_dim=self.vector_dim,
                single_record=structure.single_record,
            )
        charged = structure.images_per_row if self.accounting == "joint" else 1
        if self.expected_judges is not None:
            spec = ContributionSpec.sampled_teachers(
                num_teachers=self._num_teachers,
                expected_judges=self.expected_judges,
                vectors_per_row=charged,
                vector_dim=self.vector_dim,
            )
        else:
            spec = ContributionSpec.teachers(
                num_teachers=self._num_teachers, vectors_per_row=charged, vector_dim=self.vector_dim
            )
        if self.accounting == "per_image":
            return replace(spec, num_vectors=self.images_per_step, is_undercharged=True)
        return spec

    @override
    def released_networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator}

    @override
    def released_generator(self) -> Generator:
        """Return the generator that is sampled and published: the average if there is one."""
        return self.averaged(self.generator)

    # Training --------------------------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        partition = data.teacher_partition(self._num_teachers, method=self.partition, key=self.partition_key)
        shards = TeacherShards(data.train_images, data.train_labels, partition.assignment, self._num_teachers)
        # Lightning moves the module only later; the teachers are bound where it will work.
        device = self.trainer.strategy.root_device
        self.to(device)
        self.teachers.bind(
            shards,
            num_classes=data.num_classes,
            image_shape=data.image_shape,
            device=device,
            seed=self.public_seed,
            encode=self.basis,
            ranks=self.ranks,
        )
        if self.expected_judges is not None:
            # New coins at every start of a process: a resumed run must not draw the judges of the first again.
            self._sampler = PoissonSampler(
                self._num_teachers,
                self.sampling.rate,
                insecure_seed=self.insecure_seed,
                owned=self.ranks.owned(self._num_teachers),
            )

    def draw_judges(self) -> Tensor | None:
        """Return which owned teachers judge in this step, private indices, possibly none; None if all do."""
        if self.expected_judges is None:
            return None
        if self._sampler is None:
            raise PrivacyProtocolError("Judges are drawn after setup(), which the trainer calls.")
        return self._sampler.draw()

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.Adam(self.generator.parameter_groups(self.learning_rate), betas=self.betas)
        return with_cosine_schedule(
            optimizer, num_steps=self.planned_releases, final_share=self.final_learning_rate_share
        )

    @override
    def learn_from_samples(self, samples: PublicSamples, *, steps: int, learning_rate: float, seed: int) -> None:
        imitate(self.generator, samples, steps=steps, learning_rate=learning_rate, seed=seed)
        self.start_average()

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.teachers.train(self._teacher_fakes, step=self._round)
        labels = self._public_labels()
        latent = self.generator.sample_latent(self.images_per_step, self._public_stream(_LATENT))
        fakes = self._judged(self.generator(latent, labels))  # (B, d), or (B, C, H, W) without a basis
        rows = self.teachers.row_chunks(fakes.detach(), labels, self.draw_judges())
        shape = (self.images_per_step, self.vector_dim)
        released = self.release(rows, shape)
        if self.repulsion > 0:
            pushes = PublicRows(self._pool_rows(fakes.detach(), labels))
            pushed = self.reference(pushes, shape, number=released.number, num_rows=self.pool_per_class)
            released = released.map(lambda value: value - self.repulsion * pushed)
        self.backward_released(fakes, released.map(lambda value: self.step_size * value))
        self.step_optimizer()

    def _pool_rows(self, fakes: Tensor, labels: Tensor) -> Iterator[RowChunk]:
        """Yield the unit vectors from each fake to fresh fakes of its label: public rows."""
        classes = torch.arange(self.generator.num_classes, device=fakes.device)
        pool_labels = classes.repeat_interleave(self.pool_per_class)
        latent = self.generator.sample_latent(len(pool_labels), self._public_stream(_POOL))
        with torch.no_grad():
            pool = self._judged(self.generator(latent, pool_labels)).flatten(1)
        shapes, ids = PublicShapes(pool, fakes.flatten(1)), torch.arange(self.pool_per_class, device=fakes.device)
        runs, lengths = torch.unique_consecutive(labels, return_counts=True)
        start = 0
        for label, length in zip(runs.tolist(), lengths.tolist(), strict=True):
            queries = slice(start, start + length)
            selected = ids + label * self.pool_per_class
            yield DirectionChunk(ids, queries, shapes=shapes, selected=selected, is_mean=False)
            start += length

    def _judged(self, images: Tensor) -> Tensor:
        judged: Tensor = images if self.basis is None else self.basis(images)
        return judged

    def _teacher_fakes(self, labels: Tensor) -> Tensor:
        latent = self.generator.sample_latent(len(labels), self._public_stream(_TEACHER_LATENT))
        with torch.no_grad():
            return self._judged(self.generator(latent, labels))

    def _public_labels(self) -> Tensor:
        """Return labels of the fakes: a fixed number of each for class-wise teachers, else uniform draws."""
        num_classes = self.generator.num_classes
        if self._class_wise:
            per_class = self.images_per_step // num_classes
            return torch.arange(num_classes, device=self.device).repeat_interleave(per_class)
        stream = self._public_stream(_LABELS)
        return torch.randint(num_classes, (self.images_per_step,), generator=stream).to(self.device)

    def _public_stream(self, purpose: int) -> torch.Generator:
        seed = ((self.public_seed * 1_000_003 + self._round) * 4 + purpose) % 2**63
        return torch.Generator().manual_seed(seed)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["teachers"] = self.teachers.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.teachers.load_state_dict(checkpoint["teachers"])

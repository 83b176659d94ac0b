"""PATE-GAN (Jordon et al. 2019): teachers vote on fakes, a student learns the noisy votes, the generator its student.

What leaves in a step is one noisy count of votes for each fake of a batch. The student sees fakes and noisy labels
only, so the student, the generator that it teaches, and all that follows are post-processing.
"""

from collections import deque
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.gradients.discriminator_teachers import DiscriminatorTeachers
from lightning_dp.mechanisms.base import ContributionSpec
from lightning_dp.modules.options import check_positive
from lightning_dp.modules.public_facts import PublicFacts
from lightning_dp.modules.release import Released
from lightning_dp.modules.step_memory import generated_bytes
from lightning_dp.modules.teacher_gan import TeacherEnsembleGAN
from lightning_dp.networks.basis import PublicBasis
from lightning_dp.networks.discriminator import Discriminator
from lightning_dp.networks.generator import Generator

# Purposes of public randomness beside those of the ensemble (0 to 3).
_VOTED_LATENT, _MEMORY, _GENERATOR_LATENT = 4, 5, 6


class PATEGAN(TeacherEnsembleGAN):
    """A generator that learns from a student, who learns from noisy votes of teachers on disjoint shards.

    Guarantee: a record reaches one teacher, whose B votes (+1 real, -1 fake) on the fakes of a step may all turn: 2
    sqrt(B) in the sum of votes, the same price as B changes of one vote. The whole noisy count is charged, whatever it
    shows.

    Differs: Jordon et al. draw Laplace noise and account by moments that depend on the raw votes, so that their epsilon
    is private itself and a bound of nothing that may be published; the price here depends on no record, and Gaussian
    noise composes over many votes at a fraction of the cost. Fakes have class labels, teachers keep their networks
    between rounds, and older noisy votes are shown again, all of which is free.

    Args:
        generator: The network that leaves.
        student: Judges what teachers judge; it may leave too, but stays.
        teachers: The ensemble; its records, parameters and optimizer states stay.
        basis: Public basis in which teachers and student judge images; null judges pixels.
        images_per_step: Fakes that are voted on in one release.
        votes: What a teacher votes on. real: whether it takes a fake for a record (the paper). above_mean: whether a
            fake looks more real to it than its mean fake of the same class and step, which also tells fakes apart while
            every teacher knows all of them from records. A vote is one bit either way, and costs the same.
        student_steps: Steps of the student for each release, >= 1, the first on the newest votes.
        memory: Releases whose votes are shown to the student, >= 1; a resumed run begins with none.
        generator_steps: Steps of the generator for each release, >= 1.
        partition: How records are dealt to teachers: a fixed permutation of slots, or a keyed hash of record ids.
        partition_key: Public key of the partition.
        learning_rate: Adam's learning rate for the generator.
        student_learning_rate: Adam's learning rate for the student.
        betas: Adam's betas for both.
        final_learning_rate_share: The generator's learning rate falls along a half cosine to this share of itself.
        ema_decay: Decay of the moving average of the generator that is released; 0 releases the last iterate.
        public_seed: Seed of latents, labels and teachers' initial weights; not of the noise.

    Raises:
        ConfigurationError: A value is out of range, or the networks do not fit.
    """

    teachers: DiscriminatorTeachers

    def __init__(
        self,
        generator: Generator,
        student: Discriminator,
        teachers: DiscriminatorTeachers,
        basis: PublicBasis | None = None,
        *,
        images_per_step: int = 100,
        votes: Literal["real", "above_mean"] = "real",
        student_steps: int = 5,
        memory: int = 20,
        generator_steps: int = 1,
        partition: Literal["permutation", "hash"] = "permutation",
        partition_key: int = 0,
        learning_rate: float = 1e-3,
        student_learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.5, 0.999),
        final_learning_rate_share: float = 1.0,
        ema_decay: float = 0.0,
        public_seed: int = 0,
    ) -> None:
        check_positive(
            student_steps=student_steps,
            memory=memory,
            generator_steps=generator_steps,
            student_learning_rate=student_learning_rate,
        )
        super().__init__(
            generator,
            teachers,
            basis,
            images_per_step=images_per_step,
            partition=partition,
            partition_key=partition_key,
            learning_rate=learning_rate,
            betas=betas,
            final_learning_rate_share=final_learning_rate_share,
            ema_decay=ema_decay,
            public_seed=public_seed,
        )
        self.student = student
        self.votes = votes
        self.student_steps, self.generator_steps = student_steps, generator_steps
        self.student_learning_rate = student_learning_rate
        self._memory: deque[tuple[Tensor, Tensor, Released]] = deque(maxlen=memory)

    # Public facts ----------------------------------------------------------------------------------------------------

    @override
    def describe_data(self, data: PublicFacts) -> None:
        super().describe_data(data)
        judged = self._judged(torch.zeros(2, *data.image_shape, device=self.device))
        self.student.check_takes(judged, data.num_classes, where="model.student")

    @override
    def step_bytes(self) -> dict[str, int]:
        num = self.images_per_step
        return {f"model.images_per_step={num}": generated_bytes(self.generator, num)}

    @override
    def contribution_spec(self) -> ContributionSpec:
        return ContributionSpec.teachers(
            num_teachers=self._num_teachers, vectors_per_row=self.images_per_step, vector_dim=1
        )

    @override
    def released_networks(self) -> dict[str, nn.Module]:
        """Return generator and student: neither steps on anything but what was released."""
        return {"generator": self.generator, "student": self.student}

    # Training --------------------------------------------------------------------------------------------------------

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        planned: Any = super().configure_optimizers()
        student = torch.optim.Adam(self.student.parameters(), lr=self.student_learning_rate, betas=self.betas)
        return [*planned[0], student], planned[1]

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, student = self.optimizers()  # type: ignore[attr-defined]
        self.teachers.train(self._teacher_fakes, step=self._round)
        labels = self._public_labels()
        with torch.no_grad():
            latent = self.generator.sample_latent(self.images_per_step, self._public_stream(_VOTED_LATENT))
            fakes = self._judged(self.generator(latent, labels))
        votes = self.teachers.vote_chunks(fakes, labels, is_relative=self.votes == "above_mean")
        released = self.release(votes, (self.images_per_step, 1))
        self._memory.append((fakes, labels, released))
        shown = torch.randint(len(self._memory), (self.student_steps,), generator=self._public_stream(_MEMORY))
        for place in [len(self._memory) - 1, *shown[1:].tolist()]:
            # The inner optimizer: Lightning's would count the step, and end the run before its last release.
            self.train_student(student.optimizer, *self._memory[place])
        for step in range(self.generator_steps):
            self._lead_generator(released, labels, part=step)
            (generator if step == 0 else generator.optimizer).step()
        self.step_schedule()
        self.finish_step()

    def train_student(
        self, optimizer: torch.optim.Optimizer, fakes: Tensor, labels: Tensor, released: Released
    ) -> None:
        """Take one step of the student on noisy labels: what it learns from is released.

        Args:
            optimizer: The student's.
            fakes: What was voted on, (B, *judged_shape), public.
            labels: Their labels, (B,), public.
            released: The noisy votes, (B, 1).
        """
        logits = self.student(fakes, F.one_hot(labels, self.generator.num_classes).to(fakes))

        def descent(votes: Tensor) -> Tensor:
            """Return minus the gradient of the mean cross-entropy with respect to the logits."""
            answered = votes.flatten() != 0  # by GNMax; the others teach nothing
            return ((votes.flatten() > 0).to(votes) - logits.detach().sigmoid()) * answered / len(labels)

        self.backward_released(logits, released.map(descent))
        optimizer.step()

    def _lead_generator(self, released: Released, labels: Tensor, *, part: int) -> None:
        """Give the generator the gradient of -log of the student's belief in fresh fakes: post-processing."""
        latent = self.generator.sample_latent(self.images_per_step, self._public_stream(_GENERATOR_LATENT + part))
        images = self.generator(latent, labels)
        seen = images.detach().requires_grad_()
        logits = self.student(self._judged(seen), F.one_hot(labels, self.generator.num_classes).to(seen))
        (slope,) = torch.autograd.grad(F.softplus(-logits).mean(), seen)
        self.backward_released(images, released.map(lambda _: -slope))

    @override
    def _public_stream(self, purpose: int) -> torch.Generator:
        seed = ((self.public_seed * 1_000_003 + self._round) * 64 + purpose) % 2**63
        return torch.Generator().manual_seed(seed)

"""DP-GAN: a critic trained on clipped, noised per-record gradients, and a generator that learns from it for free."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.gradients.per_record import RecordLoss, trainable_parameters
from lightning_dp.gradients.record_gradients import RecordChunk
from lightning_dp.gradients.source import GradientMode
from lightning_dp.mechanisms.base import ContributionSpec
from lightning_dp.modules.critic_schedule import LADDER, CriticSchedule
from lightning_dp.modules.imitation import batches, descend, imitate
from lightning_dp.modules.options import check_betas, check_positive
from lightning_dp.modules.public_facts import PublicFacts
from lightning_dp.modules.records import RecordModule
from lightning_dp.modules.release import PublicRows, PublicSamples, Released
from lightning_dp.modules.step_memory import generated_bytes
from lightning_dp.networks.basis import PublicBasis
from lightning_dp.networks.discriminator import Discriminator
from lightning_dp.networks.generator import Generator
from lightning_dp.networks.vae import one_hot

# Purposes of public randomness; each has a stream of its own.
_CRITIC_FAKES, _GENERATOR_FAKES = range(2)


class DPGAN(RecordModule):
    """The recipe of Bie et al. (2023): many critic steps, few generator steps, and fewer still when noise demands it.

    A training step is one critic step: the released mean of the clipped gradients of records, and the mean of equally
    clipped gradients of public fakes, half of each. After enough of them, the generator takes one non-saturating step
    against the critic.

    Guarantee: only critic steps see records, each record in the one row that is its own gradient. Fakes are public, so
    their half costs nothing; generator, schedule and moving average are computed from the released critic alone, and
    the guard lets the generator step on nothing but what came back through that critic, from fakes.

    Differs: the fakes' gradients are added after the noise instead of before it, which is the same sum.

    Args:
        generator: The generator that leaves.
        critic: The critic; it is private by its training, and stays.
        basis: Public coordinates in which the critic judges; null means the images themselves. Fewer coordinates make a
            smaller critic, which the same noise hurts less.
        expected_batch_size: Mean number of records of a critic step.
        fakes_per_step: Fakes of a critic step and of a generator step; null takes the expected batch size.
        critic_ladder: Critic steps for each generator step; a single number fixes it, a rising list is climbed.
        threshold: Climb when the critic's averaged accuracy on fakes is at most this.
        grace: Generator steps on a rung before the next may be reached.
        learning_rate: Adam's learning rate for the critic.
        generator_learning_rate: Adam's learning rate for the generator; null takes that of the critic.
        betas: Adam's betas for both.
        ema_decay: Decay of the moving average of the generator that is released; 0 releases the last iterate.
        chunk_size: Records whose gradients are held at a time (the physical batch); null fits it to cache and memory.
        gradients: How per-record gradients are made: functorch differentiates record by record, materialize forms a row
            for each, ghost forms norms and sums without rows where it can, auto is the fastest; speed and memory only.
        public_seed: Seed of latents and labels; not of the noise, nor of the sampling.

    Raises:
        ConfigurationError: A value is out of range.
    """

    def __init__(
        self,
        generator: Generator,
        critic: Discriminator,
        basis: PublicBasis | None = None,
        *,
        expected_batch_size: float = 512,
        fakes_per_step: int | None = None,
        critic_ladder: tuple[int, ...] = LADDER,
        threshold: float = 0.6,
        grace: int = 200,
        learning_rate: float = 2e-4,
        generator_learning_rate: float | None = None,
        betas: tuple[float, float] = (0.5, 0.999),
        ema_decay: float = 0.0,
        chunk_size: int | None = None,
        gradients: GradientMode = "auto",
        public_seed: int = 0,
    ) -> None:
        super().__init__(
            expected_batch_size=expected_batch_size,
            chunk_size=chunk_size,
            gradients=gradients,
            public_seed=public_seed,
            ema_decay=ema_decay,
        )
        self.num_fakes = fakes_per_step if fakes_per_step is not None else max(1, round(expected_batch_size))
        self.generator_learning_rate = learning_rate if generator_learning_rate is None else generator_learning_rate
        check_positive(
            fakes_per_step=self.num_fakes,
            learning_rate=learning_rate,
            generator_learning_rate=self.generator_learning_rate,
        )
        check_betas(betas)
        self.generator = generator
        self.critic, self.basis = critic, basis
        self.keep_average(generator)
        self.schedule = CriticSchedule(ladder=tuple(critic_ladder), threshold=threshold, grace=grace)
        self.learning_rate, self.betas = learning_rate, betas

    # Public facts ----------------------------------------------------------------------------------------------------

    @override
    def describe_data(self, data: PublicFacts) -> None:
        super().describe_data(data)
        seen = self._seen(torch.zeros(2, *data.image_shape, device=self.device))
        self.critic.check_takes(seen, data.num_classes, where="model.critic")

    @override
    def step_bytes(self) -> dict[str, int]:
        fakes = {f"model.fakes_per_step={self.num_fakes}": generated_bytes(self.generator, self.num_fakes)}
        return {**super().step_bytes(), **fakes}

    @override
    def contribution_spec(self) -> ContributionSpec:
        return self.record_spec(self.critic)

    @override
    def released_networks(self) -> dict[str, nn.Module]:
        """Return generator and critic: neither steps on anything but what was released, or follows from it."""
        return {"generator": self.generator, "critic": self.critic}

    @override
    def networks_of_records(self) -> dict[str, nn.Module]:
        return {"critic": self.critic}

    @override
    def released_generator(self) -> Generator:
        """Return the generator that is sampled and published: the average if there is one."""
        return self.averaged(self.generator)

    # Training --------------------------------------------------------------------------------------------------------

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = list(trainable_parameters(self.critic).values())
        groups = self.generator.parameter_groups(self.generator_learning_rate)
        return [
            torch.optim.Adam(parameters, lr=self.learning_rate, betas=self.betas),
            torch.optim.Adam(groups, lr=self.generator_learning_rate, betas=self.betas),
        ]

    @override
    def learn_from_samples(self, samples: PublicSamples, *, steps: int, learning_rate: float, seed: int) -> None:
        """Let the generator imitate the samples, then the critic tell its fakes from them."""
        imitate(self.generator, samples, steps=steps, learning_rate=learning_rate, seed=seed)
        self.start_average()
        draw, stream = batches(samples, seed=seed), torch.Generator().manual_seed(seed)

        def loss() -> Tensor:
            images, labels = draw()
            with torch.no_grad():
                fakes = self.generator(self.generator.sample_latent(len(labels), stream), labels)
            told = one_hot(labels, self.generator.num_classes)
            seen, made = self._seen(images), self._seen(fakes)
            return (F.softplus(-self.critic(seen, told)) + F.softplus(self.critic(made, told))).mean()

        parameters = list(trainable_parameters(self.critic).values())
        descend(loss, [{"params": parameters, "lr": self.learning_rate}], steps=steps)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        critic, generator = self.optimizers()  # type: ignore[attr-defined]
        parameters = trainable_parameters(self.critic).values()
        shape = (1, sum(parameter.numel() for parameter in parameters))
        released = self.release(self.record_rows(self.draw_records()), shape)
        fakes = PublicRows(self._fake_rows(), is_share=True)
        of_fakes = self.reference(fakes, shape, number=released.number, num_rows=self.num_fakes)
        self.assign_released(parameters, released.map(lambda of_records: (of_records + of_fakes) / 2))
        critic.step()
        is_due = self.schedule.after_critic_step()
        if is_due:
            # The inner optimizer: Lightning's would count the step, and end the run before its last release.
            self._train_generator(generator.optimizer, released)
        self.finish_step(with_average=is_due)

    @override
    def record_loss_of(self) -> tuple[nn.Module, RecordLoss]:
        return self.critic, self._loss_of_record

    @override
    def record_batch(self, ids: Tensor) -> tuple[Tensor, ...]:
        return self._seen(self.images_of(ids)), self.labels_of(ids)

    def _seen(self, images: Tensor) -> Tensor:
        """Return images as the critic sees them, each by itself."""
        return images if self.basis is None else self.basis(images)

    def _loss_of_record(self, critic: nn.Module, image: Tensor, label: Tensor) -> Tensor:
        """Return -log of the probability that the critic gives to "real", of one image as it sees it."""
        return F.softplus(-critic(image, one_hot(label, self.generator.num_classes))).sum()

    def _loss_of_fake(self, critic: nn.Module, image: Tensor, label: Tensor) -> Tensor:
        """Return -log of the probability that the critic gives to "fake", of one image as it sees it."""
        return F.softplus(critic(image, one_hot(label, self.generator.num_classes))).sum()

    def _fake_rows(self) -> Iterator[RecordChunk]:
        """Yield the critic's gradients at this process' share of public fakes: public rows."""
        with torch.no_grad():
            fakes, labels = self._fakes(_CRITIC_FAKES)
            fakes = self._seen(fakes)
        at_once = self.source.records_at_once(self.critic, self._loss_of_fake, (fakes, labels))
        mine = torch.tensor(self.ranks.owned(self.num_fakes), dtype=torch.int64, device=self.device)
        for ids in mine.split(at_once):
            batch = (fakes[ids], labels[ids])
            yield from self.source.gradients(self.critic, self._loss_of_fake, batch, ids=ids)

    def _fakes(self, purpose: int) -> tuple[Tensor, Tensor]:
        """Return fakes with uniform labels; public, as latents and labels are, and the generator."""
        stream = self.public_stream(purpose)
        labels = torch.randint(self.generator.num_classes, (self.num_fakes,), generator=stream).to(self.device)
        return self.generator(self.generator.sample_latent(self.num_fakes, stream), labels), labels

    def _train_generator(self, optimizer: torch.optim.Optimizer, released: Released) -> None:
        """Take one generator step against the critic, which is released: no record is seen.

        Args:
            optimizer: The generator's.
            released: The release that the critic has stepped on; what follows is its post-processing.
        """
        fakes, labels = self._fakes(_GENERATOR_FAKES)
        seen = fakes.detach().requires_grad_()
        logits = self.critic(self._seen(seen), one_hot(labels, self.generator.num_classes))
        accuracy = (logits.detach() < 0).float().mean()
        self.ranks.same([accuracy])
        self.schedule.before_generator_step(accuracy.item())
        (slope,) = torch.autograd.grad(F.softplus(-logits).mean(), seen)
        self.backward_released(fakes, released.map(lambda _: -slope))
        optimizer.step()
        self.log("public/critic_steps", float(self.schedule.critic_steps))
        self.log("public/fake_accuracy", float(self.schedule.fake_accuracy or 0.0))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["critic_schedule"] = self.schedule.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.schedule.load_state_dict(checkpoint["critic_schedule"])

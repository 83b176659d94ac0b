"""What every method shares that sees Poisson-sampled records: sampler, rate, public randomness, schedule."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from lightning_dp.accounting.events import Sampling
from lightning_dp.errors import ConfigurationError, PrivacyProtocolError
from lightning_dp.gradients.per_record import RecordLoss, row_segments, trainable_parameters
from lightning_dp.gradients.poisson import PoissonSampler
from lightning_dp.gradients.record_gradients import RecordChunk
from lightning_dp.gradients.source import GradientMode, GradientSource
from lightning_dp.mechanisms.base import ContributionSpec
from lightning_dp.modules.base import PrivateModule, PublicFacts
from lightning_dp.networks.ema import ExponentialMovingAverage

Network = TypeVar("Network", bound=nn.Module)

_MIX = 0x9E3779B97F4A7C15  # spreads consecutive step numbers over the seeds of keyed draws


class PoissonModule(PrivateModule):
    """A method in which each step sees every record with the same small probability, by its own coin.

    Guarantee: realised batches are never counted, logged, or divided by; an empty one is released like any other.

    Args:
        expected_batch_size: Mean number of records of a step, > 0; over the number of records, the sampling rate.
        public_seed: Seed of what is public or belongs to a record by its id (latents, labels of fakes, views of an
            image); not of the noise and not of the sampling. The command line sets it to seed_everything.
        ema_decay: Decay of the moving average of what is published, in [0, 1); 0 keeps none.

    Raises:
        ConfigurationError: A value is out of range.
    """

    def __init__(self, *, expected_batch_size: float, public_seed: int, ema_decay: float = 0.0) -> None:
        super().__init__()
        check_positive(expected_batch_size=expected_batch_size)
        check_decay(ema_decay=ema_decay)
        self.expected_batch_size = expected_batch_size
        self.public_seed = public_seed
        self.ema_decay = ema_decay
        self.average: ExponentialMovingAverage | None = None
        self._followed: Callable[[], nn.Module]
        self._round = 0
        self._sampler: PoissonSampler | None = None

    # Public facts ----------------------------------------------------------------------------------------------------

    @override
    def describe_data(self, data: PublicFacts) -> None:
        super().describe_data(data)
        if self.expected_batch_size > data.num_records:
            raise ConfigurationError(
                f"Expected model.expected_batch_size <= {data.num_records}, the number of records, got "
                f"expected_batch_size={self.expected_batch_size}."
            )

    @property
    @override
    def sampling(self) -> Sampling:
        return Sampling(scheme="poisson", rate=self.expected_batch_size / self.facts.num_records)

    # The moving average ----------------------------------------------------------------------------------------------

    def keep_average(self, network: nn.Module) -> None:
        """Keep a moving average of a network that will be published, if one was asked for; call once it is built."""
        if self.ema_decay > 0:
            self.average = ExponentialMovingAverage(network, decay=self.ema_decay)
            self._followed = lambda: network  # not an attribute: its parameters would be listed twice

    def averaged(self, network: Network) -> Network:
        """Return the moving average of `network`, or the network itself where none is kept."""
        return network if self.average is None else cast(Network, self.average.network)

    def start_average(self) -> None:
        """Let the average begin where the network is, after a warm start."""
        if self.average is not None:
            self.average.network.load_state_dict(self._followed().state_dict())

    # Training --------------------------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit":
            # New coins at every start of a process: a resumed run must not sample the batches of the first again.
            self._sampler = PoissonSampler(
                self.facts.num_records,
                self.sampling.rate,
                insecure_seed=self.insecure_seed,
                owned=self.ranks.owned(self.facts.num_records),
            )

    def draw_records(self) -> Tensor:
        """Return the private indices of this process' records in this step, int64 on the CPU; possibly none."""
        if self._sampler is None:
            raise PrivacyProtocolError("Records are drawn after setup(), which the trainer calls.")
        return self._sampler.draw()

    def images_of(self, ids: Tensor) -> Tensor:
        """Return the images of records in [0, 1], (n, C, H, W), with device and type of the module. Private."""
        images: Tensor = self.trainer.datamodule.train_images[ids]  # type: ignore[attr-defined]
        return images.to(self.device).to(self.dtype) / 255

    def labels_of(self, ids: Tensor) -> Tensor:
        """Return the labels of records, int64, (n,), on the device of the module. Private."""
        labels: Tensor = self.trainer.datamodule.train_labels[ids]  # type: ignore[attr-defined]
        return labels.to(self.device)

    def step_seed(self, purpose: int) -> int:
        """Return the public seed of one purpose (0 to 7) in this step."""
        return ((self.public_seed * 1_000_003 + self._round) * 8 + purpose) * _MIX % 2**63

    def public_stream(self, purpose: int) -> torch.Generator:
        """Return a generator for one purpose (0 to 7) in this step, on the CPU."""
        return torch.Generator().manual_seed(self.step_seed(purpose))

    def finish_step(self, *, with_average: bool = True) -> None:
        """Move the average (if what it follows has moved) and count the step; the last call of a training step."""
        if self.average is not None and with_average:
            self.average.update(self._followed())
        self._round += 1

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["round"] = self._round
        checkpoint["ema_updates"] = 0 if self.average is None else self.average.num_updates

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._round = checkpoint["round"]
        if self.average is not None:
            self.average.num_updates = checkpoint["ema_updates"]


class RecordModule(PoissonModule):
    """A Poisson-sampled method whose rows are per-record gradients.

    Guarantee: an absent record adds nothing to the sum, and the divisor is the public expected batch size, so a record
    that joins moves the released sum by at most the mechanism's bound on one row.

    Args:
        expected_batch_size: See `PoissonModule`.
        chunk_size: Records whose gradients are held at a time, >= 1; None fits it to cache and memory.
        gradients: How gradients are made; memory and speed only (see `GradientSource`).
        public_seed: See `PoissonModule`.
        ema_decay: See `PoissonModule`.

    Raises:
        ConfigurationError: A value is out of range.
    """

    def __init__(
        self,
        *,
        expected_batch_size: float,
        chunk_size: int | None,
        public_seed: int,
        ema_decay: float = 0.0,
        gradients: GradientMode = "auto",
    ) -> None:
        super().__init__(expected_batch_size=expected_batch_size, public_seed=public_seed, ema_decay=ema_decay)
        if chunk_size is not None:
            check_positive(chunk_size=chunk_size)
        self.source = GradientSource(gradients, chunk_size)

    def record_spec(self, network: nn.Module) -> ContributionSpec:
        """Describe rows that are per-record gradients of `network`."""
        segments = row_segments(network)
        if not segments:
            raise ConfigurationError(f"{type(network).__name__} has no parameter to train; unfreeze some.")
        return ContributionSpec.records(
            expected_batch_size=self.expected_batch_size, vector_dim=sum(segments), segments=segments
        )

    @abstractmethod
    def record_loss_of(self) -> tuple[nn.Module, RecordLoss]:
        """Return the network whose gradients are rows, and the loss of one record."""

    @abstractmethod
    def record_batch(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Return what the loss takes of records, first axes of length n. Private.

        Args:
            ids: Private indices, int64 on the CPU, (n,). What belongs to a record must not depend on which others are
                among them.
        """

    def record_rows(self, records: Tensor) -> Iterator[RecordChunk]:
        """Yield the gradients of a batch, a chunk at a time.

        Args:
            records: Private indices, int64 on the CPU, (n,); n may be 0.
        """
        if not len(records):
            return
        network, loss = self.record_loss_of()
        at_once = self.source.records_at_once(network, loss, self.record_batch(records[:1]))
        for ids in records.split(at_once):
            yield from self.source.gradients(network, loss, self.record_batch(ids), ids=ids.to(self.device))

    def train_on_release(self, network: nn.Module) -> None:
        """Make the release of this step, and let the optimizer take it as the gradient of `network`."""
        parameters = trainable_parameters(network).values()
        for parameter in parameters:
            parameter.grad = None  # of the last step: as much memory as the network
        rows = self.record_rows(self.draw_records())
        self.assign_released(parameters, self.release(rows, (1, sum(p.numel() for p in parameters))))
        self.step_optimizer()

    def step_optimizer(self) -> None:
        """Let the one optimizer take a step on what was released, and finish the training step."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        optimizer.step()  # type: ignore[union-attr]
        schedule.step()  # type: ignore[union-attr, call-arg]
        self.finish_step()


def with_cosine_schedule(optimizer: Optimizer, *, num_steps: int, final_share: float) -> OptimizerLRScheduler:
    """Return the optimizer with a learning rate that falls along a half cosine to a share of itself.

    Args:
        optimizer: The optimizer.
        num_steps: Steps of the whole run, public.
        final_share: The last learning rate over the first, in (0, 1]; 1 keeps it.
    """
    last = max(1, num_steps)

    def share(step: int) -> float:
        return final_share + (1 - final_share) * (1 + math.cos(math.pi * min(step, last) / last)) / 2

    return [optimizer], [LambdaLR(optimizer, share)]


def check_positive(**values: float) -> None:
    """Refuse options of a model that are not finite and positive.

    Raises:
        ConfigurationError: Naming the first one.
    """
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigurationError(f"Expected a finite model.{name} > 0, got {name}={value}.")


def check_share(**values: float) -> None:
    """Refuse options of a model that are not in (0, 1].

    Raises:
        ConfigurationError: Naming the first one.
    """
    for name, value in values.items():
        if not 0 < value <= 1:
            raise ConfigurationError(f"Expected 0 < model.{name} <= 1, got {name}={value}.")


def check_decay(**values: float) -> None:
    """Refuse options of a model that are not in [0, 1).

    Raises:
        ConfigurationError: Naming the first one.
    """
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ConfigurationError(f"Expected 0 <= model.{name} < 1, got {name}={value}.")


def check_betas(betas: tuple[float, float]) -> None:
    """Refuse betas that Adam does not take.

    Raises:
        ConfigurationError: Not two numbers in [0, 1).
    """
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigurationError(f"Expected model.betas to be two numbers in [0, 1), got betas={list(betas)}.")

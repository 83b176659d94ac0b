"""What every method shares that sees Poisson-sampled records: sampler, rate, public randomness."""

import hashlib
import math
import secrets
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.accounting.events import Sampling
from lightning_dp.errors import ConfigurationError, PrivacyProtocolError
from lightning_dp.gradients.per_record import RecordLoss, row_segments, trainable_parameters
from lightning_dp.gradients.poisson import PoissonSampler
from lightning_dp.gradients.record_gradients import RecordChunk
from lightning_dp.gradients.source import GradientMode, GradientSource
from lightning_dp.mechanisms.base import ContributionSpec
from lightning_dp.modules.averaged import AveragedModule
from lightning_dp.modules.options import check_positive
from lightning_dp.modules.public_facts import PublicFacts
from lightning_dp.modules.step_memory import record_bytes

_MIX = 0x9E3779B97F4A7C15  # spreads consecutive step numbers over the seeds of keyed draws


class PoissonModule(AveragedModule):
    """A method in which each step sees every record with the same small probability, by its own coin.

    Guarantee: realised batches are never counted, logged, or divided by; an empty one is released like any other.

    Args:
        expected_batch_size: Mean number of records of a step, > 0; over the number of records, the sampling rate.
        public_seed: Seed of what is public (latents, labels of fakes); not of the noise, the sampling, or what belongs
            to a record (`record_seed`). The command line sets it to seed_everything.
        ema_decay: See `AveragedModule`.

    Raises:
        ConfigurationError: A value is out of range.
    """

    def __init__(self, *, expected_batch_size: float, public_seed: int, ema_decay: float = 0.0) -> None:
        super().__init__(ema_decay=ema_decay)
        check_positive(expected_batch_size=expected_batch_size)
        self.expected_batch_size = expected_batch_size
        self.public_seed = public_seed
        self._sampler: PoissonSampler | None = None
        self._is_rehearsing = False
        self._record_key = secrets.token_bytes(16)  # another one at every start of a run; in no file

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
            self._record_key = _record_key(self.insecure_seed)

    def draw_records(self) -> Tensor:
        """Return the private indices of this process' records in this step, int64 on the CPU; possibly none.

        Raises:
            PrivacyProtocolError: The trainer has not called `setup` yet.
        """
        if self._sampler is None:
            raise PrivacyProtocolError("Records are drawn after setup(), which the trainer calls.")
        return self._sampler.draw()

    def images_of(self, ids: Tensor) -> Tensor:
        """Return the images of records in [0, 1], (n, C, H, W), with device and type of the module. Private."""
        if self._is_rehearsing:  # blank ones: no record is read
            return torch.zeros(len(ids), *self.facts.image_shape, device=self.device).to(self.dtype)
        images: Tensor = self.trainer.datamodule.train_images[ids]  # type: ignore[attr-defined]
        return images.to(self.device).to(self.dtype) / 255

    def labels_of(self, ids: Tensor) -> Tensor:
        """Return the labels of records, int64, (n,), on the device of the module. Private."""
        if self._is_rehearsing:
            return torch.zeros(len(ids), dtype=torch.int64, device=self.device)
        labels: Tensor = self.trainer.datamodule.train_labels[ids]  # type: ignore[attr-defined]
        return labels.to(self.device)

    def step_seed(self, purpose: int) -> int:
        """Return the public seed of one purpose (0 to 7) in this step."""
        return ((self.public_seed * 1_000_003 + self._round) * 8 + purpose) * _MIX % 2**63

    def record_seed(self, purpose: int) -> int:
        """Return the secret seed of what is drawn for each record (views, latent draws) in this step.

        Draws are keyed by it and by the record's id, which is its position in the file. Under add-or-remove-one the
        records behind one that leaves move up. If the seed were public, they would have other known draws, and all of
        their rows would move; secret draws are alike in law wherever a record stands, so only its own row counts.

        Args:
            purpose: 0 to 7.
        """
        name = f"{self._round}/{purpose}".encode()
        return int.from_bytes(hashlib.blake2b(name, key=self._record_key, digest_size=8).digest(), "big") >> 1

    def public_stream(self, purpose: int) -> torch.Generator:
        """Return a generator for one purpose (0 to 7) in this step, on the CPU."""
        return torch.Generator().manual_seed(self.step_seed(purpose))


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

    @override
    def step_bytes(self) -> dict[str, int]:
        """Count the records of a chunk that was asked for, as images; one that is found fits what memory there is."""
        if (few := self.source.at_once) is None:
            return {}
        few = min(few, math.floor(self.expected_batch_size))
        return {f"model.chunk_size={few}": few * record_bytes(self.facts.image_shape)}

    def record_spec(self, network: nn.Module) -> ContributionSpec:
        """Describe rows that are per-record gradients of `network`.

        Raises:
            ConfigurationError: All of its parameters are frozen.
        """
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
        at_once = self.source.at_once
        if at_once is None:
            at_once = self.source.records_at_once(network, loss, self.record_batch(records[:1]))
        for ids in records.split(at_once):
            yield from self.source.gradients(network, loss, self.record_batch(ids), ids=ids.to(self.device))

    @override
    def rehearse(self) -> None:
        """Make the gradient of a blank record; see `PrivateModule.rehearse`."""
        super().rehearse()
        network, loss = self.record_loss_of()
        meant, self._is_rehearsing = self._device, True
        # Lightning says where the module will be before it is there.
        self._device = next(network.parameters()).device
        try:
            self.source.rehearse(network, loss, self.record_batch(torch.zeros(1, dtype=torch.int64)))
        finally:
            self._device, self._is_rehearsing = meant, False

    def train_on_release(self, network: nn.Module) -> None:
        """Make the release of this step, and let the optimizer take it as the gradient of `network`."""
        parameters = trainable_parameters(network).values()
        for parameter in parameters:
            parameter.grad = None  # of the last step: as much memory as the network
        rows = self.record_rows(self.draw_records())
        self.assign_released(parameters, self.release(rows, (1, sum(p.numel() for p in parameters))))
        self.step_optimizer()


def _record_key(insecure_seed: int | None) -> bytes:
    """Return a secret from the operating system; each process has records, and so a key, of its own."""
    if insecure_seed is None:
        return secrets.token_bytes(16)
    return hashlib.blake2b(f"insecure-records:{insecure_seed}".encode(), digest_size=16).digest()

"""Teachers that are discriminators, each trained on its own shard: the ensemble of DataLens and G-PATE.

Shapes: T teachers, t of them on this process (every W-th of W processes), n of one chunk, B samples of a batch, y
classes, d numbers of one native output.
"""

import math
from collections.abc import Iterator
from typing import Any, Final, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.adam_stacks import AdamStacks, StatePlace
from lightning_dp.gradients.chunk_sizes import CPU_CHUNKS, ChunkSizes
from lightning_dp.gradients.dense_backend import DenseBackend
from lightning_dp.gradients.mapped_state import MappedState, read_ahead
from lightning_dp.gradients.ranks import ALONE, Ranks
from lightning_dp.gradients.teacher_backends import LoopBackend, Stack, StackedBackend, TeacherBackend
from lightning_dp.gradients.teachers import Encoder, FakeSource, RowChunk, RowStructure, TeacherEnsemble, TeacherShards
from lightning_dp.losses.adversarial import Objective
from lightning_dp.networks.datalens import DataLensDiscriminator
from lightning_dp.networks.discriminator import Discriminator
from lightning_dp.networks.gswgan import GSWGANCritic
from lightning_dp.networks.small import MLPDiscriminator, SmallConvDiscriminator

NetworkName = Literal["datalens", "gswgan", "small_conv", "mlp"]
BackendName = Literal["loop", "stacked"]

NETWORKS: Final[dict[str, type[Discriminator]]] = {
    "datalens": DataLensDiscriminator,
    "gswgan": GSWGANCritic,
    "small_conv": SmallConvDiscriminator,
    "mlp": MLPDiscriminator,
}
BACKENDS: Final[dict[str, type[TeacherBackend]]] = {"loop": LoopBackend, "stacked": StackedBackend}


def choose_backend(network: str, device: torch.device) -> BackendName:
    """Return the faster backend: the loop for convolutions on a CPU, else stacked.

    Args:
        network: A name of `NETWORKS`.
        device: Where the teachers work.
    """
    if device.type != "cpu" or network == "mlp":
        return "stacked"
    return "loop"


class DiscriminatorTeachers(TeacherEnsemble):
    """One discriminator and one Adam per shard; a row is the way a teacher would move the fake images.

    State lies in `AdamStacks` whichever backend computes, so checkpoints move between backends, chunk sizes, devices
    and numbers of processes.

    Differs: the fakes of a round are made once, for every label at every batch position, and teachers pick by
    their own labels; the published program runs the generator on the private labels of each teacher. With a generator
    without batch statistics both give the same fakes; with them, ours cannot carry labels between teachers.

    Args:
        network: Discriminator of every teacher.
        num_teachers: T.
        backend: "loop", "stacked", or "auto" for the faster one.
        chunk_size: Teachers at a time; None fits it to cache and memory. It changes speed and memory only.
        batch_size: Most records a teacher sees per round; at most N // T are used.
        learning_rate: Of each teacher's Adam.
        betas: Of each teacher's Adam.
        train_steps: Adam steps per round, all on the same records and fakes.
        pretrain_steps: The same for the first round.
        teachers_per_round: Teachers trained in a round after the first, which trains all: blocks of this many take
            turns, in public order whatever was asked of whom. Must divide num_teachers; null trains all.
        objective: non_saturating (DataLens, G-PATE) or wasserstein with a gradient penalty (GS-WGAN).
        penalty: Weight of the gradient penalty of a Wasserstein critic.
        compute: bfloat16 judges and differentiates under autocast; parameters, moments, gradients and rows are float32.
        state: Where parameters and moments are kept (27 GB for 4000 DataLens teachers): device, or host, whose memory
            lends them to a GPU chunk by chunk; auto is device where half of its free memory holds them.
        state_dir: Folder for parameters and moments as memory-mapped files of the host, for ensembles larger than
            memory; Linux. The files are private and vanish with the process.

    Raises:
        ConfigurationError: A setting is out of range or unknown.
    """

    def __init__(
        self,
        network: NetworkName = "small_conv",
        *,
        num_teachers: int,
        backend: Literal["auto", "loop", "stacked"] = "auto",
        chunk_size: int | None = None,
        batch_size: int = 30,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.5, 0.999),
        train_steps: int = 2,
        pretrain_steps: int = 10,
        teachers_per_round: int | None = None,
        objective: Objective = "non_saturating",
        penalty: float = 10.0,
        compute: Literal["float32", "bfloat16"] = "float32",
        state: StatePlace = "auto",
        state_dir: str | None = None,
    ) -> None:
        _require_choice("network", network, tuple(NETWORKS))
        _require_choice("backend", backend, ("auto", *BACKENDS))
        _require_choice("objective", objective, get_args(Objective))
        _require_choice("compute", compute, ("float32", "bfloat16"))
        _require_choice("state", state, get_args(StatePlace))
        counts = {"num_teachers": num_teachers, "batch_size": batch_size, "train_steps": train_steps}
        counts["pretrain_steps"] = pretrain_steps
        if chunk_size is not None:
            counts["chunk_size"] = chunk_size
        for name, count in counts.items():
            if count < 1:
                raise ConfigurationError(f"Expected {name} >= 1, got {name}={count}. Give a whole number from 1.")
        self.teachers_per_round = num_teachers if teachers_per_round is None else teachers_per_round
        if not 1 <= self.teachers_per_round <= num_teachers or num_teachers % self.teachers_per_round:
            raise ConfigurationError(
                f"Expected teachers_per_round to divide num_teachers={num_teachers}, got {teachers_per_round=}."
            )
        if not (math.isfinite(penalty) and penalty >= 0):
            raise ConfigurationError(f"Expected a finite penalty >= 0, got {penalty=}. GS-WGAN uses 10.")
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise ConfigurationError(
                f"Expected a finite learning_rate > 0, got learning_rate={learning_rate}. The paper uses 1e-3."
            )
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigurationError(f"Expected two betas in [0, 1), got betas={betas}. The paper uses (0.5, 0.999).")
        self.network_name, self.backend_name, self.chunk_size = network, backend, chunk_size
        self.num_teachers, self.batch_size = num_teachers, batch_size
        self.learning_rate, self.betas = learning_rate, betas
        self.train_steps, self.pretrain_steps = train_steps, pretrain_steps
        self.objective: Objective = objective
        self.penalty, self.compute = penalty, compute
        self.state: StatePlace = state
        self.state_dir = state_dir
        self._stacks: AdamStacks | None = None
        self._samples: Tensor | None = None
        self._rounds = 0
        self._ranks, self._owned = ALONE, range(num_teachers)

    def bind(  # noqa: D102
        self,
        shards: TeacherShards,
        *,
        num_classes: int,
        image_shape: tuple[int, int, int],
        device: torch.device | str,
        seed: int,
        encode: Encoder | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        shards.check_fit(num_teachers=self.num_teachers, num_classes=num_classes, image_shape=image_shape)
        self._device, self._num_classes, self._encode = torch.device(device), num_classes, encode
        self._batch = shards.common_batch(self.batch_size)  # of all teachers, wherever they live
        self._ranks, self._owned = ranks, ranks.owned(self.num_teachers)
        self._shards = shards.part(self._owned).to(self._device)
        self._has_records = self._shards.sizes > 0
        self._all_have_records = bool(self._has_records.all())
        self._sample_shape = tuple(self._encoded(torch.zeros(1, *image_shape, device=self._device)).shape[1:])
        network = NETWORKS[self.network_name](self._sample_shape, num_classes)
        self._check_batch_statistics(network.min_batch, shards.num_records)
        self._seed, self._samples = seed, None
        self._stacks = AdamStacks(
            network,
            num_teachers=self.num_teachers,
            ranks=ranks,
            device=self._device,
            seed=seed,
            place=self.state,
            state_dir=self.state_dir,
        )
        self._rounds = 0
        is_open = self.backend_name == "auto"
        self.chosen_backend = choose_backend(self.network_name, self._device) if is_open else self.backend_name
        by_hand = self.chosen_backend == "stacked" and network.dense_layers
        make = DenseBackend if by_hand else BACKENDS[self.chosen_backend]
        self._backend = make(network.to(self._device), objective=self.objective, penalty=self.penalty)
        self._chunk_sizes = ChunkSizes(
            self._backend.network,
            sample_shape=self._sample_shape,
            num_classes=num_classes,
            bytes_per_teacher=self._stacks.bytes_per_teacher,
            num_lent=3 if self._stacks.is_remote else 0,
            preferred=CPU_CHUNKS[self.network_name, self.chosen_backend],
        )

    def state_bytes(self, sample_shape: tuple[int, ...], *, num_classes: int, device: torch.device) -> int:  # noqa: D102
        if self.state_dir is not None or (device.type != "cpu" and self.state != "device"):
            return 0  # in files, or where they fit
        with torch.device("meta"):
            network = NETWORKS[self.network_name](sample_shape, num_classes)
        # Parameters, and Adam's two moments of each.
        return 3 * self.num_teachers * sum(p.numel() * p.element_size() for p in network.parameters())

    def _check_batch_statistics(self, least: int, num_records: int) -> None:
        """Refuse networks with batch statistics for teachers of too few records, and for Wasserstein critics."""
        if self._batch < least:
            raise ConfigurationError(
                f"Expected at least {least} records per teacher for network={self.network_name!r} (batch "
                f"statistics), got {num_records} records for num_teachers={self.num_teachers}, "
                f"batch_size={self.batch_size}. Use fewer teachers or network='small_conv'."
            )
        if self.objective == "wasserstein" and least > 1:
            raise ConfigurationError(
                f"network={self.network_name!r} takes batch statistics, which couple the slopes of a Wasserstein "
                "critic. Choose network='gswgan', 'small_conv' or 'mlp'."
            )

    def train(self, make_fakes: FakeSource, *, step: int) -> None:  # noqa: D102
        stacks = self._bound_stacks()
        public_labels = torch.arange(self._num_classes, device=self._device).repeat(self._batch)
        fakes = make_fakes(public_labels).detach().unflatten(0, (self._batch, self._num_classes))
        repeats = self.train_steps if self._rounds else self.pretrain_steps
        block, visit = self._turn(step)
        block = _places(block, self._owned)
        steps_before = self._optimizer_steps(self._turn(self._rounds)[1])
        for teachers in self._chunks(2 * self._batch, block, stacks.files):
            samples, one_hot = self._round_batch(teachers, fakes, visit)
            with stacks.at_work(teachers) as few:
                for repeat in range(repeats):
                    shares = self._public_shares(step, repeat, like=samples)
                    with self._computing():
                        gradients = self._backend.training_gradients(few.parameters, samples, one_hot, shares)
                    few.step(
                        gradients,
                        steps_before=steps_before + repeat,
                        learning_rate=self.learning_rate,
                        betas=self.betas,
                    )
        self._rounds += 1

    def _computing(self) -> torch.autocast:
        # Without its cache of rounded weights, kept by parameter: the loop backend puts one teacher after another into
        # the same parameters, and all would work with the first one's.
        return torch.autocast(
            self._device.type, torch.bfloat16, enabled=self.compute == "bfloat16", cache_enabled=False
        )

    def _turn(self, step: int) -> tuple[slice, int]:
        """Return which of all teachers are trained in a round, and how many rounds they have had before: public."""
        if step == 0:
            return slice(0, self.num_teachers), 0
        turn, block = divmod(step - 1, self.num_teachers // self.teachers_per_round)
        return slice(block * self.teachers_per_round, (block + 1) * self.teachers_per_round), turn + 1

    def _optimizer_steps(self, visits: int) -> int:
        """Return the Adam steps of a teacher that has had so many rounds."""
        return self.pretrain_steps + (visits - 1) * self.train_steps if visits else 0

    def _public_shares(self, step: int, repeat: int, *, like: Tensor) -> Tensor:
        """Return where between fakes and records slopes are taken, (B,): the same for all teachers, and public."""
        stream = torch.Generator().manual_seed(((self._seed * 1_000_003 + step) * 1_009 + repeat) % 2**63)
        return torch.rand(self._batch, generator=stream).to(like)

    def row_chunks(self, fakes: Tensor, labels: Tensor, judges: Tensor | None = None) -> Iterator[RowChunk]:  # noqa: D102
        for teacher_ids, own, one_hot in self._judging(fakes, labels, judges):
            with self._computing():
                values = self._backend.descent_directions(own, fakes.detach(), one_hot).flatten(2)  # (n, B, d)
            yield self._chunk(teacher_ids, values)

    def vote_chunks(self, fakes: Tensor, labels: Tensor, *, is_relative: bool = False) -> Iterator[RowChunk]:
        """Yield each teacher's vote on each fake: values +1 for real, -1 for fake, (n, B, 1).

        Args:
            fakes: As in `row_chunks`.
            labels: As in `row_chunks`.
            is_relative: Vote +1 for a fake that looks more real to the teacher than its mean fake of the same label.
        """
        for teacher_ids, own, one_hot in self._judging(fakes, labels, None):
            with self._computing():
                logits = self._backend.logits(own, fakes.detach(), one_hot).to(one_hot.dtype)  # (n, B)
            if is_relative:
                means = (logits @ one_hot) / one_hot.sum(0).clamp(min=1)  # (n, y)
                logits = logits - means[:, labels]
            yield self._chunk(teacher_ids, 2.0 * (logits > 0)[:, :, None] - 1.0)

    def _chunk(self, teacher_ids: Tensor, values: Tensor) -> RowChunk:
        # A teacher without records abstains, so that its rows do not tell an empty shard's initial network apart.
        places = (teacher_ids - self._owned.start) // self._owned.step
        if not self._all_have_records:
            values = values.masked_fill(~self._has_records[places][:, None, None], 0.0)
        return RowChunk(teacher_ids, values, slice(0, values.shape[1]))

    def _judging(self, fakes: Tensor, labels: Tensor, judges: Tensor | None) -> Iterator[tuple[Tensor, Stack, Tensor]]:
        """Yield teachers that judge, a chunk at a time: their ids, their parameters, and the labels one-hot."""
        stacks = self._bound_stacks()
        num_images = fakes.shape[0]
        least = self._backend.network.min_batch
        if num_images < least or tuple(fakes.shape[1:]) != self._sample_shape or labels.shape != (num_images,):
            raise ValueError(
                f"Expected at least {least} fakes of shape {self._sample_shape} with one label each, got "
                f"fakes.shape={tuple(fakes.shape)}, labels.shape={tuple(labels.shape)}. Pass the generator's native "
                "outputs."
            )
        one_hot = F.one_hot(labels, self._num_classes).to(fakes.dtype)
        owned = torch.tensor(self._owned, dtype=torch.int64, device=self._device)
        ids = owned if judges is None else judges.to(self._device)
        places = (ids - self._owned.start) // self._owned.step
        for part in self._chunks(num_images, slice(0, len(ids)), stacks.files[:1] if judges is None else ()):
            yield ids[part], stacks.of(part if judges is None else places[part]), one_hot

    def row_structure(self, num_images: int) -> RowStructure:
        """Return that a record reaches one teacher, which speaks on all images. Looks at no data."""
        return RowStructure(images_per_row=num_images, class_wise=False, single_record=False)

    def state_dict(self) -> dict[str, Any]:
        """Return parameters and Adam moments, see `AdamStacks.state_dict`, and step counts. Private."""
        return {"rounds": self._rounds, **self._bound_stacks().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy a state of an ensemble of the same network and size into this one.

        Raises:
            ConfigurationError: Names or shapes differ.
        """
        self._bound_stacks().load_state_dict(state, network_name=self.network_name)
        self._rounds = int(state["rounds"])

    def _round_batch(self, teachers: slice, fakes: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return records and then fakes, (n, 2B, ...), and one-hot labels of both, (n, B, y), of one round."""
        positions = self._shards.positions(teachers, self._batch, step)
        labels = self._shards.labels[positions]  # (n, B)
        # Kept from chunk to chunk: fresh memory of this size costs more in page faults than what is written to it.
        if self._samples is None or len(self._samples) < len(positions) or self._samples.dtype != fakes.dtype:
            self._samples = fakes.new_empty(len(positions), 2 * self._batch, *self._sample_shape)
        samples = self._samples[: len(positions)]
        real, fake = samples.chunk(2, 1)
        images = self._shards.images.index_select(0, positions.flatten())
        if self._encode is None:
            real.copy_(images.view_as(real)).div_(255)
        else:
            real.copy_(self._encode(images.to(fakes.dtype).div_(255)).detach().view_as(real))
        place = torch.arange(self._batch, device=self._device) * self._num_classes
        fake.copy_(fakes.flatten(0, 1).index_select(0, (place + labels).flatten()).view_as(fake))
        return samples, F.one_hot(labels, self._num_classes).to(fakes.dtype)

    def _encoded(self, images: Tensor) -> Tensor:
        return images if self._encode is None else self._encode(images).detach()

    def _chunks(self, samples: int, within: slice, files: tuple[MappedState, ...] = ()) -> Iterator[slice]:
        return read_ahead(within, self.chunk_size or self._chunk_sizes.fitting(samples), files)

    def _bound_stacks(self) -> AdamStacks:
        if self._stacks is None:
            raise RuntimeError("Expected bound teachers, got an ensemble without records. Call bind() first.")
        return self._stacks


def _places(teachers: slice, owned: range) -> slice:
    """Return where the owned ones among a run of teachers stand in the stacks."""
    start, stop = (-(-(edge - owned.start) // owned.step) for edge in (teachers.start, teachers.stop))
    return slice(max(0, start), min(len(owned), max(0, stop)))


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"Expected {name} to be one of {', '.join(choices)}, got {name}={value!r}.")

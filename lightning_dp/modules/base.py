"""The release seam of every method: no private gradient reaches a released network but through `release`."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dp.accounting.events import Sampling
from lightning_dp.errors import ConfigurationError, PrivacyProtocolError
from lightning_dp.evaluation.classification import ClassificationResult
from lightning_dp.evaluation.protocol import EvaluationProtocol, EvaluationResult, evaluate_samples
from lightning_dp.gradients.ranks import ALONE, Ranks
from lightning_dp.gradients.record_gradients import RecordChunk
from lightning_dp.mechanisms.base import ContributionSpec
from lightning_dp.modules.guard import ReleaseGuard
from lightning_dp.modules.public_facts import PublicFacts, check_sizes
from lightning_dp.modules.published import ask_before_saving
from lightning_dp.modules.release import PublicRows, PublicSamples, Released, ReleaseSession
from lightning_dp.networks.generator import Generator
from lightning_dp.networks.releasable import ReleasableNetwork

_NO_PRIVATIZER = (
    "No GradientPrivatizer is attached. Add callbacks.GradientPrivatizer to the trainer (the command line does so), or "
    "choose its mechanism NoPrivacy for a run without privacy."
)

_PUBLIC_PREFIXES = ("privacy/", "eval/", "cost/", "public/")
RAW_PREFIX = "raw/"


class PrivateModule(pl.LightningModule, ABC):
    """A LightningModule whose released networks learn from released values only.

    A method implements `contribution_spec`, `released_networks` and `training_step`; the step calls `release` once and
    feeds the result to `backward_released`. Optimizers of released networks refuse to step on any other gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self._session: ReleaseSession | None = None
        self._guard: ReleaseGuard | None = None
        self._published_options: dict[str, Any] = {}
        self._facts: PublicFacts | None = None
        # Saved with the weights: no ledger can forget what they learned from, nor stand in for another one.
        self._absorbed_releases = 0
        self._absorbed_writers: dict[str, int] = {}  # by whom they were made: another ledger may hold as many
        self.planned_releases = 0
        self.logs_raw = False
        self.insecure_seed: int | None = None
        self.ranks: Ranks = ALONE

    # What a method declares ------------------------------------------------------------------------------------------

    @abstractmethod
    def contribution_spec(self) -> ContributionSpec:
        """Return public facts about the rows of one release; must not look at data."""

    def describe_data(self, data: PublicFacts) -> None:
        """Take the public facts of the data; called before any record is read.

        Raises:
            ConfigurationError: The data do not fit the method.
        """
        check_sizes(self.named_children(), data)
        self._facts = data

    @property
    def facts(self) -> PublicFacts:
        """Public facts of the data.

        Raises:
            PrivacyProtocolError: `describe_data` was not called: no GradientPrivatizer is attached.
        """
        if self._facts is None:
            raise PrivacyProtocolError(_NO_PRIVATIZER)
        return self._facts

    @abstractmethod
    def released_networks(self) -> dict[str, nn.Module]:
        """Return the networks that leave at the end; their optimizers accept released gradients only."""

    def released_generator(self) -> Generator:
        """Return the generator that is sampled, evaluated and published.

        Raises:
            ConfigurationError: The method trains no generator.
        """
        raise ConfigurationError(f"{type(self).__name__} trains no generator, so it cannot be sampled.")

    @property
    def makes_images(self) -> bool:
        """Whether `released_generator` returns one; False for classifiers."""
        return True

    def released_model(self) -> ReleasableNetwork:
        """Return the network that is published; the generator, unless the method trains another thing."""
        return self.released_generator()

    def networks_of_records(self) -> dict[str, nn.Module]:
        """Return the networks that records pass through where rows are made: those that leave, by default."""
        return self.released_networks()

    def evaluate_released(
        self, test_images: Tensor, test_labels: Tensor, protocol: EvaluationProtocol, *, seed: int
    ) -> EvaluationResult | ClassificationResult:
        """Judge what is published against the real test split; by its samples, unless it is no generator.

        Args:
            test_images: Held-out images, uint8, (M, C, H, W).
            test_labels: Their labels, int64, (M,).
            protocol: How samples are judged.
            seed: Of the samples.
        """
        images, labels = self.released_generator().sample(protocol.num_samples, seed=seed)
        return evaluate_samples(images, labels, test_images, test_labels, protocol, device=self.device)

    @property
    def sampling(self) -> Sampling:
        """How units enter a release; the default is that all of them do."""
        return Sampling(scheme="full")

    def public_plan(self) -> dict[str, Any]:
        """Return public facts of the method, JSON-able, that must stay the same for as long as a run goes on.

        They stand in the ledger's header, so a resume with others is refused. A method adds whatever its proof holds
        fixed over releases (who holds which record).
        """
        return {"method": type(self).__name__}

    def step_bytes(self) -> dict[str, int]:
        """Return the memory that one step takes at least, by the setting that decides it; from public facts alone."""
        return {}

    def kept_bytes(self, device: torch.device) -> dict[str, int]:
        """Return the memory of what all processes together keep from step to step, as `step_bytes` does.

        Args:
            device: Where the method works.
        """
        return {}

    def rehearse(self) -> None:
        """Try without a record what a run will need of its networks, before its ledger is opened.

        Raises:
            ConfigurationError: It cannot be had.
        """
        network = self.released_model()
        if not isinstance(network, ReleasableNetwork):
            raise ConfigurationError(
                f"Expected networks of lightning_dp.networks that can be published, got {type(network).__name__}. "
                "Derive a class of your own from Classifier or Generator and keep the network, compiled or not, in it."
            )

    @property
    def conditional_on(self) -> tuple[str, ...]:
        """What the claim rests on without a bound, in words; any makes it CONDITIONAL, without an epsilon."""
        return ()

    @property
    def not_covered(self) -> tuple[str, ...]:
        """What an epsilon of this method leaves out beyond what every claim of ours does, in words."""
        return ()

    @property
    def unverified(self) -> tuple[str, ...]:
        """Steps of the proof that this run does not keep, in words; any makes the claim UNVERIFIED."""
        return ()

    def learn_from_samples(self, samples: PublicSamples, *, steps: int, learning_rate: float, seed: int) -> None:
        """Learn from samples of an earlier release, before the first of its own; what a warm start asks.

        Args:
            samples: Public or released.
            steps: How long.
            learning_rate: How fast.
            seed: Public seed.

        Raises:
            ConfigurationError: The method has no way to.
        """
        raise ConfigurationError(f"{type(self).__name__} has no warm start; leave --warm_start out.")

    @property
    def can_warm_start(self) -> bool:
        """Whether the method can learn from samples of an earlier release."""
        return type(self).learn_from_samples is not PrivateModule.learn_from_samples

    def take_warm_start(
        self, samples: PublicSamples, *, steps: int, learning_rate: float, seed: int, releases: int = 1
    ) -> None:
        """Learn from samples of releases that the ledger of this run holds; called once, before `attach`.

        Args:
            samples: See `learn_from_samples`, as all that follow.
            steps: How long.
            learning_rate: How fast.
            seed: Public seed.
            releases: How many they are.

        Raises:
            PrivacyProtocolError: The module has been attached: the guard watches its networks.
        """
        if self._session is not None:
            raise PrivacyProtocolError("A warm start comes before the first release of the method.")
        self._absorbed_releases += releases
        self.learn_from_samples(samples, steps=steps, learning_rate=learning_rate, seed=seed)
        self.ranks.same([*self.parameters(), *self.buffers()])

    # The door --------------------------------------------------------------------------------------------------------

    def attach(self, session: ReleaseSession, optimizers: Iterable[Optimizer]) -> None:
        """Take the release session and guard the optimizers; called by GradientPrivatizer when training starts.

        Args:
            session: The door.
            optimizers: All optimizers of the run; those of released networks are watched.

        Raises:
            PrivacyProtocolError: The ledger does not hold all releases that the module has learned from, or a network
                is published that is none of the released ones.
        """
        self._published_options = self.released_model().options()
        self._check_watched()
        held = session.ledger.writers()
        lacks_own = any(held.get(writer, 0) < count for writer, count in self._absorbed_writers.items())
        if len(session.ledger) < self._absorbed_releases or lacks_own:
            others = " of other processes" if held and lacks_own else ""
            raise PrivacyProtocolError(
                f"This module has learned from {self._absorbed_releases} releases, but the ledger holds "
                f"{len(session.ledger)}{others}: its claim would leave some out. Continue with the run's own ledger "
                "and an unchanged checkpoint, or start from a new module."
            )
        ask_before_saving(self.released_model(), self.check_published)
        self._session = session
        self._guard = ReleaseGuard(self._released_parameters())
        for optimizer in optimizers:
            self._guard.watch(optimizer)

    @override
    def get_extra_state(self) -> dict[str, Any]:
        return {"absorbed_releases": self._absorbed_releases, "writers": dict(self._absorbed_writers)}

    @override
    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._absorbed_releases = state["absorbed_releases"]
        self._absorbed_writers = dict(state.get("writers", {}))

    def release(self, chunks: Iterable[RecordChunk], shape: tuple[int, int]) -> Released:
        """Turn private rows into one released value; once per training step.

        Args:
            chunks: Private rows, chunk by chunk.
            shape: (num_vectors, vector_dim) of the release.

        Raises:
            PrivacyProtocolError: No privatizer is attached, the step has released already, or the budget is spent.
        """
        if self._session is None:
            raise PrivacyProtocolError(_NO_PRIVATIZER)
        released = self._session.release(chunks, shape, self.device)
        self._absorbed_releases += 1
        self._absorbed_writers = self._session.ledger.writers()
        return released

    def reference(self, rows: PublicRows, shape: tuple[int, int], *, number: int, num_rows: int) -> Tensor:
        """Pass public rows through the encoding of release `number`, without noise (see `ReleaseSession.reference`)."""
        if self._session is None:
            raise PrivacyProtocolError(_NO_PRIVATIZER)
        return self._session.reference(rows, shape, self.device, number=number, num_rows=num_rows)

    def backward_released(self, outputs: Tensor, released: Released) -> None:
        """Back-propagate a released value as the gradient of `outputs` into the released networks.

        Gradients that were there before are dropped, so nothing else can ride along; the guard compares the new ones
        before the optimizer steps and after (`ReleaseGuard`).

        Args:
            outputs: What the released networks computed from public inputs.
            released: The descent direction for `outputs`, same number of entries.

        Raises:
            PrivacyProtocolError: `released` is no value that `release` returned.
        """
        if not isinstance(released, Released):
            raise PrivacyProtocolError("backward_released() takes the value that release() returned, not a tensor.")
        parameters = list(self._released_parameters())
        for parameter in parameters:
            parameter.grad = None
        # Optimizers minimise, so the gradient is minus the descent direction.
        gradient = -released.value.reshape(outputs.shape).to(outputs)
        torch.autograd.backward(outputs, grad_tensors=gradient, inputs=[p for p in parameters if p.requires_grad])
        self._admit_gradients(parameters)

    def assign_released(self, parameters: Iterable[nn.Parameter], released: Released) -> None:
        """Make a released gradient the gradient of parameters of the released networks.

        For methods whose rows are gradients of a loss with respect to parameters, flattened in this order.

        Args:
            parameters: Parameters of released networks, in the order in which the rows were flattened.
            released: The released mean gradient (not a descent direction), one number per parameter entry.

        Raises:
            PrivacyProtocolError: `released` is no value that `release` returned.
        """
        if not isinstance(released, Released):
            raise PrivacyProtocolError("assign_released() takes the value that release() returned, not a tensor.")
        wanted, all_released = list(parameters), list(self._released_parameters())
        for parameter in all_released:
            parameter.grad = None
        parts = released.value.flatten().split([parameter.numel() for parameter in wanted])
        for parameter, part in zip(wanted, parts, strict=True):
            parameter.grad = part.reshape(parameter.shape).to(parameter)
        self._admit_gradients(all_released)

    @override
    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Log a number that may leave; fail closed on any other.

        Names under ``privacy/``, ``eval/``, ``cost/`` and ``public/`` promise that the value is public or was released.
        Names under ``raw/`` (computed from private records without noise) are dropped unless ``telemetry.raw`` is on,
        which the claim then states.

        Raises:
            PrivacyProtocolError: The name promises nothing.
        """
        if name.startswith(RAW_PREFIX):
            if not self.logs_raw:
                return
        elif not name.startswith(_PUBLIC_PREFIXES):
            raise PrivacyProtocolError(
                f"The log name {name!r} does not say whether its value may leave: use one of "
                f"{', '.join(_PUBLIC_PREFIXES)} for public or released values, {RAW_PREFIX} for all others."
            )
        super().log(name, *args, **kwargs)

    # Hooks -----------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Refuse to train without a privatizer, which allows one release before each step and checks it after."""
        if self._session is None:
            raise PrivacyProtocolError(_NO_PRIVATIZER)

    def check_published(self) -> None:
        """See that the released networks are what guarded steps have left; asked before they are written.

        Raises:
            PrivacyProtocolError: They, or the options that are written beside them, were edited since the last step, by
                a callback at the end of training, say, or others stand in their place.
        """
        if self._guard is None:
            return
        self._guard.check_parameters(self._released_parameters())
        self._check_watched()
        if self.released_model().options() != self._published_options:
            raise PrivacyProtocolError(
                f"The options of {type(self).__name__}'s published network changed while it was trained; they are "
                "written beside its parameters, and have to be public. Set them before training."
            )

    def _check_watched(self) -> None:
        """Refuse to publish parameters of which nobody knows what they have learned from."""
        self._require_watched(self.released_model(), self.watched_parameters())

    def _require_watched(self, network: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        watched = {id(parameter) for parameter in parameters}
        if any(id(parameter) not in watched for parameter in network.parameters()):
            raise PrivacyProtocolError(
                f"{type(self).__name__} publishes parameters that nobody watches; return their network from "
                "released_networks(), so that its optimizer steps on released gradients alone."
            )

    def watched_parameters(self) -> Iterator[nn.Parameter]:
        """Yield all parameters that are held to what releases and guarded steps left."""
        yield from self._released_parameters()

    def _admit_gradients(self, parameters: list[nn.Parameter]) -> None:
        # Each process has made them of the same released value.
        self.ranks.same([p.grad for p in parameters if p.grad is not None])
        if self._guard is not None:
            self._guard.admit()

    def _released_parameters(self) -> Iterator[nn.Parameter]:
        for network in self.released_networks().values():
            yield from network.parameters()

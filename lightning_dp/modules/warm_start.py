"""A warm start: a cheap release, and samples of it that a generator learns from before its own first release.

The release (some kinds make several) and all that follow it stand in one ledger and are paid by one budget; what is
learned from its samples is post-processing.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dp.accounting.calibration import calibrate_noise_multiplier
from lightning_dp.accounting.events import ReleaseEvent, Sampling
from lightning_dp.accounting.settings import PrivacySettings
from lightning_dp.errors import ConfigurationError, PrivacyProtocolError
from lightning_dp.mechanisms.base import ContributionSpec, Mechanism, ReleasePlan
from lightning_dp.modules.base import PrivateModule
from lightning_dp.modules.moments_rounds import MomentsRounds
from lightning_dp.modules.release import PublicSamples, ReleaseSession
from lightning_dp.networks.class_gaussian import ClassGaussianGenerator
from lightning_dp.networks.generator import Generator

OpenSession = Callable[[Mechanism, ReleasePlan, Sampling], ReleaseSession]
"""Opens a door onto the ledger of the run, for the release of the warm start."""


@dataclass(frozen=True)
class WarmPlan:
    """The releases of a warm start, fixed before any record is read.

    Attributes:
        mechanism: Its mechanism.
        plan: Rows, relation and noise.
        sampling: How records enter.
        event: What is charged for each.
        num_releases: How many there are.
    """

    mechanism: Mechanism
    plan: ReleasePlan
    sampling: Sampling
    event: ReleaseEvent
    num_releases: int = 1


class WarmStart(ABC):
    """What is released first, and how long is learned from it.

    Args:
        budget: Share of the target epsilon that the release costs by itself, in (0, 1). What it leaves is more than the
            rest: the two compose by the accountant, not by addition.
        samples: Images drawn from what was released.
        steps: Steps on them.
        learning_rate: Adam's learning rate on them.

    Attributes:
        num_releases: Releases that are made.
        row_bound: Bound at which its rows are clipped.

    Raises:
        ConfigurationError: A value is out of range.
    """

    num_releases: int = 1
    row_bound: float = 1.0

    def __init__(
        self, *, budget: float = 0.2, samples: int = 10_000, steps: int = 300, learning_rate: float = 5e-3
    ) -> None:
        if not 0 < budget < 1:
            raise ConfigurationError(f"Expected warm_start.budget in (0, 1), a share of epsilon, got {budget=}.")
        for name, count in {"samples": samples, "steps": steps}.items():
            if count < 1:
                raise ConfigurationError(f"Expected warm_start.{name} >= 1, got {name}={count}.")
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise ConfigurationError(f"Expected a finite warm_start.learning_rate > 0, got {learning_rate=}.")
        self.budget, self.samples, self.steps, self.learning_rate = budget, samples, steps, learning_rate

    def plan_release(self, module: PrivateModule, settings: PrivacySettings, mechanism: Mechanism) -> WarmPlan:
        """Fix the noise of the release from public facts.

        Args:
            module: The method, which knows the public facts of the data.
            settings: The privacy of the whole run.
            mechanism: What makes the release private, or not, for a run without privacy.

        Raises:
            ConfigurationError: No target epsilon to take a share of, or no proof under the relation.
        """
        self.describe_module(module)
        spec, sampling = self.contribution_spec(), self.sampling
        spec.alternatives(settings.relation)
        mechanism.check(spec)

        def planned(noise_multiplier: float) -> ReleasePlan:
            return ReleasePlan(spec=spec, relation=settings.relation, noise_multiplier=noise_multiplier)

        noise = 1.0
        if mechanism.is_private:
            if settings.target_epsilon is None:
                raise ConfigurationError("warm_start.budget is a share of privacy.target_epsilon; give one.")
            noise = calibrate_noise_multiplier(
                target_epsilon=self.budget * settings.target_epsilon,
                target_delta=settings.target_delta,
                num_releases=self.num_releases,
                make_event=lambda value: mechanism.step_event(planned(value)),
                sampling=sampling,
                relation=settings.relation,
                accountant=settings.accountant,
            )
        plan = planned(noise)
        return WarmPlan(mechanism, plan, sampling, mechanism.step_event(plan), self.num_releases)

    def warm_up(self, module: PrivateModule, warm: WarmPlan, open_session: OpenSession, *, seed: int) -> None:
        """Make the release, and let the module learn from samples of it.

        Args:
            module: The method, before it is attached to its own session.
            warm: What `plan_release` gave.
            open_session: Opens the door for it.
            seed: Public seed of the samples and of the steps.
        """
        data = module.trainer.datamodule  # type: ignore[attr-defined]
        session = open_session(warm.mechanism, warm.plan, warm.sampling)
        own = module.ranks.owned(module.facts.num_records)
        mine, device = slice(own.start, None, own.step), module.device
        self.join_run(module, seed=seed)
        images, labels = self.released_samples(
            session, data.train_images[mine].to(device), data.train_labels[mine].to(device), own, seed=seed
        )
        made = len(session.ledger)  # nothing comes before a warm start
        if made != warm.num_releases:
            raise PrivacyProtocolError(f"A warm start planned {warm.num_releases} releases, and made {made}.")
        module.take_warm_start(
            PublicSamples(images.to(device), labels.to(device), self.source),
            steps=self.steps,
            learning_rate=self.learning_rate,
            seed=seed,
            releases=made,
        )

    @property
    def sampling(self) -> Sampling:
        """How records enter a release: all of them, unless a kind says otherwise."""
        return Sampling(scheme="full")

    @property
    def source(self) -> Generator | None:
        """The generator that the samples are drawn from, if a method may take its parameters over."""
        return None

    def join_run(self, module: PrivateModule, *, seed: int) -> None:  # noqa: B027  (most kinds need nothing of it)
        """Take what is known when training starts: device and processes.

        Args:
            module: The method.
            seed: Public seed.
        """

    @abstractmethod
    def describe_module(self, module: PrivateModule) -> None:
        """Take the public facts of the data, and of the method if they matter."""

    @abstractmethod
    def contribution_spec(self) -> ContributionSpec:
        """Return public facts about the rows of the release."""

    @abstractmethod
    def released_samples(
        self, session: ReleaseSession, images: Tensor, labels: Tensor, records: range, *, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Make the planned releases, each in a step of the session; return samples, (samples, C, H, W), and labels.

        Args:
            session: The door.
            images: uint8, (n, C, H, W). Private.
            labels: int64, (n,). Private.
            records: Their ids among all.
            seed: Public seed of the samples.
        """


class MomentsWarmStart(WarmStart):
    """DP-Moments first: a Gaussian per class from one release of counts, means and second moments.

    Args:
        budget: See `WarmStart`.
        samples: See `WarmStart`.
        steps: See `WarmStart`.
        learning_rate: See `WarmStart`.
        num_coefficients: Coefficients per channel of the public cosine basis.
        centre: See `MomentsRounds`, as all that follow.
        clip: See `MomentsRounds`.
        emphasis: See `ClassMoments`.
        block_weights: See `ClassMoments`.
        gain: See `ClassGaussianGenerator`, as all that follow.
        black: See `ClassGaussianGenerator`.
        distortion: See `ClassGaussianGenerator`; public, so what is learned from distorted samples costs nothing more.
        slant: See `ClassGaussianGenerator`.

    Raises:
        ConfigurationError: A value is out of range.
    """

    def __init__(
        self,
        *,
        budget: float = 0.2,
        samples: int = 10_000,
        steps: int = 300,
        learning_rate: float = 5e-3,
        num_coefficients: int = 78,
        centre: float = 3.0,
        clip: float = 6.0,
        emphasis: float = 0.0,
        block_weights: tuple[float, float, float] = (0.15, 0.35, 0.92),
        gain: float = 1.0,
        black: float = 0.0,
        distortion: tuple[float, float, float, float] | None = None,
        slant: float = 0.0,
    ) -> None:
        super().__init__(budget=budget, samples=samples, steps=steps, learning_rate=learning_rate)
        self.num_coefficients, self.centre, self.clip = num_coefficients, centre, clip
        self.emphasis, self.block_weights = emphasis, block_weights
        self.gain, self.black, self.distortion, self.slant = gain, black, distortion, slant
        self._generator: ClassGaussianGenerator | None = None

    @property
    def source(self) -> Generator | None:  # noqa: D102
        return self._generator

    def describe_module(self, module: PrivateModule) -> None:  # noqa: D102
        data = module.facts
        self._generator = ClassGaussianGenerator(
            data.image_shape,
            num_classes=data.num_classes,
            num_coefficients=self.num_coefficients,
            gain=self.gain,
            black=self.black,
            distortion=self.distortion,
            slant=self.slant,
        )
        _check_goes_on(getattr(module, "generator", None), self._generator)
        self._rounds = MomentsRounds(
            self._generator,
            centre=self.centre,
            clip=self.clip,
            emphasis=self.emphasis,
            block_weights=self.block_weights,
        )

    def contribution_spec(self) -> ContributionSpec:  # noqa: D102
        return self._rounds.statistics.contribution_spec()

    def released_samples(  # noqa: D102
        self, session: ReleaseSession, images: Tensor, labels: Tensor, records: range, *, seed: int
    ) -> tuple[Tensor, Tensor]:
        if self._generator is None:
            raise PrivacyProtocolError("plan_release() comes first.")
        rounds, generator = self._rounds.to(images.device), self._generator.to(images.device)
        session.begin_step()
        released = session.release(rounds.rows(images, labels, records), rounds.statistics.release_shape, images.device)
        session.end_step()
        fitted = rounds.absorb(released, 1)
        with torch.no_grad():
            for name, parameter in generator.named_parameters():
                parameter.copy_(fitted[name])
        return generator.sample(self.samples, seed=seed)


def _check_goes_on(theirs: object, fitted: ClassGaussianGenerator) -> None:
    """Refuse a method's class Gaussians that would read what is released in another way, or not at all."""
    if not isinstance(theirs, ClassGaussianGenerator):
        return
    for name in ("num_coefficients", "window", "num_components", "slant"):
        own, given = getattr(fitted, name), getattr(theirs, name)
        if own != given:
            raise ConfigurationError(
                f"Expected model.generator.{name}={own}, as the warm start fits it, got {given}: its parameters would "
                "mean something else. Give both the same; a warm start by moments has one component and no window."
            )

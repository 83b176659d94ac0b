"""A mechanism behind the real door of a run, overheard at the place where its noise has been added.

Nothing is computed again: rows go through `ReleaseSession.release`, which encodes, sums, charges a ledger and draws
noise from a `NoiseSource`. A copy of the mechanism reports what passes through `measure` and into `decode`.
"""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.events import (
    AdditiveRelease,
    GaussianRelease,
    ReleaseEvent,
    Sampling,
    TernaryRelease,
    relation_name,
)
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.gradients.ranks import ALONE, Ranks
from lightning_dp.gradients.teachers import RowChunk
from lightning_dp.mechanisms.base import Mechanism, ReleasePlan
from lightning_dp.mechanisms.noise import NoiseSource
from lightning_dp.modules.release import ReleaseSession

FULL = Sampling(scheme="full")


@dataclass(frozen=True)
class Heard:
    """What was overheard of one release.

    Attributes:
        measured: What the noise was added to, flat, float64. Private in a real run.
        noisy: What `decode` was handed, flat, float64.
        released: What left, flat, float32.
    """

    measured: Tensor
    noisy: Tensor
    released: Tensor


class Tap:
    """A copy of a mechanism that reports what passes through it.

    Args:
        mechanism: The mechanism; left as it is.
        silent: Leave out local noise, for comparisons of what rows add.
    """

    def __init__(self, mechanism: Mechanism, *, silent: bool = False) -> None:
        self.mechanism = copy.copy(mechanism)
        self.measured: list[Tensor] = []
        self.noisy: list[Tensor] = []
        real_measure, real_decode = self.mechanism.measure, self.mechanism.decode

        def measure(total: Tensor, *rest: Any, **named: Any) -> Tensor:
            found = real_measure(total, *rest, **named)
            self.measured.append(found.detach().clone().double().flatten())
            return found

        def decode(noisy: Tensor, *rest: Any, **named: Any) -> Tensor:
            self.noisy.append(noisy.detach().clone().double().flatten())
            return real_decode(noisy, *rest, **named)

        # Attributes of the copy come before the methods of its class.
        vars(self.mechanism).update(measure=measure, decode=decode)
        if silent:
            vars(self.mechanism)["perturb_rows"] = lambda encoded, plan, context: encoded


def _noise_source(seed: int | None) -> NoiseSource:
    return NoiseSource(insecure_seed=seed)


def _always(event: ReleaseEvent, sampling: Sampling) -> None:
    return


@dataclass(frozen=True, kw_only=True)
class Door:
    """What is audited: one mechanism under one plan, and the parts of a run around it.

    Attributes:
        mechanism: The mechanism.
        plan: Rows, relation and noise.
        session: Class of the door.
        make_noise: Makes the noise source from a seed; None is a fresh secret.
        ranks: The processes of the run.
        public_seed: Seed of public randomness.
        may_release: Asked before each release.
    """

    mechanism: Mechanism
    plan: ReleasePlan
    session: type[ReleaseSession] = ReleaseSession
    make_noise: Callable[[int | None], NoiseSource] = field(default_factory=lambda: _noise_source)
    ranks: Ranks = ALONE
    public_seed: int = 0
    may_release: Callable[[ReleaseEvent, Sampling], None] = field(default_factory=lambda: _always)

    def open(self, *, seed: int | None = None, silent: bool = False) -> "OpenDoor":
        """Return a door with a ledger and a noise source of its own, ready for releases.

        Args:
            seed: Of the noise, to have it again; None is a fresh secret.
            silent: See `Tap`.
        """
        return OpenDoor(self, seed=seed, silent=silent)

    @property
    def shape(self) -> tuple[int, int]:
        """(num_vectors, vector_dim) of a release."""
        return self.plan.spec.num_vectors, self.plan.spec.vector_dim

    @property
    def event(self) -> ReleaseEvent:
        """What one release is charged."""
        return self.mechanism.step_event(self.plan)

    @property
    def sensitivity(self) -> float:
        """How far neighbours may be apart before noise."""
        return self.mechanism.l2_sensitivity(self.plan.spec, self.plan.relation)

    @property
    def has_additive_noise(self) -> bool:
        """Whether the event states independent noise on what is measured."""
        return isinstance(self.event, AdditiveRelease)

    @property
    def has_gaussian_noise(self) -> bool:
        """Whether that noise is Gaussian, or what becomes of Gaussian noise by rounding."""
        return isinstance(self.event, GaussianRelease)

    @property
    def law(self) -> "NoiseLawOf":
        """The law of the noise that the event states."""
        return NoiseLawOf(self.mechanism, self.plan)

    @property
    def charges_noisy_value(self) -> bool:
        """Whether all of what `decode` is handed was paid for, or only what leaves it."""
        return not isinstance(self.event, TernaryRelease)

    def epsilon(self, delta: float, *, sampling: Sampling = FULL, releases: int = 1) -> float:
        """Return the epsilon that the accountant proves for some releases.

        Args:
            delta: Of the statement.
            sampling: How units enter.
            releases: How many.
        """
        counts = {(self.event, sampling): releases}
        return compute_epsilon(counts, delta=delta, relation=self.plan.relation).epsilon

    def __str__(self) -> str:
        spec = self.plan.spec
        return (
            f"{type(self.mechanism).__name__} on {spec.kind} rows ({spec.num_vectors} x {spec.vector_dim}), "
            f"{relation_name(self.plan.relation)}, noise multiplier {self.plan.noise_multiplier:g}"
        )


class NoiseLawOf:
    """The law of additive noise: normal, normal and rounded to whole steps, or discrete normal on whole steps.

    Args:
        mechanism: The mechanism.
        plan: Its plan.

    Attributes:
        step: Of what the noise is a whole multiple; 0 where it is of nothing.
    """

    def __init__(self, mechanism: Mechanism, plan: ReleasePlan) -> None:
        self._law, self._scale = mechanism.noise, mechanism.noise_std(plan)
        self.step = 0.0 if self._law == "gaussian" else mechanism.grid_step(plan.spec)

    @property
    def std(self) -> float:
        """Standard deviation of the noise that is drawn."""
        if self._law == "gaussian":
            return self._scale
        if self._law == "rounded_gaussian":
            return math.sqrt(self._scale**2 + self.step**2 / 12)
        steps, masses = self._masses()
        return self.step * math.sqrt(float((masses * steps**2).sum()))

    def cdf(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the chance of no more than each value."""
        if self._law == "discrete_gaussian":
            steps, masses = self._masses()
            places = np.searchsorted(steps, np.rint(values / self.step), side="right")
            below: NDArray[np.float64] = np.concatenate([[0.0], np.cumsum(masses)])[places]
            return below
        found: NDArray[np.float64] = stats.norm.cdf((values + self.step / 2) / self._scale)
        return found

    def _masses(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        relative = self._scale / self.step
        last = math.ceil(12 * relative) + 3
        steps = np.arange(-last, last + 1, dtype=np.float64)
        weights = np.exp(-(steps**2) / (2 * relative**2))
        return steps, weights / weights.sum()


class OpenDoor:
    """A `Door` in use.

    Args:
        door: What is audited.
        seed: See `Door.open`.
        silent: See `Tap`.
    """

    def __init__(self, door: Door, *, seed: int | None, silent: bool) -> None:
        self.door = door
        self.tap = Tap(door.mechanism, silent=silent)
        header = {"relation": relation_name(door.plan.relation), "unit": door.plan.spec.unit}
        self.ledger = PrivacyLedger(header, None)
        self.session = door.session(
            mechanism=self.tap.mechanism,
            plan=door.plan,
            ledger=self.ledger,
            sampling=FULL,
            noise=door.make_noise(seed),
            public_seed=door.public_seed,
            may_release=door.may_release,
            ranks=door.ranks,
        )

    def release(self, chunks: Iterable[RowChunk]) -> Heard:
        """Make one release of some rows.

        Args:
            chunks: Rows, as a method would hand them in.
        """
        self.session.begin_step()
        released = self.session.release(chunks, self.door.shape, torch.device("cpu"))
        self.session.end_step()
        heard = Heard(self.tap.measured[-1], self.tap.noisy[-1], released.value.flatten())
        self.tap.measured.clear()
        self.tap.noisy.clear()
        return heard

"""What a user asks of privacy, and what follows from it before the first release: noise, or the number of releases."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from dp_accounting import NeighboringRelation

from lightning_dp.accounting.accountants import Accountant, compute_epsilon
from lightning_dp.accounting.calibration import calibrate_noise_multiplier, max_releases
from lightning_dp.accounting.composition import Counts
from lightning_dp.accounting.events import ReleaseEvent, Sampling, parse_relation
from lightning_dp.errors import ConfigurationError
from lightning_dp.wording import counted


@dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """The privacy of a run, as flags.

    Give two of: target_epsilon, noise_multiplier, and the length of the run (--trainer.max_steps). The third follows.

    Args:
        neighboring_relation: What one step between neighbouring data sets does: replace_one, replace_special (a record
            becomes empty) or add_or_remove_one. Every epsilon is stated under it.
        target_epsilon: Epsilon that the whole run may spend.
        target_delta: Delta at which epsilon is stated, in (0, 1); keep it below 1 / number of records.
        noise_multiplier: Noise std / L2 sensitivity under the relation.
        accountant: auto takes the exact Gaussian curve where a run is exactly Gaussian, else PLD with RDP as fallback.
        insecure_seed: Fixes the noise for debugging. The run is then not private and the claim says so.
    """

    neighboring_relation: str
    target_epsilon: float | None = None
    target_delta: float = 1e-5
    noise_multiplier: float | None = None
    accountant: Accountant = "auto"
    insecure_seed: int | None = None

    def __post_init__(self) -> None:
        parse_relation(self.neighboring_relation)
        for name, value in (("target_epsilon", self.target_epsilon), ("noise_multiplier", self.noise_multiplier)):
            if value is not None and not (math.isfinite(value) and value > 0):
                hint = " Use --mechanism NoPrivacy for a run without noise." if name == "noise_multiplier" else ""
                raise ConfigurationError(f"Expected a finite privacy.{name} > 0, got {name}={value}.{hint}")
        if not 0 < self.target_delta < 1:
            raise ConfigurationError(f"Expected 0 < privacy.target_delta < 1, got target_delta={self.target_delta}.")

    @property
    def relation(self) -> NeighboringRelation:
        """The neighbouring relation as dp_accounting names it."""
        return parse_relation(self.neighboring_relation)


@dataclass(frozen=True, kw_only=True)
class PrivacyBudget:
    """What was decided before the first release.

    Attributes:
        noise_multiplier: Noise std / L2 sensitivity.
        num_releases: Planned releases in all; the run ends after them.
        epsilon: Epsilon that the ledger may not cross; what the planned releases cost where no target was given.
        delta: Delta of that epsilon.
        num_before: How many of the releases are made before the method's own, by a warm start.
    """

    noise_multiplier: float
    num_releases: int
    epsilon: float
    delta: float
    num_before: int = 0

    @property
    def num_own(self) -> int:
        """Planned releases of the method itself."""
        return self.num_releases - self.num_before


def resolve_budget(
    settings: PrivacySettings,
    *,
    make_event: Callable[[float], ReleaseEvent],
    sampling: Sampling,
    max_steps: int | None,
    before: Counts | None = None,
) -> PrivacyBudget:
    """Return noise and length of a run from what the user gave.

    Args:
        settings: The user's flags.
        make_event: The event of one release at a given noise multiplier.
        sampling: How units enter a release.
        max_steps: Planned number of releases, None where the user left it open.
        before: Releases of other kinds that the same budget pays first.

    Raises:
        ConfigurationError: Too few or contradictory settings.
    """
    num_before = sum((before or {}).values())
    if settings.noise_multiplier is not None:
        event = make_event(settings.noise_multiplier)
        length, epsilon = _length(settings, event, sampling, max_steps, before)
        noise = settings.noise_multiplier
    elif settings.target_epsilon is not None:
        length, epsilon = _given_length(settings.target_epsilon, max_steps), settings.target_epsilon
        noise = calibrate_noise_multiplier(
            target_epsilon=epsilon,
            target_delta=settings.target_delta,
            num_releases=length,
            make_event=make_event,
            sampling=sampling,
            relation=settings.relation,
            accountant=settings.accountant,
            before=before,
        )
    else:
        raise ConfigurationError(
            "No privacy setting: give --privacy.target_epsilon or --privacy.noise_multiplier "
            "(or --mechanism NoPrivacy for a run without noise)."
        )
    return PrivacyBudget(
        noise_multiplier=noise,
        num_releases=num_before + length,
        epsilon=epsilon,
        delta=settings.target_delta,
        num_before=num_before,
    )


def _given_length(target: float, max_steps: int | None) -> int:
    if max_steps is None:
        raise ConfigurationError(
            f"privacy.target_epsilon={target} alone fixes neither noise nor length: "
            "add --trainer.max_steps (noise is calibrated) or --privacy.noise_multiplier (length follows)."
        )
    return max_steps


def _length(
    settings: PrivacySettings, event: ReleaseEvent, sampling: Sampling, max_steps: int | None, before: Counts | None
) -> tuple[int, float]:
    """Return how many releases of a given noise the run makes, and the epsilon that they keep."""
    target, noise, delta = settings.target_epsilon, settings.noise_multiplier, settings.target_delta
    if target is None:
        if max_steps is None:
            raise ConfigurationError(
                f"privacy.noise_multiplier={noise} alone does not bound the run: "
                "add --trainer.max_steps or --privacy.target_epsilon."
            )
        counts = dict(before or {})
        counts[event, sampling] = counts.get((event, sampling), 0) + max_steps
        spent = compute_epsilon(counts, delta=delta, relation=settings.relation, accountant=settings.accountant)
        return max_steps, spent.epsilon
    allowed = max_releases(
        event=event,
        sampling=sampling,
        target_epsilon=target,
        target_delta=delta,
        relation=settings.relation,
        accountant=settings.accountant,
        before=before,
    )
    if allowed == 0:
        raise ConfigurationError(
            f"privacy.noise_multiplier={noise} is too small: one release already costs more than "
            f"privacy.target_epsilon={target} at delta={delta:g}. Raise the noise or the target."
        )
    if max_steps is not None and max_steps > allowed:
        raise ConfigurationError(
            f"Contradictory settings: privacy.noise_multiplier={noise} allows {counted(allowed, 'release')} within "
            f"privacy.target_epsilon={target}, but trainer.max_steps={max_steps}. Drop one of the three."
        )
    return min(allowed, max_steps or allowed), target

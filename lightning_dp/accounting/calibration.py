"""The noise for a planned number of releases, and the number of releases for a given noise; both before the first."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from dp_accounting import NeighboringRelation

from lightning_dp.accounting.accountants import Accountant, checked_delta, compute_epsilon, quick_epsilon_bound
from lightning_dp.accounting.composition import Counts, canonical_terms, is_unsampled
from lightning_dp.accounting.events import (
    GaussianRelease,
    NonPrivateRelease,
    ReleaseEvent,
    Sampling,
    TernaryRelease,
    parse_relation,
)
from lightning_dp.accounting.search import largest_count, smallest_noise
from lightning_dp.errors import ConfigurationError


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    target_delta: float,
    num_releases: int,
    make_event: Callable[[float], ReleaseEvent],
    sampling: Sampling,
    relation: str | NeighboringRelation,
    accountant: Accountant = "auto",
    before: Counts | None = None,
) -> float:
    """Return the smallest noise multiplier at which the planned releases keep the budget.

    Searched with quick bounds first (exact when nothing is sampled), then with privacy loss distributions near the
    result, coarse ones first, since a distribution at far too little noise takes minutes.

    Args:
        target_epsilon: Epsilon of the whole run, finite and > 0.
        target_delta: Its delta, in (0, 1).
        num_releases: Planned number of releases, >= 1.
        make_event: The event of one release at a given noise multiplier; more noise must not cost more.
        sampling: How records enter each release.
        relation: The neighbouring relation of the events' sensitivities.
        accountant: The one that will state the epsilon, as in `compute_epsilon`.
        before: Releases of other kinds that the same budget pays, fixed beforehand.

    Returns:
        The multiplier; its epsilon is never above the target and at most 1e-5 of the target below it, unless the
        curve jumps.

    Raises:
        ConfigurationError: An invalid target, delta, count or relation, a non-private event, or a target that no
            amount of noise reaches.

    Example:
        >>> noise = calibrate_noise_multiplier(
        ...     target_epsilon=1.0, target_delta=1e-5, num_releases=100, relation="replace_one",
        ...     make_event=lambda m: GaussianRelease(noise_std=m, l2_sensitivity=1.0), sampling=Sampling(scheme="full"),
        ... )
        >>> round(noise, 4)
        37.3063
    """
    target, delta, relation = _checked_target(target_epsilon), checked_delta(target_delta), parse_relation(relation)
    if isinstance(num_releases, bool) or not isinstance(num_releases, int) or num_releases < 1:
        raise ConfigurationError(f"Expected num_releases to be an integer >= 1, got num_releases={num_releases!r}.")
    _refuse_non_private(make_event(1.0))

    def planned(noise: float) -> Counts:
        return _joined(before, make_event(noise), sampling, num_releases)

    noise = _NoiseCurve(planned, delta, relation, accountant).least_noise(target)
    if math.isinf(noise):
        raise ConfigurationError(
            f"No noise multiplier reaches target_epsilon={target} at target_delta={delta:g} for "
            f"num_releases={num_releases}. Raise the target or make fewer releases."
        )
    return noise


@dataclass(frozen=True)
class _NoiseCurve:
    """Epsilon of planned releases over their noise multiplier, by ways that take longer the closer they come."""

    planned: Callable[[float], Counts]
    delta: float
    relation: NeighboringRelation
    accountant: Accountant

    def least_noise(self, target: float) -> float:
        """Return the smallest noise multiplier whose epsilon is at most the target; infinity if there is none."""
        if is_unsampled(canonical_terms(self.planned(1.0))):
            noise = smallest_noise(self.quick, target, guess=1.0, rel_tol=1e-7)
            is_exact = self.accountant == "auto" or math.isinf(noise)
            return noise if is_exact else smallest_noise(self.full, target, guess=noise)
        if self.relation is NeighboringRelation.REPLACE_ONE:
            # A guess may find releases that come before beyond the target, which hold it: look further up then.
            guesses = (smallest_noise(self.amplified, factor * target, guess=1.0, rel_tol=1e-3) for factor in (1, 2, 4))
            noise = next((guess for guess in guesses if math.isfinite(guess)), math.inf)
        else:
            noise = smallest_noise(self.quick, target, guess=1.0, rel_tol=1e-3)
        for exact in (self.rough, self.full):
            noise = noise if math.isinf(noise) else smallest_noise(exact, target, guess=noise)
        return noise

    def quick(self, noise: float) -> float:
        """Return a bound without a privacy loss distribution; exact where nothing is sampled."""
        return quick_epsilon_bound(self.planned(noise), delta=self.delta, relation=self.relation)

    def amplified(self, noise: float) -> float:
        """Return a guess under replace-one, where no quick bound knows a gain from sampling: twice add-or-remove."""
        way = NeighboringRelation.ADD_OR_REMOVE_ONE
        counts = {(_as_add_or_remove(event), how): count for (event, how), count in self.planned(noise).items()}
        return 2.0 * quick_epsilon_bound(counts, delta=self.delta, relation=way)

    def rough(self, noise: float) -> float:
        """Return a bound by distributions on a coarse grid."""
        return self.full(noise, is_rough=True)

    def full(self, noise: float, *, is_rough: bool = False) -> float:
        """Return what the claim will state."""
        counts = self.planned(noise)
        return compute_epsilon(
            counts, delta=self.delta, relation=self.relation, accountant=self.accountant, is_rough=is_rough
        ).epsilon


def max_releases(
    *,
    event: ReleaseEvent,
    sampling: Sampling,
    target_epsilon: float,
    target_delta: float,
    relation: str | NeighboringRelation,
    accountant: Accountant = "auto",
    before: Counts | None = None,
) -> int:
    """Return how many releases of one kind the budget holds.

    The number depends on no data, so a run may be planned and stopped by it.

    Args:
        event: The event of every release.
        sampling: How records enter each release.
        target_epsilon: Epsilon of the whole run, finite and > 0.
        target_delta: Its delta, in (0, 1).
        relation: The neighbouring relation of the event's sensitivity.
        accountant: The one that will state the epsilon, as in `compute_epsilon`.
        before: Releases of other kinds that the same budget pays, fixed beforehand.

    Returns:
        The largest count whose epsilon is at most the target; 0 if one release is too much; at most 10^9.

    Raises:
        ConfigurationError: An invalid target, delta or relation, or a non-private event.
    """
    target, delta, relation = _checked_target(target_epsilon), checked_delta(target_delta), parse_relation(relation)
    _refuse_non_private(event)

    def quick(count: int) -> float:
        return quick_epsilon_bound(_joined(before, event, sampling, count), delta=delta, relation=relation)

    allowed = largest_count(quick, target)
    if accountant == "auto" and is_unsampled(canonical_terms(_joined(before, event, sampling, 1))):
        return allowed

    def full(count: int) -> float:
        counts = _joined(before, event, sampling, count)
        return compute_epsilon(counts, delta=delta, relation=relation, accountant=accountant).epsilon

    return largest_count(full, target, guess=allowed)


def _joined(before: Counts | None, event: ReleaseEvent, sampling: Sampling, count: int) -> Counts:
    """Return the counts of a whole run: what comes first, and `count` releases of one kind."""
    counts = dict(before or {})
    counts[event, sampling] = counts.get((event, sampling), 0) + count
    return counts


def _checked_target(target_epsilon: float) -> float:
    """Return the target as a float if it is one that can be reached."""
    try:
        target = float(target_epsilon) if not isinstance(target_epsilon, (bool, str)) else math.nan
    except (TypeError, ValueError):
        target = math.nan
    if not (math.isfinite(target) and target > 0.0):
        raise ConfigurationError(
            f"Expected a finite target_epsilon > 0, got target_epsilon={target_epsilon!r}. "
            "For a run without privacy choose a mechanism without noise."
        )
    return target


def _refuse_non_private(event: ReleaseEvent) -> None:
    if isinstance(event, NonPrivateRelease):
        raise ConfigurationError(
            "Expected a private event, got NonPrivateRelease(): its epsilon is infinite at any noise and any count. "
            "Leave target_epsilon out or choose another mechanism."
        )


def _as_add_or_remove(event: ReleaseEvent) -> ReleaseEvent:
    """Return a rough stand-in for an event under replace-one, to guess by: half the sensitivity costs about half."""
    if isinstance(event, TernaryRelease) or not isinstance(event, GaussianRelease):
        return event
    return replace(event, noise_std=2.0 * event.noise_std)

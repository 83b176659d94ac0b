"""Audit C with many trials: what the mechanism adds to two neighbouring sums, drawn up to millions of times.

The sums are those that the real door measured, of rows that are cut short where the mechanism takes them: the price of
a release depends on the noise multiplier, not on their length. Only coordinates in which the sums differ are drawn:
noise elsewhere is independent, which the audit of noise hygiene looks at.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from dp_accounting import NeighboringRelation
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.events import GaussianRelease, Sampling
from lightning_dp.auditing.bounds import (
    clopper_pearson_upper,
    epsilon_of_rates,
    is_refuted,
    middle_errors,
    privacy_profile,
    tail_errors,
)
from lightning_dp.auditing.door import FULL, Door
from lightning_dp.auditing.neighbours import Pair, neighbouring_pairs
from lightning_dp.auditing.result import ALARM_CONFIDENCE, AuditResult, judge
from lightning_dp.auditing.sensitivity import compare
from lightning_dp.auditing.two_worlds import trade_off_plot
from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.poisson import PoissonSampler
from lightning_dp.mechanisms.von_mises_fisher import VonMisesFisher

FINDS = "noise that is a few percent short, or of another law, on the worst known neighbours, by its effect on epsilon"
MISSES = (
    "what happens between the mechanism's sum and the door, noise that repeats from release to release, neighbours "
    "that are worse than those on the list"
)
MOST_DRAWS = 4_000_000
MOST_NUMBERS = 10_000_000
"""Drawn for one world, however many coordinates differ."""

_BLOCK = 2**17  # numbers at a time
_TIE = 1e-4  # of the distance may go for fewer coordinates
_SHORT = 64  # coordinates of a release that are worth their cost, where they are independent
_SPHERE = 1000  # and where they are a direction, whose law comes near a Gaussian's in many dimensions


@dataclass(frozen=True)
class _Sums:
    """Two neighbouring sums, and the one without the record, where they differ.

    Attributes:
        pair: What they are sums of.
        left: (coordinates,), float64.
        right: The same.
        absent: The same.
    """

    pair: Pair
    left: Tensor
    right: Tensor
    absent: Tensor

    @property
    def direction(self) -> Tensor:
        """Unit vector from left to right."""
        return (self.right - self.left) / (self.right - self.left).norm()

    def place(self, values: Tensor) -> float:
        """Return where a sum lies along the direction, halfway between the worlds being zero."""
        return float((values - (self.left + self.right) / 2) @ self.direction)


def can_draw(door: Door) -> bool:
    """Tell whether what the mechanism adds to a sum is all of its noise, and all of what it charges."""
    is_direction = isinstance(door.mechanism, VonMisesFisher) and door.mechanism.form == "central"
    return door.charges_noisy_value and (door.has_additive_noise or is_direction)


def audit_draws(
    door: Door,
    *,
    draws: int = MOST_DRAWS,
    numbers: int = MOST_NUMBERS,
    sampling: Sampling = FULL,
    confidence: float = 0.95,
    delta: float = 1e-5,
) -> AuditResult:
    """Bound epsilon of one release from many draws of the worst pair of neighbouring sums.

    Two bounds: of whatever mechanism, from the rates at the best threshold; and of the stated law, where that is
    Gaussian: the largest noise multiplier that the rates allow, charged as one release with the stated sampling.

    Args:
        door: What is audited; see `can_draw`.
        draws: Trials of each world, at most.
        numbers: Coordinates that are drawn of each world, at most.
        sampling: How the canary enters a release: always, or by coins of a real `PoissonSampler`.
        confidence: Of the lower bounds.
        delta: Of the claim.
    """
    door = _with_short_rows(door)
    sums, is_gaussian = _worst_sums(door), door.has_gaussian_noise
    trials = max(16, min(draws, numbers // _numbers_a_trial(door, sums)))
    without, with_it = (_scores(door, sums, world, trials, FULL) for world in (sums.left, sums.right))
    errors = middle_errors(without, with_it)
    profiles = [(privacy_profile({(door.event, FULL): 1}, relation=door.plan.relation), errors)]
    if sampling.scheme != "full":
        without, with_it = (_scores(door, sums, world, trials, sampling) for world in (sums.left, sums.right))
    tail, claimed = tail_errors(without, with_it, delta=delta), door.epsilon(delta, sampling=sampling)
    profile = [(claimed, delta), *privacy_profile({(door.event, sampling): 1}, relation=door.plan.relation)]
    profiles += [(tuple(profile), found) for found in (tail, middle_errors(without, with_it))]
    measured = {
        "epsilon_any_mechanism": tail.epsilon(delta=delta, confidence=confidence),
        "epsilon_attainable": math.nan,
        "epsilon_stated_law": math.nan,
        "mu": errors.mu(confidence=confidence),
        "trials": float(trials),
        "coordinates": float(len(sums.left)),
    }
    if is_gaussian:
        measured["epsilon_attainable"] = _attainable(door, sums, sampling, trials // 2, delta, confidence)
        measured["epsilon_stated_law"] = _epsilon_of_law(measured["mu"], sampling, door.plan.relation, delta)
    bound = max(measured["epsilon_any_mechanism"], measured["epsilon_stated_law"] if is_gaussian else 0.0)
    return AuditResult(
        audit="draws",
        subject=f"{door}; {sums.pair.name}",
        lower_bound=bound,
        confidence=confidence,
        claimed_epsilon=claimed,
        delta=delta,
        verdict=judge(
            is_alarm=any(is_refuted(points, found, confidence=ALARM_CONFIDENCE) for points, found in profiles),
            is_doubt=bound > claimed,
        ),
        summary=_summary(measured, is_gaussian=is_gaussian),
        finds=FINDS,
        misses=MISSES,
        measured=measured,
        plot=trade_off_plot(without, with_it, profile),
    )


def _numbers_a_trial(door: Door, sums: _Sums) -> int:
    """Return how many numbers a trial is worth; directions are drawn one by one, which takes as long as many."""
    return max(len(sums.left), 1 if door.has_additive_noise else 2 * _SPHERE)


def _summary(measured: Mapping[str, float], *, is_gaussian: bool) -> str:
    """Return what was measured, in one line."""
    told = (
        f"{measured['trials']:.0f} draws of each world, {measured['coordinates']:.0f} coordinates: epsilon at least "
        f"{measured['epsilon_any_mechanism']:.3g} of any mechanism"
    )
    if not is_gaussian:
        return told
    return (
        f"{told}, of which {measured['epsilon_attainable']:.3g} are within reach of so many trials; "
        f"{measured['epsilon_stated_law']:.3g} of the stated law (mu {measured['mu']:.4g})"
    )


def _with_short_rows(door: Door) -> Door:
    """Return the door with shorter rows, if the mechanism takes them: more trials for the same price of a release."""
    spec, is_additive = door.plan.spec, door.has_additive_noise
    dim = max(2, (_SHORT if is_additive else _SPHERE) // spec.num_vectors)
    if dim >= spec.vector_dim:
        return door
    segments = None if spec.segments is None else (dim // 2, dim - dim // 2)
    short = replace(door, plan=replace(door.plan, spec=replace(spec, vector_dim=dim, segments=segments)))
    try:
        door.mechanism.check(short.plan.spec)
    except ConfigurationError:  # more votes than coordinates
        return door
    return short


def _worst_sums(door: Door) -> _Sums:
    """Return the neighbours that are furthest apart, those with the fewest differing coordinates of equals."""
    found: tuple[float, int, Pair] | None = None
    for pair in neighbouring_pairs(door):
        shift, left, right = compare(door, pair)
        width = int((left.measured != right.measured).sum())
        if (
            found is None
            or shift > found[0] * (1 + _TIE)
            or (shift > found[0] * (1 - _TIE) and (width, len(pair)) < (found[1], len(found[2])))
        ):
            found = (shift, width, pair)
    assert found is not None  # every relation with a proof has a change, and the lists of canaries are fixed
    pair = found[2]
    worlds = (pair.left, pair.right, pair.absent)
    here, there, base = (door.open(seed=0, silent=True).release(world).measured for world in worlds)
    chosen = here != there if door.has_additive_noise else torch.ones_like(here, dtype=torch.bool)
    return _Sums(pair, here[chosen], there[chosen], base[chosen])


def _scores(door: Door, sums: _Sums, world: Tensor, trials: int, sampling: Sampling) -> NDArray[np.float64]:
    """Return the places of draws along the line between the worlds."""
    direction, middle = sums.direction, sums.place(torch.zeros_like(world))
    if door.has_additive_noise:
        blocks = _additive_draws(door, sums, world, trials, sampling)
    else:
        blocks = _directions(door, sums, world, trials, sampling)
    return torch.cat([noisy @ direction + middle for noisy in blocks]).numpy()


def _additive_draws(door: Door, sums: _Sums, world: Tensor, trials: int, sampling: Sampling) -> Iterator[Tensor]:
    noise, width = door.make_noise(None), len(world)
    per_block = max(1, _BLOCK // width)
    for number, start in enumerate(range(0, trials, per_block), start=1):
        values = _taking_part(sums, world, min(per_block, trials - start), sampling)
        yield door.mechanism.perturb(values, door.plan, noise, release_number=number)


def _directions(door: Door, sums: _Sums, world: Tensor, trials: int, sampling: Sampling) -> Iterator[Tensor]:
    noise = door.make_noise(None)
    for number, values in enumerate(_taking_part(sums, world, trials, sampling, copy=False), start=1):
        shaped = values.reshape(door.shape)
        yield door.mechanism.perturb(shaped, door.plan, noise, release_number=number).reshape(1, -1)


def _taking_part(sums: _Sums, world: Tensor, num: int, sampling: Sampling, *, copy: bool = True) -> Tensor:
    """Return the sums of so many trials, (num, coordinates): with the canary where its coin says so."""
    if sampling.scheme == "full":
        everywhere = world.expand(num, -1)
        return everywhere.clone() if copy else everywhere
    joins = torch.zeros(num, 1, dtype=torch.bool)
    joins[PoissonSampler(num, sampling.rate).draw()] = True
    return torch.where(joins, world, sums.absent)


def _epsilon_of_law(mu: float, sampling: Sampling, relation: NeighboringRelation, delta: float) -> float:
    """Return what one Gaussian release with 1 / mu for noise multiplier costs."""
    if mu < 1e-6:
        return 0.0
    event = GaussianRelease(noise_std=1 / mu, l2_sensitivity=1.0)
    return compute_epsilon({(event, sampling): 1}, delta=delta, relation=relation).epsilon


def _attainable(door: Door, sums: _Sums, sampling: Sampling, trials: int, delta: float, confidence: float) -> float:
    """Return the bound of any mechanism where rates are the expected ones, at the best threshold."""
    std, rate = door.law.std, 1.0 if sampling.scheme == "full" else sampling.rate
    left, right, absent = (sums.place(world) / std for world in (sums.left, sums.right, sums.absent))
    thresholds = np.linspace(-6, 6, 241)
    alpha, best = (1 - confidence) / 2, 0.0

    def share(place: float, of: NDArray[np.float64]) -> NDArray[np.float64]:
        mixed: NDArray[np.float64] = rate * stats.norm.sf(of - place) + (1 - rate) * stats.norm.sf(of - absent)
        return mixed

    for positives, power in zip(share(left, thresholds), share(right, thresholds), strict=True):
        a = clopper_pearson_upper(positives * trials, trials, alpha)
        b = clopper_pearson_upper((1 - power) * trials, trials, alpha)
        best = max(best, epsilon_of_rates(a, b, delta))
    return best

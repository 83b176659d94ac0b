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
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.events import GaussianRelease, Sampling
from lightning_dp.auditing.bounds import (
    Errors,
    clopper_pearson_upper,
    epsilon_of_rates,
    is_refuted,
    middle_errors,
    privacy_profile,
    tail_errors,
)
from lightning_dp.auditing.direction_law import DirectionLaw
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
_OFF_THE_LINE = 1e-6  # of the distance between sums that are taken as being on one line
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

    Two bounds: of whatever mechanism, from the rates at the best threshold; and of the stated law: the least noise that
    the rates allow, charged as one release with the stated sampling, where that is Gaussian; where it is a direction,
    and the sums lie on one line, the epsilon of this pair at the least concentration that the rates allow.

    Args:
        door: What is audited; see `can_draw`.
        draws: Trials of each world, at most.
        numbers: Coordinates that are drawn of each world, at most.
        sampling: How the canary enters a release: always, or by coins of a real `PoissonSampler`.
        confidence: Of the lower bounds.
        delta: Of the claim.
    """
    door = _with_short_rows(door)
    sums = _worst_sums(door)
    trials = max(16, min(draws, numbers // _numbers_a_trial(door, sums)))
    present = _scores(door, sums, trials, FULL)
    scores = present if sampling.scheme == "full" else _scores(door, sums, trials, sampling)
    errors, tail = middle_errors(*present), tail_errors(*scores, delta=delta)
    claimed = door.epsilon(delta, sampling=sampling)
    profile = ((claimed, delta), *_profile(door, sampling))
    profiles = [(_profile(door, FULL), errors), (profile, tail), (profile, middle_errors(*scores))]
    by_rates = tail.epsilon(delta=delta, confidence=confidence)
    by_law = _epsilon_of_law(door, sums, errors, sampling, delta, confidence)
    measured = {
        "epsilon_any_mechanism": by_rates,
        "epsilon_attainable": _attainable(door, sums, sampling, trials // 2, delta, confidence),
        "epsilon_stated_law": by_law,
        "mu": errors.mu(confidence=confidence),
        "trials": float(trials),
        "coordinates": float(len(sums.left)),
    }
    bound = by_rates if math.isnan(by_law) else max(by_rates, by_law)
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
        summary=_summary(measured),
        finds=FINDS,
        misses=MISSES,
        measured=measured,
        plot=trade_off_plot(*scores, profile),
    )


def _numbers_a_trial(door: Door, sums: _Sums) -> int:
    """Return how many numbers a trial is worth; directions are drawn one by one, which takes as long as many."""
    return max(len(sums.left), 1 if door.has_additive_noise else 2 * _SPHERE)


def _summary(measured: Mapping[str, float]) -> str:
    """Return what was measured, in one line."""
    told = (
        f"{measured['trials']:.0f} draws of each world, {measured['coordinates']:.0f} coordinates: epsilon at least "
        f"{measured['epsilon_any_mechanism']:.3g} of any mechanism"
    )
    if math.isnan(measured["epsilon_stated_law"]):
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


def _profile(door: Door, sampling: Sampling) -> tuple[tuple[float, float], ...]:
    """Return the curve that one release is charged."""
    return tuple(privacy_profile({(door.event, sampling): 1}, relation=door.plan.relation))


def _scores(
    door: Door, sums: _Sums, trials: int, sampling: Sampling
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the places of draws of both worlds along the line between them."""
    return _places(door, sums, sums.left, trials, sampling), _places(door, sums, sums.right, trials, sampling)


def _places(door: Door, sums: _Sums, world: Tensor, trials: int, sampling: Sampling) -> NDArray[np.float64]:
    """Return the places of draws of one world."""
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


def _direction_law(door: Door, sums: _Sums) -> DirectionLaw | None:
    """Return the law of what is drawn, if it is a direction and the sums lie on one line."""
    mechanism = door.mechanism
    if not isinstance(mechanism, VonMisesFisher):
        return None
    worlds = (sums.left, sums.right, sums.absent)
    places = [float(world @ sums.direction) for world in worlds]
    apart = max(float((world - place * sums.direction).norm()) for world, place in zip(worlds, places, strict=True))
    if apart > _OFF_THE_LINE * float((sums.right - sums.left).norm()):
        return None
    left, right, absent = (mechanism.concentration(door.plan) * place for place in places)
    return DirectionLaw(dim=len(sums.left), left=left, right=right, absent=absent)


def _epsilon_of_law(
    door: Door, sums: _Sums, errors: Errors, sampling: Sampling, delta: float, confidence: float
) -> float:
    """Return what one release costs at the least noise of the stated law that the errors allow; NaN of other laws."""
    rate = 1.0 if sampling.scheme == "full" else sampling.rate
    if (law := _direction_law(door, sums)) is not None:
        return law.epsilon(delta, factor=law.factor(errors, confidence=confidence), rate=rate)
    if not door.has_gaussian_noise:
        return math.nan
    mu = errors.mu(confidence=confidence)
    if mu < 1e-6:
        return 0.0
    event = GaussianRelease(noise_std=1 / mu, l2_sensitivity=1.0)
    return compute_epsilon({(event, sampling): 1}, delta=delta, relation=door.plan.relation).epsilon


def _attainable(door: Door, sums: _Sums, sampling: Sampling, trials: int, delta: float, confidence: float) -> float:
    """Return the bound of any mechanism where rates are the expected ones, at the best threshold; NaN of other laws."""
    rate, law = 1.0 if sampling.scheme == "full" else sampling.rate, _direction_law(door, sums)
    if law is None and not door.has_gaussian_noise:
        return math.nan
    worlds = (sums.left, sums.right, sums.absent)
    if law is not None:
        thresholds = np.linspace(-1, 1, 2001)
        left, right, absent = (law.above(x, thresholds) for x in (law.left, law.right, law.absent))
    else:
        thresholds = np.linspace(-6, 6, 241)
        left, right, absent = (stats.norm.sf(thresholds - sums.place(world) / door.law.std) for world in worlds)
    alpha, best = (1 - confidence) / 2, 0.0
    for positives, power in zip(rate * left + (1 - rate) * absent, rate * right + (1 - rate) * absent, strict=True):
        a = clopper_pearson_upper(positives * trials, trials, alpha)
        b = clopper_pearson_upper((1 - power) * trials, trials, alpha)
        best = max(best, epsilon_of_rates(a, b, delta))
    return best

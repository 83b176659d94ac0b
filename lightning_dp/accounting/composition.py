"""Composition of canonical terms by each accountant, and the guards around dp-accounting.

dp-accounting composes. Ours is only the choice between its accountants, the closed form of an unsampled Gaussian run
(itself dp-accounting's), the Renyi curve of ternary votes, and the guards against inputs it answers wrongly without a
word. Every candidate is an upper bound that depends on no data, so the smallest of them may be reported.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

import dp_accounting
import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp import compute_epsilon as convert_rdp

from lightning_dp.accounting.events import (
    DiscreteGaussianRelease,
    GaussianRelease,
    NonPrivateRelease,
    ReleaseEvent,
    Sampling,
    TernaryRelease,
    VonMisesFisherRelease,
    ZCDPRelease,
    relation_name,
)
from lightning_dp.accounting.gaussian_loss import one_gaussian_release
from lightning_dp.accounting.renyi import MAX_MU, RDP_ORDERS, library_event, renyi_curve
from lightning_dp.errors import ConfigurationError

Accountant: TypeAlias = Literal["auto", "gaussian", "pld", "rdp"]
Counts: TypeAlias = Mapping[tuple[ReleaseEvent, Sampling], int]
Terms: TypeAlias = tuple[tuple[ReleaseEvent, Sampling, int], ...]

_FULL = Sampling(scheme="full")
_MIN_PLD_NOISE_MULTIPLIER = 0.1  # below it a PLD grid takes gigabytes
_MIN_PLD_DELTA = 1e-12  # below it PLD's tail truncation answers infinity
_PLD_ROUNDING = (
    2.0**-50
)  # of delta, for each composition: over twenty times what tilted transforms show (docs/decisions.md)
_MAX_PLD_EPSILON = 100.0  # beyond it the grid grows and the number means nothing
_GUARD_ORDERS = (2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0, 64.0)
_INTERVAL = 1e-4  # of the grid of a PLD
_FINE_INTERVAL = 1e-5
_FINE_GRID_COUNT = 100_000  # more compositions than this need the finer grid, or rounding adds up
_ROUGH_FACTOR = 10.0
_MAX_CLOSED_FORM_MU = 1e4  # beyond it the closed form's tails cancel
_MIN_CLOSED_FORM_MU = 1e-10  # below it they cancel to epsilon 0 for a tiny delta; rounding mu up is sound
_NO_GAIN = {
    ZCDPRelease: "zCDP",
    VonMisesFisherRelease: "von Mises-Fisher",
    DiscreteGaussianRelease: "discrete Gaussian",
}  # without a proof that sampling helps, the last one under replace-one only


@dataclass(frozen=True)
class EpsilonResult:
    """An upper bound on epsilon and how it was found.

    Attributes:
        epsilon: The bound; infinity when something non-private was released, 0 when nothing was.
        accountant: "gaussian" (exact closed form), "pld", "rdp", or "none" where nothing had to be composed.
        notes: What a reader should know of the choice, in words without numbers of epsilon.
    """

    epsilon: float
    accountant: str
    notes: tuple[str, ...] = ()


def checked_delta(delta: float) -> float:
    """Return delta as a float in (0, 1).

    Args:
        delta: The delta of a statement.

    Returns:
        The same number.

    Raises:
        ConfigurationError: NaN, not a number, or outside (0, 1); PLD and RDP answer such values without an error.
    """
    try:
        value = float(delta) if not isinstance(delta, (bool, str)) else math.nan
    except (TypeError, ValueError):
        value = math.nan
    if not 0.0 < value < 1.0:
        raise ConfigurationError(f"Expected 0 < delta < 1, got delta={delta!r}. Choose it below 1 / num_records.")
    return value


def canonical_terms(counts: Counts) -> Terms:
    """Return counts in one canonical order, checked, without zeros, with sampling at rate 1 read as full.

    Raises:
        ConfigurationError: A count is no integer >= 0.
    """
    merged: dict[tuple[ReleaseEvent, Sampling], int] = {}
    for (event, sampling), count in counts.items():
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 0:
            raise ConfigurationError(f"Expected a count to be an integer >= 0, got count={count!r} of {event}.")
        # whether sampling was executed is a matter of the claim, not of the number
        key = (event, Sampling(scheme="poisson", rate=sampling.rate) if sampling.rate < 1.0 else _FULL)
        merged[key] = merged.get(key, 0) + int(count)
    ordered = sorted(merged.items(), key=lambda item: repr(item[0]))
    return tuple((event, sampling, count) for (event, sampling), count in ordered if count > 0)


def has_non_private(terms: Terms) -> bool:
    """Say whether any release was made without privacy."""
    return any(isinstance(event, NonPrivateRelease) for event, _, _ in terms)


def is_unsampled(terms: Terms) -> bool:
    """Say whether every release used all records."""
    return all(sampling == _FULL for _, sampling, _ in terms)


def _is_gaussian(terms: Terms) -> bool:
    return all(isinstance(event, GaussianRelease) for event, _, _ in terms)


@lru_cache(maxsize=4096)
def compose(
    terms: Terms, delta: float, relation: NeighboringRelation, accountant: Accountant, *, is_rough: bool = False
) -> EpsilonResult:
    """Dispatch to one accountant; cached because a PLD takes a second.

    Args:
        terms: From `canonical_terms`.
        delta: In (0, 1).
        relation: That of the events' sensitivities.
        accountant: As in `compute_epsilon`.
        is_rough: A rough answer is a bound too: its PLDs have a grid ten times as coarse, at a tenth of the time.

    Raises:
        ConfigurationError: The accountant cannot compose these terms; "auto" always can.
    """
    if not terms:
        return EpsilonResult(0.0, "none", ("nothing was released",))
    if has_non_private(terms):
        return EpsilonResult(math.inf, "none", ("a release without noise is not private",))
    if accountant == "gaussian":
        return _gaussian(terms, delta)
    if accountant == "rdp":
        return _rdp(terms, delta, relation)
    if accountant == "pld":
        refusal = _pld_refusal(terms, delta, relation)
        if refusal:
            raise ConfigurationError(f"The PLD accountant cannot be used: {refusal}. Use accountant='auto'.")
        return _pld(terms, delta, relation, is_rough=is_rough)
    candidates = quick_bounds(terms, delta, relation)
    if is_unsampled(terms):
        return min(candidates, key=lambda result: result.epsilon)
    refusal = _pld_refusal(terms, delta, relation)
    if refusal is None:
        # first, so that a tie goes to the published accountant
        candidates.insert(0, _pld(terms, delta, relation, is_rough=is_rough))
    best = min(candidates, key=lambda result: result.epsilon)
    if refusal is None:
        return best
    return EpsilonResult(best.epsilon, best.accountant, (f"not by PLD: {refusal}", *best.notes))


def quick_bounds(terms: Terms, delta: float, relation: NeighboringRelation) -> list[EpsilonResult]:
    """Return every bound that needs no PLD; never empty.

    Args:
        terms: From `canonical_terms`, at least one, all private.
        delta: In (0, 1).
        relation: That of the events' sensitivities.
    """
    bounds = []
    if _is_gaussian(terms):
        bounds.append(_gaussian(_without_sampling(terms), delta, ignored_sampling=not is_unsampled(terms)))
    is_plain = _is_gaussian(terms) and not any(isinstance(event, TernaryRelease) for event, _, _ in terms)
    if is_plain and is_unsampled(terms):
        return bounds  # the closed form is exact: Renyi divergence cannot be below it
    if _rdp_refusal(terms, relation) is None:
        bounds.append(_rdp(terms, delta, relation))
    elif not bounds:
        ignoring = _rdp(_without_sampling(terms), delta, relation)
        bounds.append(EpsilonResult(ignoring.epsilon, "rdp", ("no gain from sampling is used", *ignoring.notes)))
    return bounds


def _without_sampling(terms: Terms) -> Terms:
    """Return the terms as if every record always took part: sampling never makes a release worse."""
    return tuple((event, _FULL, count) for event, _, count in terms)


def total_mu(terms: Terms, accountant: str) -> float:
    """Return mu of the composition of unsampled Gaussians: the root of the sum of squares.

    Args:
        terms: From `canonical_terms`.
        accountant: Its name, for the error.

    Raises:
        ConfigurationError: A term is another event, or sampled.
    """
    squares = []
    for event, sampling, count in terms:
        if not isinstance(event, GaussianRelease) or sampling != _FULL:
            raise ConfigurationError(
                f"The {accountant} accountant takes unsampled Gaussian releases only, got {event} with {sampling}. "
                "Use accountant='auto'."
            )
        squares.append(count * event.mu * event.mu)
    return max(math.sqrt(math.fsum(squares)), _MIN_CLOSED_FORM_MU)


def _gaussian(terms: Terms, delta: float, *, ignored_sampling: bool = False) -> EpsilonResult:
    """Return the exact epsilon of unsampled Gaussians: mu-GDP by dp-accounting's closed form."""
    mu = total_mu(terms, "gaussian")
    notes = ("no gain from sampling is used",) if ignored_sampling else ()
    if mu <= _MAX_CLOSED_FORM_MU:
        with np.errstate(all="ignore"):  # the result is checked below
            epsilon = float(dp_accounting.get_epsilon_gaussian(1.0 / mu, delta))
        if math.isfinite(epsilon) and epsilon >= 0.0:
            return EpsilonResult(epsilon, "gaussian", notes)
    # Bun and Steinke (2016), Proposition 1.3: mu^2/2-zCDP
    bound = mu * mu / 2 + mu * math.sqrt(-2 * math.log(delta))
    return EpsilonResult(bound, "gaussian", (*notes, "too little noise for the closed form: its zCDP bound is given"))


def _rdp_refusal(terms: Terms, relation: NeighboringRelation) -> str | None:
    """Return why Renyi divergence does not compose the terms, or None."""
    if relation is NeighboringRelation.REPLACE_ONE:
        for event, sampling, _ in terms:
            if isinstance(event, GaussianRelease) and sampling != _FULL:
                return f"no Renyi curve of {event} with {sampling} under {relation_name(relation)}"
    return None


def _rdp(terms: Terms, delta: float, relation: NeighboringRelation) -> EpsilonResult:
    """Return epsilon by Renyi divergence, with the ternary curve where it applies."""
    refusal = _rdp_refusal(terms, relation)
    if refusal:
        raise ConfigurationError(f"The RDP accountant cannot be used: {refusal}. Use accountant='auto'.")
    total = np.zeros(len(RDP_ORDERS))
    with np.errstate(over="ignore"):
        for event, sampling, count in terms:
            total += count * renyi_curve(event, _FULL if _earns_nothing(event, sampling, relation) else sampling)
    epsilon = float(convert_rdp(RDP_ORDERS, total, delta)[0])
    notes = []
    if any(isinstance(event, TernaryRelease) and sampling == _FULL for event, sampling, _ in terms):
        notes.append("Renyi curve of the ternary output")
    unused = {_NO_GAIN[type(event)] for event, sampling, _ in terms if _earns_nothing(event, sampling, relation)}
    notes += [f"no gain from sampling is used for the {kind} releases" for kind in sorted(unused)]
    return EpsilonResult(epsilon, "rdp", tuple(notes))


def _earns_nothing(event: ReleaseEvent, sampling: Sampling, relation: NeighboringRelation) -> bool:
    """Tell whether no gain from sampling has been proved; an unsampled release is charged, which is never below."""
    if sampling == _FULL or type(event) not in _NO_GAIN:
        return False
    return not isinstance(event, DiscreteGaussianRelease) or relation is NeighboringRelation.REPLACE_ONE


def _pld_refusal(terms: Terms, delta: float, relation: NeighboringRelation) -> str | None:
    """Return why no privacy loss distribution is built, or None."""
    if delta < _MIN_PLD_DELTA:
        return f"delta={delta:g} is below its floor of {_MIN_PLD_DELTA:g}"
    if _pld_rounding(terms) > delta / 2:
        return f"delta={delta:g} is within the rounding of its transforms"
    for event, sampling, count in terms:
        if not isinstance(event, GaussianRelease):
            return f"no privacy loss distribution of {event}"
        multiplier = event.noise_multiplier / (math.sqrt(count) if sampling == _FULL else 1.0)
        if multiplier < _MIN_PLD_NOISE_MULTIPLIER:
            return f"noise multiplier below {_MIN_PLD_NOISE_MULTIPLIER} ({event})"
    # Only a guard on memory, so a few orders and, under replace-one, twice the epsilon of half the sensitivity will do.
    factor = _pld_factor(relation)
    rough = RdpAccountant(_GUARD_ORDERS, NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event, sampling, count in terms:
        rough.compose(library_event(event, sampling, factor=factor), count)
    if not factor * rough.get_epsilon(delta) <= _MAX_PLD_EPSILON:
        return f"epsilon is beyond {_MAX_PLD_EPSILON:g}"
    return None


def _pld(terms: Terms, delta: float, relation: NeighboringRelation, *, is_rough: bool = False) -> EpsilonResult:
    """Return epsilon by privacy loss distributions (connect the dots, pessimistic)."""
    interval = _FINE_INTERVAL if sum(count for _, _, count in terms) > _FINE_GRID_COUNT else _INTERVAL
    interval *= _ROUGH_FACTOR if is_rough else 1.0
    factor = _pld_factor(relation)
    composed = None
    for event, sampling, count in terms:
        noise_multiplier = float(min(factor * event.noise_multiplier, MAX_MU))  # type: ignore[union-attr]
        if sampling == _FULL:
            part = one_gaussian_release(noise_multiplier / math.sqrt(count), 1.0, relation, interval)
        else:
            part = one_gaussian_release(noise_multiplier, sampling.rate, relation, interval).self_compose(count)
        composed = part if composed is None else composed.compose(part)
    assert composed is not None  # `compose` answers for no terms
    notes = _ternary_as_gaussian(event for event, _, _ in terms)
    return EpsilonResult(float(composed.get_epsilon_for_delta(delta - _pld_rounding(terms))), "pld", notes)


def _pld_rounding(terms: Terms) -> float:
    """Return what rounding may hide of the delta of composed distributions; taken off the stated one."""
    return _PLD_ROUNDING * sum(count for _, sampling, count in terms if sampling != _FULL)


def _pld_factor(relation: NeighboringRelation) -> float:
    """Return what the PLD accountant wants of our noise multiplier.

    Under replace-one it doubles the sensitivity itself, from one record's norm bound; ours is doubled already.
    """
    return 2.0 if relation is NeighboringRelation.REPLACE_ONE else 1.0


def _ternary_as_gaussian(events: Iterable[ReleaseEvent]) -> tuple[str, ...]:
    """Return the note that thresholding earned nothing."""
    if any(isinstance(event, TernaryRelease) for event in events):
        return ("ternary releases are charged as the Gaussian below the threshold",)
    return ()

"""Rules by which releases chosen in view of earlier ones may go on: what is spent is a plain sum under a fixed limit.

A run's plan is a list that was fixed beforehand, so any accountant may compose it. The runs on one data set are chosen
in view of each other, noise and length included, and then composing the list that came out proves nothing: privacy loss
distributions have no such rule for free. Two rules do, if they were fixed before the first release:

* ``gaussian``: the squares of mu of unsampled Gaussian releases may add up to the mu^2 of the budget. Exact.
* ``renyi``: Renyi divergences at *one* order may add up to what the budget leaves at that order. Takes every event.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import dp_accounting
from dp_accounting import NeighboringRelation

from lightning_dp.accounting.composition import Counts, canonical_terms, has_non_private
from lightning_dp.accounting.events import (
    AdditiveRelease,
    GaussianRelease,
    NonPrivateRelease,
    ReleaseEvent,
    Sampling,
    VonMisesFisherRelease,
    ZCDPRelease,
)
from lightning_dp.accounting.renyi import RDP_ORDERS, relation_curve
from lightning_dp.errors import ConfigurationError

Rule: TypeAlias = Literal["gaussian", "renyi"]

_FULL = Sampling(scheme="full")


@dataclass(frozen=True)
class PrivacyFilter:
    """A rule with its limit, both functions of epsilon and delta alone.

    Guarantee: while the total of everything released, in whatever order and however chosen, stays at or below `limit`,
    all of it together is (epsilon, delta)-DP under the relation, and (`epsilon_at(d)`, d)-DP for every other d.

    Attributes:
        rule: gaussian or renyi.
        epsilon: Epsilon of the budget.
        delta: Its delta.
        order: Order of the Renyi divergence; infinity for gaussian, which has none.
        limit: mu^2, or the Renyi divergence at the order, that may be spent.

    References:
        Feldman and Zrnic (2021) "Individual privacy accounting via a Renyi filter"; Smith and Thakurta (2022) "Fully
        adaptive composition for Gaussian differential privacy"; Koskela, Tobaben and Honkela (2023).
    """

    rule: Rule
    epsilon: float
    delta: float
    order: float
    limit: float

    def total(self, counts: Counts, relation: NeighboringRelation) -> float:
        """Return what releases spend; infinity for a release without privacy.

        Args:
            counts: How often each (event, sampling) is released.
            relation: The relation of the events' sensitivities.

        Raises:
            ConfigurationError: The rule has no price for one of the events.
        """
        terms = canonical_terms(counts)
        if has_non_private(terms):
            return math.inf
        if self.rule == "gaussian":
            return math.fsum(count * _mu_squared(event, sampling) for event, sampling, count in terms)
        index = RDP_ORDERS.index(self.order)
        return math.fsum(count * _renyi(event, sampling, relation, index) for event, sampling, count in terms)

    def epsilon_at(self, delta: float) -> float:
        """Return the epsilon that the rule guarantees at another delta."""
        if delta == self.delta:
            return self.epsilon
        if self.rule == "gaussian":
            return float(dp_accounting.get_epsilon_gaussian(1.0 / math.sqrt(self.limit), delta))
        return max(0.0, self.limit + _conversion(self.order, delta))


def make_filter(rule: str, *, epsilon: float, delta: float, order: float = math.inf) -> PrivacyFilter:
    """Return a rule for a budget.

    Args:
        rule: gaussian or renyi.
        epsilon: Epsilon of the budget, finite and > 0.
        delta: Its delta, in (0, 1).
        order: Order of the Renyi divergence, one of `RDP_ORDERS`; gaussian has none.

    Raises:
        ConfigurationError: Unknown rule or order, or a budget of which the order leaves nothing.
    """
    if rule not in get_args(Rule):
        raise ConfigurationError(f"Expected the rule to be one of {', '.join(get_args(Rule))}, got {rule!r}.")
    if rule == "gaussian":
        mu = 1.0 / float(dp_accounting.get_sigma_gaussian(epsilon, delta))
        while float(dp_accounting.get_epsilon_gaussian(1.0 / mu, delta)) > epsilon:
            mu *= 1.0 - 1e-9  # the closed form's root may lie on either side
        return PrivacyFilter("gaussian", epsilon, delta, math.inf, mu * mu)
    if order not in RDP_ORDERS:
        raise ConfigurationError(f"Expected an order among those of the RDP accountant, got order={order!r}.")
    left = epsilon - _conversion(order, delta)
    if left <= 0.0:
        raise ConfigurationError(
            f"Expected a budget that a Renyi filter can keep, got epsilon={epsilon:g} at delta={delta:g}. Raise it, "
            "or use the gaussian rule (runs without sampling)."
        )
    return PrivacyFilter("renyi", epsilon, delta, order, left)


def best_order(counts: Counts, relation: NeighboringRelation, *, epsilon: float, delta: float) -> float:
    """Return the order at which the first runs leave most of a budget: their plan is known before any release.

    Args:
        counts: What the first runs will release.
        relation: The relation of the events' sensitivities.
        epsilon: Epsilon of the budget.
        delta: Its delta.
    """
    wanted = without_non_private(counts) or {(GaussianRelease(noise_std=1.0, l2_sensitivity=1.0), _FULL): 1}
    shares = {}
    for order in RDP_ORDERS:
        if (left := epsilon - _conversion(order, delta)) > 0.0:
            rule = PrivacyFilter("renyi", epsilon, delta, order, left)
            shares[order] = rule.total(wanted, relation) / left
    # Refused by make_filter if no order leaves anything.
    return min(shares, key=lambda order: shares[order]) if shares else RDP_ORDERS[-1]


def rule_for(counts: Counts) -> Rule:
    """Return the exact rule if it has a price for these releases, else the general one."""
    private = [(event, sampling) for event, sampling, _ in canonical_terms(counts) if not _is_non_private(event)]
    is_plain = all(isinstance(event, GaussianRelease) and sampling == _FULL for event, sampling in private)
    return "gaussian" if private and is_plain else "renyi"


def without_non_private(counts: Counts) -> dict[tuple[ReleaseEvent, Sampling], int]:
    """Return the releases that have a price."""
    return {key: count for key, count in counts.items() if count and not _is_non_private(key[0])}


def scaled(counts: Counts, factor: float) -> dict[tuple[ReleaseEvent, Sampling], int] | None:
    """Return the same releases under `factor` times the noise; None where an event has no such thing."""
    louder: dict[tuple[ReleaseEvent, Sampling], int] = {}
    for (event, sampling), count in counts.items():
        if isinstance(event, AdditiveRelease):
            other: ReleaseEvent = replace(event, noise_std=factor * event.noise_std)
        elif isinstance(event, ZCDPRelease):
            other = replace(event, rho=event.rho / factor**2)
        elif isinstance(event, VonMisesFisherRelease):
            other = replace(event, distance=event.distance / factor)
        else:
            return None
        louder[other, sampling] = louder.get((other, sampling), 0) + count
    return louder


def _is_non_private(event: ReleaseEvent) -> bool:
    return isinstance(event, NonPrivateRelease)


def _conversion(order: float, delta: float) -> float:
    """Return what turns a Renyi divergence into epsilon (Canonne, Kamath and Steinke 2020, Proposition 12)."""
    return math.log1p(-1.0 / order) - math.log(delta * order) / (order - 1.0)


def _mu_squared(event: ReleaseEvent, sampling: Sampling) -> float:
    if not isinstance(event, GaussianRelease) or sampling != _FULL:
        raise ConfigurationError(
            f"The gaussian rule of this budget has no price for {event} with {sampling}: it takes Gaussian releases "
            "without sampling only. Keep sampled runs in a budget of another folder, opened with the renyi rule."
        )
    return event.mu * event.mu


def _renyi(event: ReleaseEvent, sampling: Sampling, relation: NeighboringRelation, index: int) -> float:
    """Return the Renyi divergence of one release at one of `RDP_ORDERS`."""
    return float(relation_curve(event, sampling, relation)[index])


def joined(*parts: Mapping[tuple[ReleaseEvent, Sampling], int]) -> dict[tuple[ReleaseEvent, Sampling], int]:
    """Return counts of all parts together."""
    total: dict[tuple[ReleaseEvent, Sampling], int] = {}
    for part in parts:
        for key, count in part.items():
            total[key] = total.get(key, 0) + count
    return total

"""Whether releases fit into what is left of a data set's budget, and what would fit where they do not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_dp.accounting.budget_state import BudgetState
from lightning_dp.accounting.composition import Counts
from lightning_dp.accounting.events import AdditiveRelease, parse_relation
from lightning_dp.accounting.filters import joined, scaled, without_non_private
from lightning_dp.accounting.search import largest_count, smallest_noise


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """Why runs do not fit.

    Attributes:
        left: Share of the budget that is left.
        asked: Share that is asked.
        num_runs: How many runs ask.
        num_planned: Releases of the kind that the run makes most.
        num_releases: How many of them would fit; None where none would, or several runs ask.
        noise_now: Their noise multiplier.
        noise_multiplier: The one at which all of them would fit; None where there is none.
        epsilon: What they would cost by themselves under that noise, at the budget's delta.
    """

    left: float
    asked: float
    num_runs: int
    num_planned: int
    num_releases: int | None
    noise_now: float
    noise_multiplier: float | None
    epsilon: float | None


def do_fit(state: BudgetState, asked: Sequence[Counts]) -> bool:
    """Tell whether releases fit into what is left.

    The first list was planned before any release on these records, so an accountant may let it through.

    Args:
        state: The budget.
        asked: What each run of one list asks beyond what it holds.
    """
    terms, wanted = state.terms, without_non_private(joined(*asked))
    if not wanted:
        return True
    if state.is_untouched and state.composition(wanted, terms.delta).epsilon <= terms.epsilon:
        return True
    # Compared as one sum, so that two orders of the same reservations cannot differ in the last bit.
    whole = joined(without_non_private(state.counts), wanted)
    return terms.filter.total(whole, parse_relation(terms.relation)) <= terms.filter.limit


def shortage_of(state: BudgetState, asked: Sequence[Counts]) -> Shortage | None:
    """Return why releases do not fit into what is left; None if they do.

    Args:
        state: The budget.
        asked: What each run of one list asks beyond what it holds.
    """
    if do_fit(state, asked):
        return None
    rule, relation = state.terms.filter, parse_relation(state.terms.relation)
    wanted = without_non_private(joined(*asked))
    cost = rule.total(wanted, relation)
    left = max(0.0, rule.limit - rule.total(without_non_private(state.counts), relation))
    own = max(wanted, key=lambda key: wanted[key])
    each = rule.total({own: 1}, relation)
    rest = cost - wanted[own] * each
    fitting = largest_count(lambda n: rest + n * each, left)

    def louder(factor: float) -> float:
        counts = scaled(wanted, factor)
        return math.inf if counts is None else rule.total(counts, relation)

    factor = smallest_noise(louder, left, guess=2.0) if left > 1e-6 * rule.limit else math.inf
    now = own[0].noise_multiplier if isinstance(own[0], AdditiveRelease) else math.nan
    quieter = scaled(wanted, factor) if math.isfinite(factor) else None
    return Shortage(
        left=left / rule.limit,
        asked=cost / rule.limit,
        num_runs=len(asked),
        num_planned=wanted[own],
        num_releases=fitting if fitting > 0 and len(asked) == 1 else None,
        noise_now=now,
        noise_multiplier=factor * now if math.isfinite(factor * now) else None,
        epsilon=state.composition(quieter, state.terms.delta).epsilon if quieter is not None else None,
    )

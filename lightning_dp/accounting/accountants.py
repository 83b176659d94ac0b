"""From counts of releases to one epsilon, and the question asked before every release: would one more exceed it?"""

import math
from functools import lru_cache
from typing import get_args

import dp_accounting
from dp_accounting import NeighboringRelation
from dp_accounting.rdp import RdpAccountant

from lightning_dp.accounting.composition import (
    Accountant,
    Counts,
    EpsilonResult,
    Terms,
    canonical_terms,
    checked_delta,
    compose,
    has_non_private,
    is_unsampled,
    quick_bounds,
    total_mu,
)
from lightning_dp.accounting.events import ReleaseEvent, Sampling, parse_relation
from lightning_dp.accounting.search import largest_count
from lightning_dp.errors import ConfigurationError

__all__ = [
    "PAPER_ORDERS",
    "Accountant",
    "Counts",
    "EpsilonResult",
    "checked_delta",
    "compute_epsilon",
    "gswgan_paper_epsilon",
    "paper_epsilon",
    "quick_epsilon_bound",
    "would_exceed",
]

PAPER_ORDERS: tuple[float, ...] = (1.1, *(float(order) for order in range(2, 200)))
"""The orders of the DataLens program."""

_LOOK_AHEAD, _MOST_QUESTIONS = 64, 64
_Question = tuple[float, float, NeighboringRelation, Accountant]
_kept: dict[_Question, dict[tuple[ReleaseEvent, Sampling], int]] = {}


def compute_epsilon(
    counts: Counts,
    *,
    delta: float,
    relation: str | NeighboringRelation,
    accountant: Accountant = "auto",
    is_rough: bool = False,
) -> EpsilonResult:
    """Return the epsilon of all releases together.

    Guarantee: an upper bound for adaptive composition under the stated relation; the events' sensitivities must be for
    that relation. "auto" takes the exact Gaussian curve where the run is exactly Gaussian; the smaller of that and the
    ternary Renyi curve for thresholded votes; else PLD, with RDP as cross-check (the smaller counts) and fallback.

    Args:
        counts: How often each (event, sampling) was released, each >= 0.
        delta: The delta of the statement, 0 < delta < 1.
        relation: The neighbouring relation, by name or enum.
        accountant: Which accountant; all but "auto" refuse what they cannot compose.
        is_rough: Answer in a tenth of the time where sampling needs a PLD, slightly above the exact answer.

    Returns:
        Epsilon, the accountant that gave it, and notes.

    Raises:
        ConfigurationError: An invalid delta, relation, count or accountant, or an event that the accountant lacks.

    Edge cases: no release gives 0; a non-private release gives infinity.

    Example:
        >>> from lightning_dp.accounting.events import GaussianRelease
        >>> release = (GaussianRelease(noise_std=1.0, l2_sensitivity=1.0), Sampling(scheme="full"))
        >>> round(compute_epsilon({release: 1}, delta=1e-5, relation="replace_one").epsilon, 4)
        4.3772
    """
    delta = checked_delta(delta)
    relation = parse_relation(relation)
    if accountant not in get_args(Accountant):
        choices = ", ".join(get_args(Accountant))
        raise ConfigurationError(f"Expected accountant to be one of {choices}, got accountant={accountant!r}.")
    return compose(canonical_terms(counts), delta, relation, accountant, is_rough=is_rough)


def quick_epsilon_bound(counts: Counts, *, delta: float, relation: str | NeighboringRelation) -> float:
    """Return an upper bound on epsilon without composing a privacy loss distribution.

    Args:
        counts: As in `compute_epsilon`.
        delta: As in `compute_epsilon`.
        relation: As in `compute_epsilon`.

    Returns:
        A bound never below what `compute_epsilon` gives with "auto"; equal to it when nothing is sampled.

    Raises:
        ConfigurationError: As in `compute_epsilon`.
    """
    delta, relation = checked_delta(delta), parse_relation(relation)
    terms = canonical_terms(counts)
    if not terms or has_non_private(terms):
        return compose(terms, delta, relation, "auto").epsilon
    return min(result.epsilon for result in quick_bounds(terms, delta, relation))


def would_exceed(
    counts: Counts,
    extra: tuple[ReleaseEvent, Sampling],
    *,
    budget_epsilon: float,
    delta: float,
    relation: str | NeighboringRelation,
    accountant: Accountant = "auto",
    planned: Counts | None = None,
) -> bool:
    """Say whether one more release would pass the budget; ask before every release.

    Cheap on every call while nothing is sampled (one closed form). With sampling, Renyi divergence answers until it
    passes the budget; then the plan does, if it keeps the budget and the release is part of it; beyond that the largest
    allowed count is found once by the full accountant. Both are remembered.

    Args:
        counts: What was released so far.
        extra: The (event, sampling) about to be released.
        budget_epsilon: The epsilon that may not be passed, >= 0; infinity never stops.
        delta: As in `compute_epsilon`.
        relation: As in `compute_epsilon`.
        accountant: As in `compute_epsilon`.
        planned: What was fixed before the first release; a part of it costs no more than all of it.

    Returns:
        True if epsilon after the release would be above the budget.

    Raises:
        ConfigurationError: As in `compute_epsilon`, or an invalid budget.
    """
    budget = float(budget_epsilon)
    if not budget >= 0:
        raise ConfigurationError(f"Expected budget_epsilon >= 0, got budget_epsilon={budget_epsilon!r}.")
    if math.isinf(budget):
        return False
    after = dict(counts)
    after[extra] = after.get(extra, 0) + 1
    question = (budget, checked_delta(delta), parse_relation(relation), accountant)
    if _is_part(after, _kept.get(question, {})):
        return False
    if accountant == "auto":
        # Asked at every step, so it looks ahead: whatever is part of what keeps the budget keeps it too.
        for ahead in (_LOOK_AHEAD, 0):
            further = after | {extra: after[extra] + ahead}
            if quick_epsilon_bound(further, delta=delta, relation=relation) <= budget:
                _keep(question, further)
                return False
    return _passes(after, extra, question, planned)


def _passes(after: Counts, extra: tuple[ReleaseEvent, Sampling], question: _Question, planned: Counts | None) -> bool:
    """Ask the full accountant: of all releases, of the plan that they are part of, or of the largest allowed count."""
    budget, delta, relation, accountant = question
    terms = canonical_terms(after)
    if accountant in ("gaussian", "rdp") or has_non_private(terms) or is_unsampled(terms):
        return compute_epsilon(after, delta=delta, relation=relation, accountant=accountant).epsilon > budget
    if planned is not None and _is_part(after, planned):
        whole = compute_epsilon(planned, delta=delta, relation=relation, accountant=accountant).epsilon
        if whole <= budget:
            _keep(question, planned)
            return False
    ((event, sampling, _),) = canonical_terms({extra: 1})
    rest = tuple(term for term in terms if term[:2] != (event, sampling))
    count = next(term[2] for term in terms if term[:2] == (event, sampling))
    return count > _allowed_count(rest, event, sampling, budget, delta, relation, accountant)


def _is_part(counts: Counts, whole: Counts) -> bool:
    return all(count <= whole.get(key, 0) for key, count in counts.items())


def _keep(question: _Question, counts: Counts) -> None:
    """Remember counts that keep a budget, in place of the last ones of the same question."""
    if len(_kept) >= _MOST_QUESTIONS:
        _kept.clear()
    _kept[question] = dict(counts)


def paper_epsilon(counts: Counts, *, delta: float) -> float:
    """Return the number the DataLens program would print, for comparison with the paper only.

    Its Renyi divergence is the Gaussian's; its conversion rho(a) + ln(1 / delta) / (a - 1) over `PAPER_ORDERS` is valid
    but loose. Its data-dependent branch is unsound and left out.

    Args:
        counts: Unsampled Gaussian or ternary releases; ternary ones are charged as Gaussian.
        delta: 0 < delta < 1.

    Returns:
        Epsilon; 0 for no release.

    Raises:
        ConfigurationError: Another event, sampling, or an invalid delta.

    References:
        Wang et al. (2021) "DataLens", accountant of the published program.
    """
    delta = checked_delta(delta)
    terms = canonical_terms(counts)
    if not terms:
        return 0.0
    mu = total_mu(terms, "paper")
    rho = mu * mu / 2
    return min(order * rho - math.log(delta) / (order - 1) for order in PAPER_ORDERS)


def gswgan_paper_epsilon(
    *, noise_multiplier: float, num_discriminators: int, images_per_step: int, num_steps: int, delta: float
) -> float:
    """Return the number the GS-WGAN program would print, for comparison with the paper only.

    It composes every image of every step as if a discriminator had been drawn for it alone, without replacement. One
    draw serves all images of a step, so the number bounds nothing: at the published setting (1.07, 1000, 32, 20000) it
    is 9.99 at delta 1e-5.

    Args:
        noise_multiplier: Noise std over the replace-one sensitivity of one image.
        num_discriminators: Discriminators of which one is drawn.
        images_per_step: Images that it judges in a step.
        num_steps: Steps of the generator.
        delta: 0 < delta < 1.

    References:
        Chen et al. (2020) "GS-WGAN"; Wang, Balle and Kasiviswanathan (2019), Theorem 9, whole orders.
    """
    delta = checked_delta(delta)
    drawn = dp_accounting.SampledWithoutReplacementDpEvent(
        num_discriminators, 1, dp_accounting.GaussianDpEvent(float(noise_multiplier))
    )
    accountant = RdpAccountant(PAPER_ORDERS[1:], NeighboringRelation.REPLACE_ONE)
    accountant.compose(drawn, num_steps * images_per_step)
    pairs = zip(PAPER_ORDERS[1:], accountant.rdp, strict=True)
    return float(min(rho - math.log(delta) / (order - 1) for order, rho in pairs))


@lru_cache(maxsize=256)
def _allowed_count(
    rest: Terms,
    event: ReleaseEvent,
    sampling: Sampling,
    budget: float,
    delta: float,
    relation: NeighboringRelation,
    accountant: Accountant,
) -> int:
    """Return how many releases of one kind the budget holds beside the rest, by the full accountant."""

    def after(count: int) -> dict[tuple[ReleaseEvent, Sampling], int]:
        return {(event, sampling): count} | {(other, way): number for other, way, number in rest}

    guess = largest_count(lambda n: quick_epsilon_bound(after(n), delta=delta, relation=relation), budget)
    return largest_count(
        lambda n: compute_epsilon(after(n), delta=delta, relation=relation, accountant=accountant).epsilon,
        budget,
        guess=guess,
    )

"""What the best of a random number of runs costs, as one event: the plans of all that may be drawn, and the law."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import dp_accounting
import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant
from numpy.typing import NDArray

from lightning_dp.accounting.fields import positive_float, whole_number
from lightning_dp.accounting.release import Release, event_from_dict
from lightning_dp.accounting.sampling import Sampling
from lightning_dp.errors import ConfigurationError

Curve: TypeAlias = NDArray[np.float64]
PlanTerms: TypeAlias = tuple[tuple[Release, Sampling, int], ...]

MAX_MEAN = 1000.0


@dataclass(frozen=True, kw_only=True)
class SelectionRelease(Release):
    """The best of a random number of independent runs, each drawn from a public list; the only thing that leaves.

    Guarantee: Renyi divergence as `selection_rdp` computes it, if the number of runs has the stated law, and neither it
    nor anything of the other runs leaves. A run is drawn by public weights, so it diverges by no more than the worst
    plan of the list, order by order.

    Args:
        plans: What each run of the list releases at most, as (event, sampling, count); equal plans stand once.
        mean: Mean of the number of runs, >= 1.
        shape: Shape of the truncated negative binomial law (1 geometric, 0 logarithmic), None for Poisson.
        relation: The neighbouring relation of the events' sensitivities.

    Raises:
        ConfigurationError: A plan is empty or holds a release without privacy, or a number is out of range.
    """

    kind: ClassVar[str] = "selection"
    plans: tuple[PlanTerms, ...]
    mean: float
    shape: float | None
    relation: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "plans", tuple(sorted({_terms(plan) for plan in self.plans}, key=repr)))
        object.__setattr__(self, "mean", positive_float("SelectionRelease", "mean", self.mean))
        if self.shape is not None and (isinstance(self.shape, bool) or not 0.0 <= float(self.shape) < math.inf):
            raise ConfigurationError(f"Expected a finite shape >= 0, or null for Poisson, got shape={self.shape!r}.")
        object.__setattr__(self, "shape", None if self.shape is None else float(self.shape))
        if not 1.0 <= self.mean <= MAX_MEAN:
            raise ConfigurationError(f"Expected 1 <= mean <= {MAX_MEAN:g} runs, got mean={self.mean}.")
        if not self.plans:
            raise ConfigurationError("Expected at least one plan to choose from, got none.")
        if self.relation.upper() not in NeighboringRelation.__members__:
            raise ConfigurationError(f"Expected the name of a neighbouring relation, got relation={self.relation!r}.")

    def __str__(self) -> str:
        law = "Poisson" if self.shape is None else f"shape {self.shape:g}"
        return f"the best of a random number of runs (mean {self.mean:g}, {law})"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary; `event_from_dict` inverts it."""
        plans = [
            [{"event": event.to_dict(), "sampling": how.to_dict(), "count": count} for event, how, count in plan]
            for plan in self.plans
        ]
        return {
            "kind": self.kind,
            "plans": plans,
            "mean": self.mean,
            "shape": self.shape,
            "relation": self.relation,
        }


def selection_rdp(
    event: SelectionRelease,
    orders: Sequence[float],
    curve_of: Callable[[Release, Sampling, NeighboringRelation], Curve],
) -> Curve:
    """Return the Renyi divergences of a selection.

    Args:
        event: The selection.
        orders: Orders > 1, rising.
        curve_of: Divergences of one release at the orders under a relation.

    Returns:
        Divergences, infinity where nothing is proved.

    References:
        Papernot and Steinke (2022), "Hyperparameter Tuning with Renyi Differential Privacy", Theorems 2 and 6.
    """
    relation = NeighboringRelation[event.relation.upper()]
    with np.errstate(over="ignore", invalid="ignore"):
        runs = [np.sum([count * curve_of(one, how, relation) for one, how, count in plan], 0) for plan in event.plans]
    # The same draw on both data sets: the mixture diverges by no more than its worst part (joint quasi-convexity).
    worst = np.max(runs, axis=0)
    is_known = np.isfinite(worst)
    found = np.full(len(orders), np.inf)
    if is_known.any():
        accountant = _CurveAccountant(list(np.asarray(orders)[is_known]), NeighboringRelation.ADD_OR_REMOVE_ONE)
        shape = math.inf if event.shape is None else event.shape
        with np.errstate(all="ignore"):
            accountant.compose(RepeatAndSelectDpEvent(_CurveEvent(tuple(worst[is_known])), event.mean, shape))
        found[is_known] = accountant.rdp
    return found


@dataclass(frozen=True)
class _CurveEvent(dp_accounting.DpEvent):
    """A run of which only its divergences are known."""

    curve: tuple[float, ...]


class _CurveAccountant(RdpAccountant):
    """Takes a curve as it is, so that dp-accounting selects among runs whose curve is ours."""

    def _maybe_compose(self, event: dp_accounting.DpEvent, count: int, do_compose: bool) -> Any:
        if not isinstance(event, _CurveEvent):
            return super()._maybe_compose(event, count, do_compose)
        if do_compose:
            self._rdp += count * np.asarray(event.curve)
        return None


def _terms(plan: Iterable[Any]) -> PlanTerms:
    terms = []
    for part in plan:
        if isinstance(part, Mapping):
            part = (event_from_dict(part["event"]), Sampling.from_dict(part["sampling"]), part["count"])
        event, sampling, count = part
        if event.kind in ("non_private", SelectionRelease.kind):
            raise ConfigurationError(f"A selection has no price with a release of kind {event.kind} among its runs.")
        terms.append((event, sampling, whole_number("SelectionRelease", "count", count, 1)))
    if not terms:
        raise ConfigurationError("Expected at least one release in each plan of a selection, got none.")
    return tuple(sorted(terms, key=repr))

"""One row of the table of audited pairs: a mechanism on the rows of a method, and the method, in numbers and words."""

import copy
import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lightning_dp.errors import ConfigurationError, PrivacyProtocolError
from lightning_dp.wording import counted

if TYPE_CHECKING:
    from lightning_dp.accounting.events import Sampling
    from lightning_dp.auditing.door import Door
    from lightning_dp.auditing.method import MethodRun
    from lightning_dp.auditing.result import AuditResult
    from lightning_dp.mechanisms.base import Mechanism

_AUDITS = ("protocol", "sensitivity", "noise", "noise hygiene", "directions")
_LOOSE = 0.9  # of a bound: what reaches less of it is explained, or tried once more with a smaller one


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """How the pairs are audited; rows are comparable where all of it is equal.

    Attributes:
        calls: Releases of each world through the door.
        draws: Draws of each world of what the mechanism adds, at most.
        confidence: Of the lower bounds.
        delta: Of the claims.
        noise_multiplier: Of all releases.
        steps: Releases of a whole method.
    """

    calls: int
    draws: int
    confidence: float
    delta: float
    noise_multiplier: float = 1.0
    steps: int = 3


@dataclass(frozen=True)
class TableRow:
    """One audited pair.

    Attributes:
        cells: Text by column.
        verdict: The gravest of its audits.
    """

    cells: tuple[str, ...]
    verdict: str


def method_name(config: str, run: "MethodRun") -> str:
    """Return how the table calls a method."""
    return f"{type(run.module).__name__} (`{config}`)"


def audit_pair(
    name: str, run: "MethodRun", variants: "Sequence[Mechanism]", *, level: str, options: TableOptions
) -> TableRow:
    """Audit one pair: the mechanism on rows as the method states them, and the method.

    Args:
        name: Of the configuration.
        run: Module, data and privacy.
        variants: The mechanism with different options; the first that has a proof is audited.
        level: Claim level of the pair.
        options: How.
    """
    from lightning_dp.auditing.draws import audit_draws, can_draw
    from lightning_dp.auditing.result import worst_verdict
    from lightning_dp.auditing.suite import audit_mechanism
    from lightning_dp.auditing.two_worlds import audit_two_worlds

    door, sampling = _first_door(run, variants, options), run.module.sampling
    common: dict[str, Any] = {"confidence": options.confidence, "delta": options.delta}
    results = audit_mechanism(door, calls=options.calls, only=_AUDITS, **common)
    worlds = audit_two_worlds(door, calls=options.calls, sampling=sampling, **common)
    drawn = audit_draws(door, draws=options.draws, sampling=sampling, **common) if can_draw(door) else worlds
    method, told = _whole_method(run, door.mechanism, options)
    results = [*results, worlds, *([drawn] if drawn is not worlds else []), method]
    stated, reach = drawn.measured.get("epsilon_stated_law", math.nan), drawn.measured.get("epsilon_attainable")
    return TableRow(
        cells=(
            method_name(name, run),
            type(door.mechanism).__name__,
            run.privacy.neighboring_relation,
            level,
            f"{drawn.claimed_epsilon:.3f}",
            "—" if math.isnan(stated) else f"{stated:.3f}",
            f"{drawn.measured['epsilon_any_mechanism']:.3f}"
            + (f" ({reach:.3f})" if reach is not None and math.isfinite(reach) else "")
            + f", {drawn.measured['trials']:.2g}",
            f"{told}, {_rows_text(method)}",
            _why_lower(door, sampling, drawn),
            ", ".join(result.audit for result in results),
            _verdict_text(results),
            datetime.date.today().isoformat(),
        ),
        verdict=str(worst_verdict(results)),
    )


def _whole_method(run: "MethodRun", mechanism: "Mechanism", options: TableOptions) -> "tuple[AuditResult, str]":
    """Audit the method, and say how far the record reached.

    Where rows stay far inside the bound, a record could break it unseen: then once more under one that they reach.
    """
    from lightning_dp.auditing.method import audit_method

    def audited(mechanism: "Mechanism") -> "AuditResult":
        def make_run() -> "MethodRun":
            # The records are the same; what changes them puts new ones in their place.
            return replace(
                run, module=copy.deepcopy(run.module), data=copy.copy(run.data), mechanism=copy.copy(mechanism)
            )

        return audit_method(make_run, steps=options.steps)

    result = audited(mechanism)
    ratio = result.measured["ratio"]
    words = f"{ratio:.3f} of the bound"
    if "max_grad_norm" not in vars(mechanism) or not 0 < ratio < _LOOSE or str(result.verdict) != "consistent":
        return result, words
    tighter = copy.copy(mechanism)
    vars(tighter)["max_grad_norm"] *= ratio / 2
    result = audited(tighter)
    return result, f"{words}; {result.measured['ratio']:.3f} of one of {ratio / 2:.2g} times that"


def _why_lower(door: "Door", sampling: "Sampling", drawn: "AuditResult") -> str:
    """Return why the bound of the stated law stays below the proved epsilon, where it does."""
    from lightning_dp.accounting.events import TernaryRelease, ZCDPRelease

    event, stated = door.event, drawn.measured.get("epsilon_stated_law", math.nan)
    if isinstance(event, ZCDPRelease):
        sampled = ", which knows no gain of sampling; the attacker meets the coin" if sampling.scheme != "full" else ""
        return f"charged by zCDP{sampled}; directions are drawn one by one, so few are"
    if isinstance(event, TernaryRelease):
        return "ternary votes are attacked through the door only"
    if math.isnan(stated):
        return "only the bound of any law is known for this noise"
    if stated > _LOOSE * float(drawn.claimed_epsilon or 0.0):
        return "—"
    return f"few draws: the sums differ in {drawn.measured['coordinates']:.0f} coordinates"


def _rows_text(method: "AuditResult") -> str:
    changed = int(method.measured["changed_rows"])
    return f"{counted(changed, 'row')} changed"


def _verdict_text(results: "Sequence[AuditResult]") -> str:
    from lightning_dp.auditing.result import worst_verdict

    doubtful = [result.audit for result in results if str(result.verdict) != "consistent"]
    return str(worst_verdict(results)) + (f" ({', '.join(doubtful)})" if doubtful else "")


def _first_door(run: "MethodRun", variants: "Sequence[Mechanism]", options: TableOptions) -> "Door":
    """Return the door of the first mechanism that has a proof."""
    from lightning_dp.auditing.door import Door
    from lightning_dp.mechanisms.base import ReleasePlan

    spec = run.module.contribution_spec()
    for mechanism in variants:
        try:
            mechanism.check(spec)
            plan = ReleasePlan(spec=spec, relation=run.privacy.relation, noise_multiplier=options.noise_multiplier)
            mechanism.step_event(plan)
        except ConfigurationError:
            continue
        return Door(mechanism=mechanism, plan=plan)
    raise PrivacyProtocolError("A pair runs by the matrix, but not here.")

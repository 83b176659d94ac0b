"""Audit of the door itself: the ledger first, one release a step, nothing after a refusal."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_dp.auditing.door import FULL, Door, OpenDoor
from lightning_dp.auditing.result import AuditResult, judge
from lightning_dp.errors import ConfigurationError, PrivacyProtocolError

FINDS = (
    "noise drawn before the ledger holds the release, releases that no ledger holds or that are charged as another "
    "event, two releases in a step, a step without one, a release after the budget has said no"
)
MISSES = "what rows, noise and sampler are like; crashes in the middle of a release"


def audit_protocol(door: Door, *, delta: float = 1e-5) -> AuditResult:
    """Try the rules of the door one by one.

    Args:
        door: What is audited.
        delta: Of the claim.
    """
    broken = [name for name, holds in _RULES.items() if not _holds(holds, door)]
    return AuditResult(
        audit="protocol",
        subject=str(door),
        lower_bound=None,
        confidence=1.0,
        claimed_epsilon=door.epsilon(delta),
        delta=delta,
        verdict=judge(is_alarm=bool(broken), is_doubt=False),
        summary=f"{len(_RULES)} rules kept" if not broken else f"broken: {'; '.join(broken)}",
        finds=FINDS,
        misses=MISSES,
        measured={"rules": float(len(_RULES)), "broken": float(len(broken))},
    )


def _holds(rule: Callable[[Door], bool], door: Door) -> bool:
    """Tell whether a rule is kept; a door that refuses what it should let through keeps none."""
    try:
        return rule(door)
    except PrivacyProtocolError:
        return False


def _charges_first(door: Door) -> bool:
    """Tell whether the ledger holds each release by the time its noise is drawn, and gave it its number."""
    opened, seen = door.open(), []
    real = opened.tap.mechanism.release

    def release(total: Tensor, *rest: Any, release_number: int, **named: Any) -> Tensor:
        seen.append((len(opened.ledger), release_number))
        return real(total, *rest, release_number=release_number, **named)

    vars(opened.tap.mechanism)["release"] = release
    for _ in range(3):
        opened.release(())
    return seen == [(1, 1), (2, 2), (3, 3)]


def _charges_the_event(door: Door) -> bool:
    """Tell whether what the ledger holds is what the mechanism states of the plan, once for each release."""
    opened = door.open()
    for _ in range(2):
        opened.release(())
    return opened.ledger.counts() == {(door.event, FULL): 2}


def _refuses_a_second(door: Door) -> bool:
    """Tell whether a second release in a step is refused."""
    opened = door.open()
    opened.session.begin_step()
    _released(opened)
    return _is_refused(lambda: _released(opened)) and len(opened.ledger) == 1


def _misses_none(door: Door) -> bool:
    """Tell whether a step without a release is noticed."""
    opened = door.open()
    opened.session.begin_step()
    return _is_refused(opened.session.end_step)


def _asks_the_budget(door: Door) -> bool:
    """Tell whether nothing is charged or released once the budget says no."""

    def no(event: Any, sampling: Any) -> None:
        raise PrivacyProtocolError("the budget is spent")

    opened = replace(door, may_release=no).open()
    opened.session.begin_step()
    return _is_refused(lambda: _released(opened)) and len(opened.ledger) == 0 and not opened.tap.noisy


_RULES: dict[str, Callable[[Door], bool]] = {
    "the ledger is written before noise is drawn": _charges_first,
    "the ledger holds the mechanism's event, once a release": _charges_the_event,
    "a second release in a step is refused": _refuses_a_second,
    "a step without a release is noticed": _misses_none,
    "the budget is asked before a release": _asks_the_budget,
}


def _released(opened: OpenDoor) -> None:
    opened.session.release((), opened.door.shape, torch.device("cpu"))


def _is_refused(attempt: Callable[[], None]) -> bool:
    try:
        attempt()
    except (ConfigurationError, PrivacyProtocolError):
        return True
    return False

"""The audits that fit a mechanism, in the order of their cost."""

from collections.abc import Sequence

from dp_accounting import NeighboringRelation

from lightning_dp.auditing.directions import audit_directions
from lightning_dp.auditing.door import Door
from lightning_dp.auditing.hygiene import audit_hygiene
from lightning_dp.auditing.noise_scale import audit_noise
from lightning_dp.auditing.one_run import audit_one_run, can_run_once
from lightning_dp.auditing.protocol import audit_protocol
from lightning_dp.auditing.result import AuditResult
from lightning_dp.auditing.sensitivity import audit_sensitivity
from lightning_dp.auditing.trajectory import audit_trajectory
from lightning_dp.auditing.two_worlds import audit_two_worlds
from lightning_dp.mechanisms.von_mises_fisher import VonMisesFisher

NAMES = ("protocol", "sensitivity", "noise", "noise hygiene", "directions", "two worlds", "one run", "trajectory")
"""All audits of a mechanism."""


def audit_mechanism(
    door: Door,
    *,
    calls: int = 2000,
    canaries: int = 1000,
    steps: int = 20,
    confidence: float = 0.95,
    delta: float = 1e-5,
    only: Sequence[str] = NAMES,
) -> list[AuditResult]:
    """Run every audit that fits a mechanism under one plan.

    Args:
        door: What is audited.
        calls: Releases of each world of the two-world test.
        canaries: Canaries of the one-run audit and of the trajectories.
        steps: Releases of a trajectory.
        confidence: Of the lower bounds.
        delta: Of the claims.
        only: Names of audits to run.
    """
    found = [audit_protocol(door, delta=delta)] if "protocol" in only else []
    if "sensitivity" in only:
        found.append(audit_sensitivity(door, delta=delta))
    if door.has_additive_noise and "noise" in only:
        found.append(audit_noise(door, confidence=confidence, delta=delta))
    if door.has_additive_noise and "noise hygiene" in only:
        found.append(audit_hygiene(door))
    if isinstance(door.mechanism, VonMisesFisher) and "directions" in only:
        found.append(audit_directions(door, calls=calls, confidence=confidence, delta=delta))
    if "two worlds" in only:
        found.append(audit_two_worlds(door, calls=calls, confidence=confidence, delta=delta))
    if "one run" in only and can_run_once(door):
        found.append(audit_one_run(door, canaries=canaries, confidence=confidence, delta=delta))
    if "trajectory" in only and _has_trajectories(door):
        found.append(audit_trajectory(door, steps=steps, canaries=canaries, confidence=confidence, delta=delta))
    return found


def _has_trajectories(door: Door) -> bool:
    spec_kinds = door.mechanism.kinds
    return (
        door.has_gaussian_noise
        and "record" in spec_kinds
        and can_run_once(door)
        and door.plan.relation is not NeighboringRelation.REPLACE_ONE
    )

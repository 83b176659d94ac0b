"""Audit E: the likelihood ratio of whole trajectories, over many steps with real coins and real noise.

Each canary has a coordinate of its own, so one session of T releases is as many independent runs as there are canaries.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from dp_accounting import NeighboringRelation
from numpy.typing import NDArray

from lightning_dp.accounting.events import Sampling
from lightning_dp.auditing.bounds import epsilon_of_mu, is_refuted, middle_errors, privacy_profile, tail_errors
from lightning_dp.auditing.door import Door
from lightning_dp.auditing.result import ALARM_CONFIDENCE, AuditResult, judge
from lightning_dp.auditing.two_worlds import error_summary, trade_off_plot
from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.poisson import PoissonSampler
from lightning_dp.gradients.teachers import RowChunk
from lightning_dp.mechanisms.base import ContributionSpec

FINDS = "a wrong sampling rate, a wrong number of steps, too little noise, in composition"
MISSES = "shuffling where all other records are zero; bounds that large rows would break; what a method learns"

_LARGE = 50.0


def audit_trajectory(
    door: Door,
    *,
    steps: int = 20,
    canaries: int = 1000,
    rate: float = 0.1,
    confidence: float = 0.95,
    delta: float = 1e-5,
    make_sampler: type[PoissonSampler] = PoissonSampler,
) -> AuditResult:
    """Bound epsilon of a run of sampled releases by the likelihood ratio of all that it released.

    Args:
        door: What is audited: a mechanism with additive Gaussian noise on records, not under replace-one.
        steps: Releases of a run.
        canaries: Runs with the canary, and as many without.
        rate: Sampling rate.
        confidence: Of the lower bound.
        delta: Of the claim.
        make_sampler: Class of the sampler.

    Raises:
        ConfigurationError: The mechanism or the relation has no such canary.
    """
    wide = _with_a_coordinate_each(door, rate=rate, canaries=canaries)
    scores = _log_likelihood_ratios(wide, steps=steps, canaries=canaries, sampler=make_sampler(2 * canaries, rate))
    without, with_it = scores[canaries:], scores[:canaries]
    errors, tail = middle_errors(without, with_it), tail_errors(without, with_it, delta=delta)
    sampling = Sampling(scheme="poisson", rate=rate)
    claimed = wide.epsilon(delta, sampling=sampling, releases=steps)
    profile = [
        (claimed, delta),
        *privacy_profile({(wide.event, sampling): steps}, relation=door.plan.relation, deltas=(0.2, 1e-2, 1e-3)),
    ]
    bound, mu = tail.epsilon(delta=delta, confidence=confidence), errors.mu(confidence=confidence)
    return AuditResult(
        audit="trajectory",
        subject=f"{wide}; {steps} releases at sampling rate {rate:g}",
        lower_bound=bound,
        confidence=confidence,
        claimed_epsilon=claimed,
        delta=delta,
        verdict=judge(
            is_alarm=any(is_refuted(profile, found, confidence=ALARM_CONFIDENCE) for found in (errors, tail)),
            is_doubt=is_refuted(profile, errors, confidence=confidence),
        ),
        summary=(
            f"{error_summary(errors)}: epsilon at least {bound:.3g} of any mechanism; {epsilon_of_mu(mu, delta):.3g} "
            "if the run were Gaussian"
        ),
        finds=FINDS,
        misses=MISSES,
        measured={"epsilon_any_mechanism": bound, "mu": mu, "epsilon_gaussian": epsilon_of_mu(mu, delta)},
        plot=trade_off_plot(without, with_it, profile),
    )


def _with_a_coordinate_each(door: Door, *, rate: float, canaries: int) -> Door:
    """Return the door with rows in which every canary, and every one that is missing, has a coordinate of its own."""
    if not door.has_gaussian_noise or "record" not in door.mechanism.kinds:
        raise ConfigurationError(f"The trajectory audit wants Gaussian noise on records, got {door}.")
    if door.plan.relation is NeighboringRelation.REPLACE_ONE:
        raise ConfigurationError("The trajectory audit is about records that join; use add_or_remove_one.")
    spec = ContributionSpec.records(
        expected_batch_size=rate * 2 * canaries, vector_dim=2 * canaries, segments=(canaries, canaries)
    )
    return replace(door, plan=replace(door.plan, spec=spec))


def _log_likelihood_ratios(door: Door, *, steps: int, canaries: int, sampler: PoissonSampler) -> NDArray[np.float64]:
    """Return the score of every coordinate; the first half belongs to records that exist."""
    opened, rate, value = door.open(), sampler.rate, _LARGE * door.mechanism.row_bound(door.plan.spec)
    # What one canary adds in its coordinate: the bound, or less where a mechanism wants many coordinates for that.
    reach = float(door.open(silent=True).release(_one_hot(torch.tensor([0]), 2 * canaries, value)).measured[0])
    relative = door.mechanism.noise_std(door.plan) / reach
    total = np.zeros(2 * canaries)
    for _ in range(steps):
        drawn = sampler.draw()
        heard = opened.release(_one_hot(drawn[drawn < canaries], 2 * canaries, value))
        signal = heard.noisy[: 2 * canaries].numpy() / reach
        exponent = math.log(rate) + (2 * signal - 1) / (2 * relative**2)
        total += np.logaddexp(math.log1p(-rate) if rate < 1 else -math.inf, exponent)
    return total


def _one_hot(records: torch.Tensor, dim: int, value: float) -> Iterator[RowChunk]:
    for few in records.split(100):
        rows = torch.zeros(len(few), 1, dim)
        rows[torch.arange(len(few)), 0, few] = value
        yield RowChunk(few, rows, slice(0, 1))

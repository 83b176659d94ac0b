"""Audit C: tell two neighbouring inputs apart from what leaves, over many releases of each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dp.accounting.events import Sampling
from lightning_dp.auditing.bounds import Errors, epsilon_of_mu, is_refuted, middle_errors, privacy_profile, tail_errors
from lightning_dp.auditing.door import FULL, Door, OpenDoor
from lightning_dp.auditing.neighbours import Pair, World
from lightning_dp.auditing.result import ALARM_CONFIDENCE, AuditResult, Line, Plot, judge
from lightning_dp.auditing.sensitivity import compare, worst_pair
from lightning_dp.gradients.poisson import PoissonSampler

FINDS = "whatever makes one release of the worst known neighbours easier to tell apart than its event says, end to end"
MISSES = (
    "a few percent of noise (the power of a few thousand trials); what several releases betray together; neighbours "
    "that are worse than those on the list"
)

_FAR = 1e12  # a vote beyond every threshold
_SHOWN = 60


def audit_two_worlds(
    door: Door,
    *,
    calls: int = 2000,
    sampling: Sampling = FULL,
    confidence: float = 0.95,
    delta: float = 1e-5,
    pair: Pair | None = None,
) -> AuditResult:
    """Bound epsilon of one release by a threshold on the best score, chosen on half of the trials.

    Args:
        door: What is audited.
        calls: Releases of each world.
        sampling: How the canary enters a release: always, or by the coin of a real `PoissonSampler`.
        confidence: Of the lower bound.
        delta: Of the claim.
        pair: The two worlds; None takes the worst pair of audit B.
    """
    pair = worst_pair(door)[0].pair if pair is None else pair
    without, with_it = _scores(door, pair, calls, sampling)
    errors, tail = middle_errors(without, with_it), tail_errors(without, with_it, delta=delta)
    is_gaussian = door.has_gaussian_noise and door.charges_noisy_value and sampling.scheme == "full"
    by_rates = tail.epsilon(delta=delta, confidence=confidence)
    mu = errors.mu(confidence=confidence)
    bound = max(by_rates, epsilon_of_mu(mu, delta)) if is_gaussian else by_rates
    claimed = door.epsilon(delta, sampling=sampling)
    profile = [
        (claimed, delta),
        *privacy_profile({(door.event, sampling): 1}, relation=door.plan.relation),
    ]
    return AuditResult(
        audit="two worlds",
        subject=f"{door}; {pair.name}",
        lower_bound=bound,
        confidence=confidence,
        claimed_epsilon=claimed,
        delta=delta,
        verdict=judge(
            is_alarm=any(is_refuted(profile, found, confidence=ALARM_CONFIDENCE) for found in (errors, tail)),
            is_doubt=is_refuted(profile, errors, confidence=confidence) or bound > claimed,
        ),
        summary=(
            f"{error_summary(errors)} at a threshold fixed beforehand; epsilon at least {by_rates:.3g} of any mechanism"
            + (f", {epsilon_of_mu(mu, delta):.3g} of a Gaussian one (mu {mu:.3g})" if is_gaussian else "")
        ),
        finds=FINDS,
        misses=MISSES,
        measured={
            "epsilon_any_mechanism": by_rates,
            "mu": mu,
            "epsilon_gaussian": epsilon_of_mu(mu, delta),
            "trials": float(2 * calls),
        },
        plot=trade_off_plot(without, with_it, profile),
    )


def _scores(door: Door, pair: Pair, calls: int, sampling: Sampling) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return scores of releases of the left world and of the right one, which has the larger ones."""
    trial = _Trial(door, pair, is_stable=_is_stable(door, pair))
    coin = None if sampling.scheme == "full" else PoissonSampler(1, sampling.rate)

    def run(world: World) -> NDArray[np.float64]:
        return np.array([trial.score(world if coin is None or len(coin.draw()) else pair.absent) for _ in range(calls)])

    return run(pair.left), run(pair.right)


def _is_stable(door: Door, pair: Pair) -> bool:
    """Tell whether releases of one session measure the same of the same rows (no public rotation or projection)."""
    opened = door.open(seed=0, silent=True)
    return torch.equal(opened.release(pair.left).measured, opened.release(pair.left).measured)


@dataclass
class _Trial:
    """Makes releases and scores them along the direction in which the worlds differ."""

    door: Door
    pair: Pair
    is_stable: bool

    def __post_init__(self) -> None:
        self._opened: OpenDoor | None = None
        _, left, right = compare(self.door, self.pair)
        difference = right.measured - left.measured
        # Halfway between the worlds, the best linear score is zero: sums of 400 bounds would hide it otherwise.
        self._centre = (right.measured + left.measured) / 2
        self._direction = difference / max(float(difference.norm()), 1e-300)
        if not self.door.charges_noisy_value:
            shaped = (difference * _FAR).reshape(self.door.shape[0], -1)
            self._direction = self.door.mechanism.decode(shaped, self.door.plan, 1, 0).double().flatten()

    def score(self, world: World) -> float:
        if self._opened is None or not self.is_stable:
            self._opened = self.door.open()  # a fresh secret, and release number one again
        heard = self._opened.release(world)
        seen: Tensor = heard.noisy - self._centre if self.door.charges_noisy_value else heard.released.double()
        return float(seen @ self._direction)


def trade_off_plot(
    without: NDArray[np.float64], with_it: NDArray[np.float64], profile: Sequence[tuple[float, float]]
) -> Plot:
    """Return the attacker's error rates over all thresholds beside what the claim allows.

    Args:
        without: Scores without the canary.
        with_it: Scores with it.
        profile: Points (epsilon, delta) of the claim.
    """
    thresholds = np.quantile(np.concatenate([without, with_it]), np.linspace(0, 1, 200))
    rates = [(float((without > t).mean()), float((with_it <= t).mean())) for t in thresholds]
    grid = np.logspace(-4, 0, _SHOWN)
    least = [
        max(0.0, *(max(1 - d - math.exp(min(e, 700)) * a, math.exp(-min(e, 700)) * (1 - d - a)) for e, d in profile))
        for a in grid
    ]
    return Plot(
        x_label="false positive rate",
        y_label="false negative rate",
        lines=(
            Line(label="attack", x=tuple(a for a, _ in rates), y=tuple(b for _, b in rates)),
            Line(label="least that the claim allows", x=tuple(grid.tolist()), y=tuple(least), is_dashed=True),
        ),
        log_x=True,
        log_y=True,
    )


def error_summary(errors: Errors) -> str:
    """Return the error counts in words."""
    wrong = f"{errors.false_positives} of {errors.num_without} and {errors.false_negatives} of {errors.num_with}"
    return f"{wrong} trials wrong"

"""The law of a von Mises-Fisher direction along the line on which two neighbouring sums lie, in closed form.

With the natural parameter x d (d a unit vector of R^D) the component t = <y, d> of a direction y has a density
proportional to (1 - t^2)^((D - 3) / 2) exp(x t). Between parameters on one line the likelihood ratio is a function of t
alone, so whatever tells them apart is in t, and what the law costs is an integral over t: not a bound, but the epsilon
of this very pair.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_dp.auditing.bounds import Errors

Array = NDArray[np.float64]

_ANGLES = (np.arange(40_000) + 0.5) * (math.pi / 40_000)  # t = cos of them: smooth at both ends for every D >= 2
_LARGEST = 64.0  # a factor beyond which no attacker's errors are looked for


@dataclass(frozen=True)
class DirectionLaw:
    """Directions around two neighbouring sums and around the sum without the record, all on one line.

    Attributes:
        dim: D, at most some thousands, or the angles do not resolve the density.
        left: Natural parameter x of one sum.
        right: And of its neighbour, larger.
        absent: And of the sum without the record.
    """

    dim: int
    left: float
    right: float
    absent: float

    def masses(self, parameter: float) -> Array:
        """Return the chances of the angles, of which the first is next to d."""
        logs = (self.dim - 2) * np.log(np.sin(_ANGLES)) + parameter * np.cos(_ANGLES)
        weights = np.exp(logs - logs.max())
        found: Array = weights / weights.sum()
        return found

    def above(self, parameter: float, thresholds: Array) -> Array:
        """Return the chance of a component above each threshold."""
        chances = np.cumsum(self.masses(parameter))
        found: Array = np.interp(np.arccos(np.clip(thresholds, -1, 1)), _ANGLES, chances)
        return found

    def factor(self, errors: Errors, *, confidence: float) -> float:
        """Return a lower bound on what the parameters must be multiplied by to allow such errors.

        By Neyman and Pearson no attacker with as few false positives has fewer false negatives than the threshold on t.

        Args:
            errors: Of an attacker.
            confidence: Of the bound.
        """
        a, b = errors.upper(confidence)
        low, high = 0.0, _LARGEST
        if self._least_negatives(high, a) > b:
            return high
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self._least_negatives(middle, a) > b else (low, middle)
        return low

    def _least_negatives(self, factor: float, positives: float) -> float:
        chances = np.cumsum(self.masses(factor * self.left))
        return 1 - float(np.interp(positives, chances, np.cumsum(self.masses(factor * self.right))))

    def epsilon(self, delta: float, *, factor: float = 1.0, rate: float = 1.0) -> float:
        """Return the epsilon of the pair at delta.

        Args:
            delta: In (0, 1).
            factor: Of the parameters.
            rate: Chance that the record takes part.
        """
        left, right, absent = (self.masses(factor * x) for x in (self.left, self.right, self.absent))
        worlds = [rate * with_it + (1 - rate) * absent for with_it in (left, right)]

        def excess(epsilon: float) -> float:
            one, two = worlds
            return max(float((p - math.exp(epsilon) * q).clip(min=0).sum()) for p, q in ((one, two), (two, one)))

        low, high = 0.0, 1.0
        if excess(low) <= delta:
            return 0.0
        while excess(high) > delta:
            low, high = high, 2 * high
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) > delta else (low, middle)
        return low

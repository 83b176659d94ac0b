"""How many critic steps go before a generator step: a ladder that is climbed when the critic falls behind."""

from itertools import pairwise
from typing import Any

from lightning_dp.errors import ConfigurationError

LADDER = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


class CriticSchedule:
    """Counts critic steps, and climbs to more of them when noise keeps the critic from telling fakes.

    Only the critic's accuracy on *generated* images decides, which is computed from released and public values, so the
    schedule is free; its accuracy on records would be a release (Bie et al. 2023, Section 4).

    Args:
        ladder: Critic steps for each generator step, rising; one rung keeps the number fixed.
        threshold: Climb when the averaged accuracy on fakes is at most this.
        grace: Generator steps on a rung before the next may be reached.
        decay: Weight of the old average of the accuracy.

    Raises:
        ConfigurationError: A value is out of range.
    """

    def __init__(
        self,
        *,
        ladder: tuple[int, ...] = LADDER,
        threshold: float = 0.6,
        grace: int = 200,
        decay: float = 0.99,
    ) -> None:
        if not ladder or min(ladder) < 1 or any(low >= high for low, high in pairwise(ladder)):
            raise ConfigurationError(f"Expected model.critic_ladder to be rising numbers >= 1, got {tuple(ladder)}.")
        if not 0 <= threshold <= 1 or not 0 <= decay < 1 or grace < 1:
            raise ConfigurationError(
                f"Expected 0 <= model.threshold <= 1, 0 <= decay < 1 and grace >= 1, got {threshold=}, {decay=}, "
                f"{grace=}."
            )
        self.ladder, self.threshold, self.grace, self.decay = tuple(ladder), threshold, grace, decay
        self._rung = 0
        self._critic_steps = 0
        self._generator_steps = 0
        self._accuracy: float | None = None

    @property
    def critic_steps(self) -> int:
        """Critic steps that go before the next generator step."""
        return self.ladder[self._rung]

    @property
    def fake_accuracy(self) -> float | None:
        """Averaged accuracy of the critic on fakes; None before the first generator step."""
        return self._accuracy

    def after_critic_step(self) -> bool:
        """Count a critic step; return whether a generator step is due."""
        self._critic_steps += 1
        return self._critic_steps >= self.critic_steps

    def before_generator_step(self, fake_accuracy: float) -> None:
        """Take in the critic's accuracy on fresh fakes, count the generator step, and climb if it is time.

        Args:
            fake_accuracy: Share of fresh fakes that the critic takes for fakes, in [0, 1].
        """
        if self._accuracy is None:
            self._accuracy = fake_accuracy
        else:
            self._accuracy = self.decay * self._accuracy + (1 - self.decay) * fake_accuracy
        self._critic_steps = 0
        self._generator_steps += 1
        may_climb = self._generator_steps >= self.grace and self._rung + 1 < len(self.ladder)
        if may_climb and self._accuracy <= self.threshold:
            self._rung += 1
            self._generator_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state, for checkpoints; public."""
        return {
            "rung": self._rung,
            "critic_steps": self._critic_steps,
            "generator_steps": self._generator_steps,
            "accuracy": self._accuracy,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._rung, self._critic_steps = state["rung"], state["critic_steps"]
        self._generator_steps, self._accuracy = state["generator_steps"], state["accuracy"]

"""The number by which runs are compared when one of them is chosen, and whose records it was computed from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from lightning_dp.benchmark.records import card_metrics
from lightning_dp.errors import ConfigurationError
from lightning_dp.evaluation.report import RunCard

ScoreRecords: TypeAlias = Literal["held_out", "public", "training"]

_LOWER_IS_BETTER = ("fid", "kid")
_FIDELITY = (*_LOWER_IS_BETTER, "precision", "recall")


@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric of run cards, as every run has it.

    Guarantee: says whose records it read. It is computed from what a run released and from the split that runs are
    judged by; no noise is added, so that split's records are not protected by the claim of the choice.

    Args:
        name: fid, kid, precision, recall, accuracy/test, or accuracy/CLASSIFIER.
        records: What the split by which runs are judged is: held_out (other people's records, which the claim then
            leaves out by name), public, or training (records that are trained on: no epsilon is stated then).
    """

    name: str
    records: ScoreRecords = "held_out"

    def __post_init__(self) -> None:
        if self.name not in _FIDELITY and not self.name.startswith("accuracy/"):
            raise ConfigurationError(
                f"Expected the score to be one of {', '.join(_FIDELITY)} or accuracy/CLASSIFIER, got {self.name!r}."
            )
        if self.records not in get_args(ScoreRecords):
            raise ConfigurationError(
                f"Expected the score's records to be {', '.join(get_args(ScoreRecords))}, got {self.records!r}."
            )

    def check(self, resolved: Mapping[str, Any], cell: str) -> None:
        """Refuse a run that will not have this score.

        Args:
            resolved: Its configuration.
            cell: What a reader calls it.

        Raises:
            ConfigurationError: It will not be judged, or not by this classifier.
        """
        if not resolved.get("evaluate", True):
            raise ConfigurationError(f"{cell} is not judged (evaluate: false), so it has no {self.name}.")
        given = (resolved.get("evaluation") or {}).get("classifiers")
        classifier = self.name.removeprefix("accuracy/")
        if given is not None and classifier not in (*_FIDELITY, "test", *given):
            raise ConfigurationError(
                f"Expected the score of {cell} among accuracy/{', accuracy/'.join(given)}, {', '.join(_FIDELITY)}, got "
                f"{self.name}. Add the classifier to evaluation.classifiers."
            )

    def of(self, card: RunCard) -> float | None:
        """Return the score of a run, higher being better; None where its card has none."""
        value = card_metrics(card).get(self.name)
        if value is None or value != value:
            return None
        return -value if self.name in _LOWER_IS_BETTER else value

    def shown(self, score: float) -> float:
        """Return the metric behind a score."""
        return -score if self.name in _LOWER_IS_BETTER else score

    def not_covered(self, dataset: str) -> tuple[str, ...]:
        """Return in words whose records the choice reads beside those of the claim."""
        if self.records != "held_out":
            return ()
        return (
            f"the held-out records of {dataset}: {self.name}, by which runs were compared, was computed from them "
            "without noise",
        )

    def unverified(self) -> tuple[str, ...]:
        """Return what a proof would lack."""
        if self.records != "training":
            return ()
        return (
            f"that {self.name}, by which runs were compared, tells nothing of the training records: it was computed "
            "from them without noise",
        )

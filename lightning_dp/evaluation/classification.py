"""Accuracy of a released classifier on the real test split."""

import time
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

from lightning_dp.errors import ConfigurationError


class Predictor(Protocol):
    """Anything that labels images."""

    def predict(self, images: Tensor) -> Tensor:
        """Return labels, int64 on the CPU, (n,), of uint8 images, (n, C, H, W)."""
        ...


@dataclass(frozen=True, kw_only=True)
class ClassificationResult:
    """Quality of one released classifier.

    Attributes:
        accuracy: Accuracy by name of the split it was measured on; there is one, `test`.
        num_test: Real test images.
        wall_time_s: Seconds that the evaluation took.
    """

    accuracy: dict[str, float]
    num_test: int
    wall_time_s: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able values."""
        return asdict(self)

    def metrics(self) -> dict[str, float]:
        """Return the numbers under the names a logger should use."""
        return {"accuracy": self.accuracy["test"]}


def evaluate_classifier(network: Predictor, test_images: Tensor, test_labels: Tensor) -> ClassificationResult:
    """Return the accuracy of a *released* classifier on the real test split.

    Guarantee: reads no training record, and nothing is chosen by the result.

    Args:
        network: The released classifier.
        test_images: Real test images, uint8 (n, C, H, W).
        test_labels: Their labels, integers (n,).

    Raises:
        ConfigurationError: There are no test images, or not one label for each.
    """
    if not len(test_images) or len(test_images) != len(test_labels):
        raise ConfigurationError(
            f"Expected test images with one label each, got {len(test_images)} images, {len(test_labels)} labels."
        )
    start = time.perf_counter()
    accuracy = (network.predict(test_images) == test_labels.cpu()).double().mean().item()
    return ClassificationResult(
        accuracy={"test": accuracy}, num_test=len(test_images), wall_time_s=time.perf_counter() - start
    )

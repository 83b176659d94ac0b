"""The evaluation protocol: every choice behind a quality number, under one hash, and the call that follows it."""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from lightning_dp.errors import ConfigurationError
from lightning_dp.evaluation.features import DEFAULT_EXTRACTOR, check_extractor, load_extractor
from lightning_dp.evaluation.fidelity import frechet_distance, kernel_distance, precision_recall
from lightning_dp.evaluation.utility import (
    CLASSIFIER_NAMES,
    ClassifierName,
    TrainingPlan,
    check_classifiers,
    downstream_accuracy,
    fit_classifier,
)

_VERSION = 1  # raise when a change of code changes numbers: old and new hashes must differ
_ROUNDING = 1e-3  # how far outside [0, 1] a float image may lie: resizing and EMA overshoot by rounding only


@dataclass(frozen=True, kw_only=True)
class EvaluationProtocol:
    """How released samples are judged against the real *test* split.

    Two results may be compared only when `hash` is equal (and the test split is the same).

    Attributes:
        extractor: Feature extractor of FID, KID, precision and recall: `digits-fashion-cnn` or `inception`.
        extractor_weights: Weights file, for `inception` only. The hash takes its content, not its path.
        num_samples: Synthetic images judged: a random subset of those given, which must be as many at least.
        num_reference: Real test images for the fidelity metrics; all, if the split has fewer.
        neighbours: k of precision and recall.
        classifiers: Downstream classifiers, trained on the same synthetic images, tested on the whole test split.
        training: Epochs, batch size and selection of those classifiers.
        seed: Of subsets, initial weights and batches. Public; evaluation holds no secret.
    """

    extractor: str = DEFAULT_EXTRACTOR
    extractor_weights: str | None = None
    num_samples: int = 10_000
    num_reference: int = 10_000
    neighbours: int = 3
    classifiers: tuple[ClassifierName, ...] = CLASSIFIER_NAMES
    training: TrainingPlan = field(default_factory=TrainingPlan)
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "classifiers", tuple(self.classifiers))  # YAML gives a list
        check_extractor(self.extractor, self.extractor_weights)
        check_classifiers(self.classifiers)
        if self.neighbours < 1:
            raise ConfigurationError(f"Expected neighbours >= 1, got neighbours={self.neighbours}.")
        for name in ("num_samples", "num_reference"):
            if getattr(self, name) <= self.neighbours:
                raise ConfigurationError(
                    f"Expected {name} > neighbours={self.neighbours}, got {name}={getattr(self, name)}."
                )

    @classmethod
    def quick(cls, **overrides: Any) -> "EvaluationProtocol":
        """Return the small protocol of demos and per-epoch checks: 2,000 images, a shorter CNN training."""
        settings: dict[str, Any] = {"num_samples": 2_000, "num_reference": 2_000}
        return cls(**{**settings, **overrides})

    @property
    def hash(self) -> str:
        """Twelve hex digits over every setting, the extractor's preprocessing and weights, and the code's version.

        Raises:
            ConfigurationError: The extractor cannot be loaded, so its weights are unknown.
        """
        return _hash(self, load_extractor(self.extractor, weights=self.extractor_weights).describe())

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON-able values."""
        return {**asdict(self), "classifiers": list(self.classifiers)}


def _hash(protocol: EvaluationProtocol, extractor: Mapping[str, Any]) -> str:
    settings = {k: v for k, v in protocol.to_dict().items() if k != "extractor_weights"}
    text = json.dumps({"version": _VERSION, **settings, "extractor": dict(extractor)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Quality of one set of synthetic images.

    Attributes:
        fid: Fréchet distance in the space of `fid_extractor`; lower is better.
        fid_extractor: Name of the extractor. FIDs of two extractors are never comparable.
        kid: Unbiased kernel distance in the same space; lower is better, may be slightly negative.
        precision: Share of synthetic images on the real manifold.
        recall: Share of real images on the synthetic manifold.
        accuracy: Test accuracy per downstream classifier.
        num_samples: Synthetic images used.
        num_reference: Real test images used for fidelity.
        num_test: Real test images used for accuracy.
        protocol_hash: `EvaluationProtocol.hash`.
        wall_time_s: Seconds that the evaluation took.
        warnings: What makes the numbers less than they seem, in words.
    """

    fid: float
    fid_extractor: str
    kid: float
    precision: float
    recall: float
    accuracy: dict[str, float]
    num_samples: int
    num_reference: int
    num_test: int
    protocol_hash: str
    wall_time_s: float
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able values."""
        return {**asdict(self), "warnings": list(self.warnings)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EvaluationResult":
        """Rebuild a result from `to_dict`.

        Raises:
            ConfigurationError: Fields are missing or unknown.
        """
        names = {f.name for f in fields(cls)}
        if set(values) != names:
            raise ConfigurationError(f"Expected the fields {sorted(names)} of a result, got {sorted(values)}.")
        return cls(**{**values, "warnings": tuple(values["warnings"])})

    def metrics(self) -> dict[str, float]:
        """Return the numbers under the names a logger should use, e.g. `fid`, `accuracy/cnn`."""
        fidelity = {"fid": self.fid, "kid": self.kid, "precision": self.precision, "recall": self.recall}
        return {**fidelity, **{f"accuracy/{name}": value for name, value in self.accuracy.items()}}


def quantise(images: Tensor) -> Tensor:
    """Return images in [0, 1] as uint8, rounded: what a viewer, a PNG and the extractor see.

    Args:
        images: Float, (M, C, H, W).

    Raises:
        ConfigurationError: Values that are NaN, infinite, or outside [0, 1] by more than rounding.
    """
    num_bad = int((~torch.isfinite(images)).flatten(1).any(dim=1).sum())
    if num_bad:
        raise ConfigurationError(
            f"Expected finite synthetic images, got {num_bad} of {len(images)} with NaN or infinity. "
            "The generator diverged: lower its learning rate."
        )
    low, high = float(images.min()), float(images.max())
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise ConfigurationError(
            f"Expected synthetic images in [0, 1], got values from {low:.4g} to {high:.4g}. "
            "Evaluate what Generator.sample returns."
        )
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def _check_set(kind: str, images: Tensor, labels: Tensor, *, floating: bool) -> None:
    """Refuse a set of images and labels of the wrong shape or type."""
    right_type = images.is_floating_point() if floating else images.dtype == torch.uint8
    if images.ndim != 4 or not right_type or not len(images):
        raise ConfigurationError(
            f"Expected {kind} images, {'float in [0, 1]' if floating else 'uint8'}, of shape (N, C, H, W) with N >= 1, "
            f"got dtype={images.dtype}, shape={tuple(images.shape)}."
        )
    integral = labels.dtype in (torch.int64, torch.int32, torch.uint8)
    if labels.shape != (len(images),) or not integral or int(labels.min()) < 0:
        raise ConfigurationError(
            f"Expected {kind} labels, integers >= 0 of shape ({len(images)},), "
            f"got dtype={labels.dtype}, shape={tuple(labels.shape)}, minimum {labels.min().item()}."
            if labels.numel()
            else f"Expected {len(images)} {kind} labels, got none."
        )


def _check_inputs(
    images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor, protocol: EvaluationProtocol
) -> None:
    """Refuse what cannot be judged under the protocol."""
    _check_set("synthetic", images, labels, floating=True)
    _check_set("test", test_images, test_labels, floating=False)
    if images.shape[1:] != test_images.shape[1:]:
        raise ConfigurationError(
            f"Expected synthetic images of the test images' shape {tuple(test_images.shape[1:])}, "
            f"got {tuple(images.shape[1:])}."
        )
    if len(images) < protocol.num_samples:
        raise ConfigurationError(
            f"Expected at least num_samples={protocol.num_samples} synthetic images, got {len(images)}. "
            "Sample more, or lower num_samples."
        )
    if len(test_images) <= protocol.neighbours:
        raise ConfigurationError(
            f"Expected more than neighbours={protocol.neighbours} test images, got {len(test_images)}."
        )


def _subset(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Return `wanted` of `count` row numbers in random order: given samples may be sorted by class."""
    return torch.randperm(count, generator=generator)[:wanted]


def _notes(labels: Tensor, num_classes: int, fake: Tensor, num_reference: int, feature_dim: int) -> tuple[str, ...]:
    """Return what a reader of the numbers must know about a degenerate set."""
    notes = []
    missing = sorted(set(range(num_classes)) - set(labels.tolist()))
    if missing:
        notes.append(f"No synthetic image has label {', '.join(map(str, missing))}: those classes cannot be learnt.")
    if bool((fake == fake[:1]).all()):
        notes.append("All synthetic images are equal.")
    smallest = min(len(fake), num_reference)
    if smallest <= feature_dim:
        notes.append(f"{smallest} images for {feature_dim} features: the FID's covariance is singular, its bias large.")
    return tuple(notes)


def evaluate_samples(
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    protocol: EvaluationProtocol | None = None,
    *,
    device: torch.device | str | None = None,
) -> EvaluationResult:
    """Judge synthetic samples of a *released* model against the real test split.

    Guarantee: reads no training record. The test split is disjoint from the records that the claim protects, and no
    choice (epoch, subset) depends on it. The result leaves the process, so never pass training images as test images.

    Args:
        images: Synthetic, float in [0, 1], (M, C, H, W), M >= `protocol.num_samples`. Rounded to 256 grey levels first.
        labels: Their labels, integers (M,).
        test_images: Real test images, uint8 (N, C, H, W).
        test_labels: Their labels, integers (N,).
        protocol: None for the default.
        device: Where features and classifiers run; None for the device of `images`.

    Returns: All metrics with sizes, extractor and protocol hash.

    Raises:
        ConfigurationError: Shapes, types, NaN, range or number of images do not fit, or the extractor is not at hand.

    Edge cases: a class missing among the labels, constant images and test splits smaller than `num_reference` give
    numbers and a warning in the result.
    """
    start = time.perf_counter()
    protocol = EvaluationProtocol() if protocol is None else protocol
    _check_inputs(images, labels, test_images, test_labels, protocol)
    target = torch.device(device) if device is not None else images.device
    extractor = load_extractor(protocol.extractor, weights=protocol.extractor_weights, device=target)
    generator = torch.Generator().manual_seed(protocol.seed)
    rows = _subset(len(images), protocol.num_samples, generator)
    fake = quantise(images.detach().cpu()[rows]).to(target)
    fake_labels = labels.cpu()[rows].long().to(target)
    test_images, test_labels = test_images.to(target), test_labels.long().to(target)
    num_classes = int(max(fake_labels.max(), test_labels.max())) + 1

    reference = test_images[_subset(len(test_images), protocol.num_reference, generator).to(target)]
    real_features, fake_features = extractor(reference), extractor(fake)
    precision, recall = precision_recall(real_features, fake_features, neighbours=protocol.neighbours)
    accuracy = _accuracies(fake, fake_labels, test_images, test_labels, num_classes, protocol)
    return EvaluationResult(
        fid=frechet_distance(real_features, fake_features),
        fid_extractor=extractor.name,
        kid=kernel_distance(real_features, fake_features),
        precision=precision,
        recall=recall,
        accuracy=accuracy,
        num_samples=len(fake),
        num_reference=len(reference),
        num_test=len(test_images),
        protocol_hash=_hash(protocol, extractor.describe()),
        wall_time_s=time.perf_counter() - start,
        warnings=_notes(fake_labels, num_classes, fake, len(reference), extractor.feature_dim),
    )


def _accuracies(
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    num_classes: int,
    protocol: EvaluationProtocol,
) -> dict[str, float]:
    """Train each classifier on the synthetic images, uint8 like the test images, and return its test accuracy."""
    images, test_images = images.float() / 255, test_images.float() / 255
    result: dict[str, float] = {}
    for name in protocol.classifiers:
        predictor = fit_classifier(
            name, images, labels, num_classes=num_classes, plan=protocol.training, seed=protocol.seed
        )
        result[name] = downstream_accuracy(predictor, test_images, test_labels)
    return result

"""Utility of synthetic images: a classifier trained on them alone, its accuracy on the real test split.

`fit_classifier` has no argument for real data, so no choice it makes (weights, epoch) can have seen the test split.
All randomness comes from a generator of its own: the global streams of torch and numpy are neither read nor moved.
"""

import copy
import difflib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from lightning_dp.errors import ConfigurationError
from lightning_dp.networks.classifiers import ConvClassifier, MLPClassifier, build_unset, initialise

ClassifierName = Literal["logistic", "mlp", "cnn"]
Selection = Literal["last", "synthetic_validation"]
CLASSIFIER_NAMES: tuple[ClassifierName, ...] = ("logistic", "mlp", "cnn")
Predictor = Callable[[Tensor], Tensor]

_PREDICTED_AT_ONCE = 250
_FUSED = ("cpu", "cuda")  # where one pass over parameters and moments does the work of ten


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How a downstream classifier is trained. Part of the protocol's hash.

    Attributes:
        mlp_epochs: Passes over the synthetic images, MLP.
        cnn_epochs: Passes over the synthetic images, CNN.
        batch_size: Images a step.
        learning_rate: Adam's, constant.
        logistic_iterations: Limit of L-BFGS; it need not converge within.
        selection: `last` takes the last epoch; `synthetic_validation` holds `validation_fraction` of the *synthetic*
            images out and takes the first epoch with the best accuracy on those.
        validation_fraction: Share held out, in (0, 1); only for `synthetic_validation`.
    """

    mlp_epochs: int = 10
    cnn_epochs: int = 6
    batch_size: int = 64
    learning_rate: float = 1e-3
    logistic_iterations: int = 100
    selection: Selection = "last"
    validation_fraction: float = 0.1

    def __post_init__(self) -> None:
        for name in ("mlp_epochs", "cnn_epochs", "batch_size", "logistic_iterations"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"Expected {name} >= 1, got {name}={getattr(self, name)}.")
        if not 0 < self.learning_rate < float("inf"):
            raise ConfigurationError(f"Expected a finite learning_rate > 0, got {self.learning_rate}.")
        if self.selection not in ("last", "synthetic_validation"):
            raise ConfigurationError(
                f"Expected selection 'last' or 'synthetic_validation', got {self.selection!r}. "
                "Selection on test data is not offered."
            )
        if not 0 < self.validation_fraction < 1:
            raise ConfigurationError(f"Expected 0 < validation_fraction < 1, got {self.validation_fraction}.")


def check_classifiers(names: Sequence[str]) -> None:
    """Refuse unknown or repeated classifier names.

    Raises:
        ConfigurationError: With the choices and the nearest match.
    """
    for name in names:
        if name not in CLASSIFIER_NAMES:
            near = difflib.get_close_matches(name, CLASSIFIER_NAMES, n=1, cutoff=0.3)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigurationError(f"Expected classifiers out of {', '.join(CLASSIFIER_NAMES)}, got {name!r}.{hint}")
    if len(set(names)) != len(names):
        raise ConfigurationError(f"Expected each classifier once, got {tuple(names)}.")


@torch.no_grad()
def _predict(network: nn.Module, images: Tensor) -> Tensor:
    """Return the predicted labels, (N,)."""
    return torch.cat([network(part).argmax(dim=1) for part in images.split(_PREDICTED_AT_ONCE)])


def _train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    order: Sequence[Tensor],
) -> None:
    """Take one pass of cross-entropy steps over the batches of `order`."""
    for rows in order:
        loss = nn.functional.cross_entropy(network(images[rows]), labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


@torch.enable_grad()
def _fit_network(
    network: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, plan: TrainingPlan, generator: torch.Generator
) -> Predictor:
    """Train a network on synthetic images and return the predictor of the epoch that the plan selects."""
    initialise(network, generator)
    network = network.to(images.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    num_held_out = 0
    order = torch.randperm(len(images), generator=generator)
    if plan.selection == "synthetic_validation" and len(images) > 1:
        num_held_out = min(len(images) - 1, max(1, round(plan.validation_fraction * len(images))))
    held_out, kept = order[:num_held_out], order[num_held_out:]
    optimizer = torch.optim.Adam(network.parameters(), lr=plan.learning_rate, fused=images.device.type in _FUSED)
    best_accuracy, best_state = -1.0, None
    for _ in range(epochs):
        shuffled = kept[torch.randperm(len(kept), generator=generator)]
        _train_epoch(network, optimizer, images, labels, shuffled.split(plan.batch_size))
        if num_held_out:
            accuracy = float((_predict(network, images[held_out]) == labels[held_out]).float().mean())
            if accuracy > best_accuracy:
                best_accuracy, best_state = accuracy, copy.deepcopy(network.state_dict())
    if best_state is not None:
        network.load_state_dict(best_state)
    network.requires_grad_(False)
    return lambda test_images: _predict(network, test_images)


def _fit_logistic(images: Tensor, labels: Tensor, plan: TrainingPlan) -> Predictor:
    """Fit multinomial logistic regression on pixels. Convex and without a seed: nothing to select."""
    targets = labels.cpu().numpy()
    if len(np.unique(targets)) == 1:  # sklearn refuses one class; its answer is known
        only = int(targets[0])
        return lambda test_images: torch.full((len(test_images),), only, device=test_images.device)
    model = LogisticRegression(max_iter=plan.logistic_iterations, tol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the limit of iterations is part of the protocol
        model.fit(images.flatten(1).cpu().numpy(), targets)

    def predict(test_images: Tensor) -> Tensor:
        predicted = model.predict(test_images.flatten(1).cpu().numpy())
        return torch.from_numpy(predicted).to(test_images.device)

    return predict


def fit_classifier(
    name: ClassifierName, images: Tensor, labels: Tensor, *, num_classes: int, plan: TrainingPlan, seed: int
) -> Predictor:
    """Train one downstream classifier on synthetic images.

    Args:
        name: `logistic`, `mlp` or `cnn`.
        images: Synthetic images in [0, 1], float (M, C, H, W); training runs on their device.
        labels: Their labels in [0, num_classes), int64 (M,). Classes may be missing.
        num_classes: Number of classes of the task.
        plan: Epochs, batch size, selection.
        seed: Decides initial weights, batches and the synthetic validation split. The same seed gives the same
            predictor on one thread.

    Returns: A function from images (N, C, H, W) to predicted labels (N,).

    Raises:
        ConfigurationError: Unknown name, no image, or images too small for the CNN.
    """
    check_classifiers([name])
    if not len(images):
        raise ConfigurationError("Expected at least one synthetic image to train a classifier, got none.")
    if name == "logistic":
        return _fit_logistic(images, labels, plan)
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = images.shape[1:]
    shape = (channels, height, width)
    if name == "mlp":
        network, epochs = build_unset(lambda: MLPClassifier(shape, num_classes)), plan.mlp_epochs
    else:
        network, epochs = build_unset(lambda: ConvClassifier(shape, num_classes)), plan.cnn_epochs
    return _fit_network(network, images, labels, epochs=epochs, plan=plan, generator=generator)


def downstream_accuracy(predictor: Predictor, test_images: Tensor, test_labels: Tensor) -> float:
    """Return the share of real test images, float in [0, 1], (N, C, H, W), that the predictor labels rightly."""
    return float((predictor(test_images) == test_labels).double().mean())

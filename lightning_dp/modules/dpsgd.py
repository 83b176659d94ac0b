"""DP-SGD: a classifier learns from clipped, noised sums of per-record gradients (Abadi et al. 2016, Algorithm 1)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dp.errors import ConfigurationError
from lightning_dp.evaluation.classification import ClassificationResult, evaluate_classifier
from lightning_dp.evaluation.protocol import EvaluationProtocol
from lightning_dp.gradients.per_record import RecordLoss, trainable_parameters
from lightning_dp.gradients.source import GradientMode
from lightning_dp.gradients.views import random_views
from lightning_dp.mechanisms.base import ContributionSpec
from lightning_dp.modules.options import check_decay, check_positive, check_share
from lightning_dp.modules.records import RecordModule
from lightning_dp.modules.schedule import with_cosine_schedule
from lightning_dp.networks.classifier import Classifier

_VIEWS = 0  # purpose of a record's own randomness
_FEATURES_AT_ONCE = 500


class DPSGDClassifier(RecordModule):
    """A classifier trained by DP-SGD; with another mechanism, by whatever that makes of per-record gradients.

    Guarantee: a record reaches the one row that is its own gradient, averaged over its views, which the mechanism
    bounds. Optimizer, schedule and moving average see released values only.

    Args:
        network: The network that leaves.
        expected_batch_size: Mean number of records of a step.
        views_per_record: Random views whose losses are averaged before a record is clipped (De et al. 2022).
        max_shift: Largest shift of a view in pixels.
        flip: Whether views are mirrored at random; for digits they should not be.
        keep_features: Compute what no parameter touches (`Classifier.features`) once for all records and keep it in
            memory, instead of once for every use of a record. Private data like the images; needs views to be off.
        optimizer: sgd or adam, on released gradients.
        learning_rate: First learning rate.
        momentum: Of sgd, in [0, 1).
        final_learning_rate_share: The learning rate falls along a half cosine to this share of itself; 1 keeps it.
        ema_decay: Decay of the moving average that is released; 0 releases the last iterate.
        chunk_size: Records whose gradients are held at a time (the physical batch); null fits it to cache and memory.
        gradients: How per-record gradients are made: functorch differentiates record by record, materialize forms a row
            for each, ghost forms norms and sums without rows where it can, auto is the fastest; speed and memory only.
        public_seed: See `PoissonModule`.

    Raises:
        ConfigurationError: A value is out of range or would be ignored.
    """

    def __init__(
        self,
        network: Classifier,
        *,
        expected_batch_size: float = 512,
        views_per_record: int = 1,
        max_shift: int = 0,
        flip: bool = False,
        keep_features: bool = False,
        optimizer: Literal["sgd", "adam"] = "sgd",
        learning_rate: float = 1.0,
        momentum: float = 0.0,
        final_learning_rate_share: float = 1.0,
        ema_decay: float = 0.0,
        chunk_size: int | None = None,
        gradients: GradientMode = "auto",
        public_seed: int = 0,
    ) -> None:
        super().__init__(
            expected_batch_size=expected_batch_size,
            chunk_size=chunk_size,
            gradients=gradients,
            public_seed=public_seed,
            ema_decay=ema_decay,
        )
        check_positive(views_per_record=views_per_record, learning_rate=learning_rate)
        check_decay(momentum=momentum)
        check_share(final_learning_rate_share=final_learning_rate_share)
        if max_shift < 0:
            raise ConfigurationError(f"Expected model.max_shift >= 0, got max_shift={max_shift}.")
        if views_per_record > 1 and not (max_shift or flip):
            raise ConfigurationError(
                f"model.views_per_record={views_per_record} would average equal views; set model.max_shift or flip."
            )
        if keep_features and (max_shift or flip):
            raise ConfigurationError("model.keep_features keeps one view of a record; set max_shift and flip to none.")
        if optimizer == "adam" and momentum:
            raise ConfigurationError(f"model.momentum={momentum} is of sgd and would be ignored by adam; leave it out.")
        self.network = network
        self.keep_average(network)
        self.views_per_record, self.max_shift, self.flip = views_per_record, max_shift, flip
        self.keep_features = keep_features
        self._kept: tuple[Tensor, Tensor] | None = None  # images and features; no buffers, which checkpoints would hold
        self.optimizer, self.learning_rate, self.momentum = optimizer, learning_rate, momentum
        self.final_learning_rate_share = final_learning_rate_share

    # Public facts ----------------------------------------------------------------------------------------------------

    @override
    def contribution_spec(self) -> ContributionSpec:
        return self.record_spec(self.network)

    @override
    def released_networks(self) -> dict[str, nn.Module]:
        return {"classifier": self.network}

    @property
    @override
    def makes_images(self) -> bool:
        return False

    @override
    def released_model(self) -> Classifier:
        """Return the classifier that is published: the average if there is one."""
        return self.averaged(self.network)

    @override
    def evaluate_released(
        self, test_images: Tensor, test_labels: Tensor, protocol: EvaluationProtocol, *, seed: int
    ) -> ClassificationResult:
        """Return the accuracy on the real test split; the protocol of samples does not apply."""
        return evaluate_classifier(self.released_model(), test_images, test_labels)

    # Training --------------------------------------------------------------------------------------------------------

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = list(trainable_parameters(self.network).values())
        optimizer: Optimizer
        if self.optimizer == "adam":
            optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
        else:
            optimizer = torch.optim.SGD(parameters, lr=self.learning_rate, momentum=self.momentum)
        return with_cosine_schedule(
            optimizer, num_steps=self.planned_releases, final_share=self.final_learning_rate_share
        )

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.train_on_release(self.network)

    @override
    def record_loss_of(self) -> tuple[nn.Module, RecordLoss]:
        return self.network, cross_entropy_of_features if self.keep_features else mean_cross_entropy

    @override
    def record_batch(self, ids: Tensor) -> tuple[Tensor, ...]:
        if self.keep_features:
            blank = self._is_rehearsing
            features = self.network.features(self.images_of(ids)).detach() if blank else self._features_of(ids)
            return features, self.labels_of(ids)
        return self._views(self.images_of(ids), ids), self.labels_of(ids)

    @torch.no_grad()
    def _features_of(self, ids: Tensor) -> Tensor:
        """Return the features of records, (n, d). Private."""
        images: Tensor = self.trainer.datamodule.train_images  # type: ignore[attr-defined]
        if self._kept is None or self._kept[0] is not images:
            every = torch.arange(len(images)).split(_FEATURES_AT_ONCE)
            self._kept = images, torch.cat([self.network.features(self.images_of(some)) for some in every])
        features = self._kept[1]
        return features[ids.to(features.device)]

    def _views(self, images: Tensor, ids: Tensor) -> Tensor:
        if not (self.max_shift or self.flip):
            return images.unsqueeze(1)
        return random_views(
            images,
            ids=ids,
            num_views=self.views_per_record,
            max_shift=self.max_shift,
            flip=self.flip,
            seed=self.record_seed(_VIEWS),
        )


def mean_cross_entropy(network: nn.Module, views: Tensor, label: Tensor) -> Tensor:
    """Return the loss of one record: cross entropy averaged over its views.

    Args:
        network: Returns logits.
        views: (1, K, C, H, W).
        label: (1,).
    """
    logits = network(views.flatten(0, 1))  # (K, num_classes)
    return F.cross_entropy(logits, label.expand(len(logits)))


def cross_entropy_of_features(network: Classifier, features: Tensor, label: Tensor) -> Tensor:
    """Return the loss of one record from its fixed features.

    Args:
        network: See `Classifier.classify`.
        features: (1, d).
        label: (1,).
    """
    return F.cross_entropy(network.classify(features), label)

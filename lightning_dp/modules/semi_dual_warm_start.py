"""A warm start by transport: the method's own generator follows some releases of the semi-dual of DP-Sinkhorn first."""

import copy
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dp.accounting.events import Sampling
from lightning_dp.errors import ConfigurationError, PrivacyProtocolError
from lightning_dp.mechanisms.base import ContributionSpec
from lightning_dp.modules.base import PrivateModule
from lightning_dp.modules.release import ReleaseSession
from lightning_dp.modules.semi_dual import SemiDualSinkhorn
from lightning_dp.modules.warm_start import WarmStart
from lightning_dp.networks.basis import LowFrequencyDCT
from lightning_dp.networks.generator import Generator

_POINT_STEPS = 2.0**12


class SemiDualWarmStart(WarmStart):
    """DP-Sinkhorn by its semi-dual first, on a copy of the method's own generator; many releases of Poisson batches.

    The method takes the copy's parameters over, and samples of it. One release of class moments teaches blurred
    Gaussians; this teaches what the network itself can draw. A generator of another kind is sampled only.

    Guarantee: that of `SemiDualSinkhorn`, release by release. Points of records are computed in whole steps, so that a
    record's are the same to the last bit whatever others there are.

    Args:
        budget: See `WarmStart`.
        samples: See `WarmStart`.
        steps: See `WarmStart`; for what is learned from samples beside the generator (a critic, an encoder).
        learning_rate: See `WarmStart`.
        releases: Releases of the warm start.
        generator: What is trained instead of a copy of the method's own generator; null copies.
        num_coefficients: Coefficients per channel of the public cosine basis in which images are compared.
        window: See `LowFrequencyDCT`.
        expected_batch_size: See `SemiDualSinkhorn`, as what follows; `transport_learning_rate` is its learning rate.
        images_per_class: See `SemiDualSinkhorn`.
        entropic_reg: See `SemiDualSinkhorn`.
        transport_learning_rate: Adam's on releases; it falls to a fiftieth.
        ema_decay: See `SemiDualSinkhorn`.
        max_grad_norm: Bound on what one record sends.

    Raises:
        ConfigurationError: A value is out of range.
    """

    def __init__(
        self,
        *,
        budget: float = 0.5,
        samples: int = 10_000,
        steps: int = 300,
        learning_rate: float = 5e-3,
        releases: int = 500,
        generator: Generator | None = None,
        num_coefficients: int = 100,
        window: int | None = None,
        expected_batch_size: float = 1000,
        images_per_class: int = 10,
        entropic_reg: float = 50.0,
        transport_learning_rate: float = 5e-2,
        ema_decay: float = 0.99,
        max_grad_norm: float = 5.0,
    ) -> None:
        super().__init__(budget=budget, samples=samples, steps=steps, learning_rate=learning_rate)
        if releases < 1:
            raise ConfigurationError(f"Expected warm_start.releases >= 1, got {releases=}.")
        self.num_releases, self.row_bound = releases, max_grad_norm
        self.generator, self.num_coefficients, self.window = generator, num_coefficients, window
        self.expected_batch_size, self.images_per_class = expected_batch_size, images_per_class
        self.entropic_reg, self.transport_learning_rate = entropic_reg, transport_learning_rate
        self.ema_decay = ema_decay
        self._method: _WithoutTrainer | None = None

    @override
    def describe_module(self, module: PrivateModule) -> None:
        facts = module.facts
        if self.expected_batch_size > facts.num_records:
            raise ConfigurationError(
                f"Expected warm_start.expected_batch_size <= {facts.num_records}, the number of records, got "
                f"expected_batch_size={self.expected_batch_size}."
            )
        self._method = _WithoutTrainer(
            copy.deepcopy(self.generator or module.released_generator()).requires_grad_(),
            LowFrequencyDCT(facts.image_shape, self.num_coefficients, self.window),
            expected_batch_size=self.expected_batch_size,
            images_per_class=self.images_per_class,
            entropic_reg=self.entropic_reg,
            learning_rate=self.transport_learning_rate,
            final_learning_rate_share=0.02,
            ema_decay=self.ema_decay,
        )
        self._method.describe_data(facts)
        self._method.planned_releases = self.num_releases

    @property
    def method(self) -> "_WithoutTrainer":
        """The method that makes the releases."""
        if self._method is None:
            raise PrivacyProtocolError("plan_release() comes first.")
        return self._method

    @override
    def contribution_spec(self) -> ContributionSpec:
        return self.method.contribution_spec()

    @property
    @override
    def sampling(self) -> Sampling:
        return self.method.sampling

    @override
    def join_run(self, module: PrivateModule, *, seed: int) -> None:
        method = self.method.to(module.device)
        method.ranks, method.insecure_seed, method.public_seed = module.ranks, module.insecure_seed, seed

    @override
    def released_samples(
        self, session: ReleaseSession, images: Tensor, labels: Tensor, records: range, *, seed: int
    ) -> tuple[Tensor, Tensor]:
        self.method.train_on(session, images, labels, records)
        return self.method.released_generator().sample(self.samples, seed=seed)

    @property
    @override
    def source(self) -> Generator:
        return self.method.released_generator()


class _WithoutTrainer(SemiDualSinkhorn):
    """The method on records that it is handed, for a number of releases, inside of another method's run."""

    @torch.enable_grad()
    def train_on(self, session: ReleaseSession, images: Tensor, labels: Tensor, records: range) -> None:
        """Make the planned releases, and follow them.

        Args:
            session: The door.
            images: uint8, (n, C, H, W), of the records that this process owns. Private.
            labels: int64, (n,). Private.
            records: Their ids among all.
        """
        self.setup("fit")
        self._own, self._own_labels = records, labels
        if not isinstance(self.basis, LowFrequencyDCT):
            raise PrivacyProtocolError("A warm start compares images in a LowFrequencyDCT.")
        # Twice: the scale of pixels in [-1, 1], as `points_of` has it.
        self._own_points = (2 / _POINT_STEPS * self.basis.in_steps(images, _POINT_STEPS)).float()
        made: Any = self.configure_optimizers()
        [self._optimizer], [self._schedule] = made
        self.attach(session, [self._optimizer])
        for _ in range(self.planned_releases):
            session.begin_step()
            self.training_step(None, 0)
            session.end_step()
        self.check_published()
        del self._own_points, self._own_labels  # private, and no part of a checkpoint

    @override
    def draw_records(self) -> Tensor:
        ids = super().draw_records()
        # An audit plays the last record, or the first, as gone; its coin moves no other's.
        return ids[(ids >= self._own.start) & (ids < self._own.stop)]

    @override
    def record_points(self, ids: Tensor) -> Tensor:
        return self._own_points[self._places(ids)]

    @override
    def labels_of(self, ids: Tensor) -> Tensor:
        return self._own_labels[self._places(ids)]

    def _places(self, ids: Tensor) -> Tensor:
        return ((ids - self._own.start) // self._own.step).to(self.device)

    @override
    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        return self._optimizer

    @override
    def lr_schedulers(self) -> Any:
        return self._schedule

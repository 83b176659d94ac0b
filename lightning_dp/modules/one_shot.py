"""Methods whose releases are sums over all records, from which a network is then fitted without the records."""

from abc import abstractmethod
from typing import Any

import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.modules.base import PrivateModule
from lightning_dp.modules.release import Released
from lightning_dp.networks.generator import Generator


class OneShotModule(PrivateModule):
    """A method that releases statistics of all records, mostly once, and fits its generator to them.

    What is fitted from released values alone reaches the generator by one step of plain gradient descent at rate 1 on
    the gradient (present parameters - fitted parameters), so the release guard watches it as any other step.

    Args:
        generator: The network that leaves.
        public_seed: Seed of public randomness.
    """

    def __init__(self, generator: Generator, *, public_seed: int = 0) -> None:
        super().__init__()
        self.generator = generator
        self.public_seed = public_seed

    @override
    def released_networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator}

    @override
    def released_generator(self) -> Generator:
        return self.generator

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        return torch.optim.SGD(self.generator.parameters(), lr=1.0)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self._take(self.release_statistics())
        self.optimizers().step()  # type: ignore[union-attr]

    @abstractmethod
    def release_statistics(self) -> tuple[Released, dict[str, Tensor]]:
        """Make the release of this step, and fit the generator to all releases so far.

        Returns:
            The release, and the fitted parameters by name, computed from released and public values only.
        """

    def private_images(self) -> Tensor:
        """Return the training images that this process owns, uint8, (n, C, H, W). Private."""
        images: Tensor = self.trainer.datamodule.train_images  # type: ignore[attr-defined]
        return images[self.own_records.start :: self.own_records.step].to(self.device)

    def private_labels(self) -> Tensor:
        """Return their labels, int64, (n,). Private."""
        labels: Tensor = self.trainer.datamodule.train_labels  # type: ignore[attr-defined]
        return labels[self.own_records.start :: self.own_records.step].to(self.device)

    @property
    def own_records(self) -> range:
        """Which records this process owns; public."""
        return self.ranks.owned(self.facts.num_records)

    def _take(self, found: tuple[Released, dict[str, Tensor]]) -> None:
        released, fitted = found
        parameters = dict(self.generator.named_parameters())
        wanted = torch.cat([fitted[name].to(p).flatten() for name, p in parameters.items()])
        present = torch.cat([p.detach().flatten() for p in parameters.values()])
        self.assign_released(parameters.values(), released.map(lambda _: present - wanted))

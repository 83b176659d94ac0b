"""The Lightning strategy of runs on many processes: nothing is averaged, replicas start equal and stay so."""

import atexit
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, ParallelStrategy, Strategy, StrategyRegistry
from typing_extensions import override

from lightning_dp.errors import ConfigurationError, PeerError
from lightning_dp.gradients.ranks import Ranks

STRATEGY = "private_ddp"

Message = TypeVar("Message")


class PrivateDDPStrategy(DDPStrategy):
    """One process a device, whose private rows meet in the sum of a release and nowhere else.

    Lightning's `ddp` averages whatever gradient a backward pass leaves, on its way and without noise. Here no backward
    pass is watched: a release gives every process the same value, from which each takes the same step.

    Args:
        options: Those of Lightning's `DDPStrategy` that speak of processes (`timeout`, `process_group_backend`, ...).
    """

    @override
    def setup_environment(self) -> None:
        """Join the other processes, and leave them before Python ends: Lightning sees to that for NCCL alone."""
        super().setup_environment()
        atexit.register(_leave)

    @override
    def configure_ddp(self) -> None:
        """Take the parameters and buffers of process 0; wrap nothing."""
        ranks = ranks_of(self)
        for tensor in [*self.lightning_module.parameters(), *self.lightning_module.buffers()]:  # type: ignore[union-attr]
            ranks.copy_first(tensor)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        with _contact(self):
            super().barrier(*args, **kwargs)

    @override
    def broadcast(self, obj: Message, src: int = 0) -> Message:
        with _contact(self):
            return super().broadcast(obj, src)

    @override
    def on_exception(self, exception: BaseException) -> None:
        # Whoever waits for this process learns at once that it will not come.
        _leave()


StrategyRegistry.register(
    STRATEGY, PrivateDDPStrategy, description="Sums before noise; averages nothing", override=True
)


def ranks_of(strategy: Strategy) -> Ranks:
    """Return the processes of a run."""
    if not isinstance(strategy, PrivateDDPStrategy):
        return Ranks()
    return Ranks(strategy.global_rank, strategy.world_size, strategy.root_device)


def check_strategy(trainer: pl.Trainer) -> None:
    """Refuse strategies that move gradients, or cut networks, on their own.

    Raises:
        ConfigurationError: One of them.
    """
    strategy = trainer.strategy
    if isinstance(strategy, PrivateDDPStrategy):
        if strategy._layer_sync is not None:
            raise ConfigurationError(
                "trainer.sync_batchnorm has nothing to do: every process passes the same public batch through networks "
                "that have batch normalisation. Leave it out."
            )
        return
    if isinstance(strategy, ParallelStrategy) or trainer.world_size > 1:
        raise ConfigurationError(
            f"Expected trainer.strategy={STRATEGY} for {trainer.world_size} processes, got {type(strategy).__name__}, "
            "which averages or cuts gradients before they are released. Set trainer.strategy to private_ddp (the "
            "command line does so by itself), or trainer.devices to 1."
        )


def _leave() -> None:
    # NCCL's group would wait for the others here, and Lightning leaves it at the end.
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


@contextmanager
def _contact(strategy: DDPStrategy) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise PeerError(f"Process {strategy.global_rank} lost another one of its run ({reason}).") from error

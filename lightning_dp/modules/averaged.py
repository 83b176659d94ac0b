"""Methods that count their steps and may publish a moving average of what they train."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, cast

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dp.modules.base import PrivateModule
from lightning_dp.modules.guard import ReleaseGuard
from lightning_dp.modules.options import check_decay
from lightning_dp.modules.release import ReleaseSession
from lightning_dp.networks.ema import ExponentialMovingAverage

Network = TypeVar("Network", bound=nn.Module)


class AveragedModule(PrivateModule):
    """A method with a moving average over its steps, if one is asked for: post-processing of released values.

    Args:
        ema_decay: Decay of the moving average of what is published, in [0, 1); 0 keeps none.

    Raises:
        ConfigurationError: The decay is out of range.
    """

    def __init__(self, *, ema_decay: float) -> None:
        super().__init__()
        check_decay(ema_decay=ema_decay)
        self.ema_decay = ema_decay
        self.average: ExponentialMovingAverage | None = None
        self._follows: tuple[nn.Module, ...] = ()
        self._average_guard: ReleaseGuard | None = None
        self._round = 0

    def keep_average(self, network: nn.Module) -> None:
        """Keep a moving average of a network that will be published, if one was asked for; call once it is built."""
        if self.ema_decay > 0:
            self.average = ExponentialMovingAverage(network, decay=self.ema_decay)
            # In a tuple: as an attribute its parameters would be listed twice, and a copy of the method copies it.
            self._follows = (network,)

    def averaged(self, network: Network) -> Network:
        """Return the moving average of `network`, or the network itself where none is kept."""
        return network if self.average is None else cast(Network, self.average.network)

    def start_average(self) -> None:
        """Let the average begin where the network is, after a warm start."""
        if self.average is not None:
            self.average.network.load_state_dict(self._follows[0].state_dict())

    def step_optimizer(self) -> None:
        """Let the one optimizer (and its schedule, if any) step on what was released, and finish the training step."""
        self.optimizers().step()  # type: ignore[union-attr]
        self.step_schedule()
        self.finish_step()

    def step_schedule(self) -> None:
        """Move the learning rate along its schedule, if there is one."""
        schedule = self.lr_schedulers()
        if schedule is not None:
            schedule.step()  # type: ignore[union-attr]

    def finish_step(self, *, with_average: bool = True) -> None:
        """Move the average (if what it follows has moved) and count the step; the last call of a training step."""
        if self.average is not None and with_average:
            self.check_published()  # an edit after the guarded step would be averaged in
            self.average.update(self._follows[0])
            if self._average_guard is not None:
                self._average_guard.remember()
        self._round += 1

    @override
    def attach(self, session: ReleaseSession, optimizers: Iterable[Optimizer]) -> None:
        super().attach(session, optimizers)
        if self.average is not None:
            self._average_guard = ReleaseGuard(self.average.network.parameters())

    @override
    def check_published(self) -> None:
        super().check_published()
        if self._average_guard is not None and self.average is not None:
            self._average_guard.check_parameters(self.average.network.parameters())

    @override
    def _check_watched(self) -> None:
        super()._check_watched()
        if self.average is not None:
            self._require_watched(self._follows[0], self._released_parameters())

    @override
    def watched_parameters(self) -> Iterator[nn.Parameter]:
        yield from super().watched_parameters()
        if self.average is not None:
            yield from self.average.network.parameters()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["round"] = self._round
        checkpoint["ema_updates"] = 0 if self.average is None else self.average.num_updates

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._round = checkpoint["round"]
        if self.average is not None:
            self.average.num_updates = checkpoint["ema_updates"]

"""Watches the parameters of released networks: they move by guarded steps on released gradients alone."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dp.errors import PrivacyProtocolError


class ReleaseGuard:
    """Compares gradients and parameters, by value, with what releases and guarded steps left behind.

    By value, because a write through ``.data`` leaves no trace in a tensor's version. Checked before a step and after
    it, because a closure runs in between.

    Catches: a gradient from another backward pass, added to or written over; a second optimizer; parameters edited in
    place. Does not catch: private values used in the forward pass whose output is back-propagated, hooks that a method
    puts on its own parameters, and closures captured by `Released.map`.

    Args:
        parameters: Parameters of the released networks.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._mine = {id(parameter) for parameter in self._parameters}
        self._admitted: dict[int, Tensor] = {}
        self._expected: list[Tensor] = []
        self.remember()

    def watch(self, optimizer: Optimizer) -> None:
        """Check every step of an optimizer that holds parameters of released networks."""
        if any(id(p) in self._mine for group in optimizer.param_groups for p in group["params"]):
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)

    def admit(self) -> None:
        """Take the present gradients as released; called where a released value has just been back-propagated."""
        self._admitted = {id(p): p.grad.detach().clone() for p in self._parameters if p.grad is not None}

    def remember(self) -> None:
        """Take the present parameters as what a guarded step has left."""
        self._expected = [parameter.detach().clone() for parameter in self._parameters]

    def check_parameters(self, present: Iterable[nn.Parameter] | None = None) -> None:
        """See that no parameter has moved since the last guarded step; asked before each step and before publishing.

        Args:
            present: What stands in the networks now, where others may have been put; None if they are the same.

        Raises:
            PrivacyProtocolError: One has moved, or there are more or fewer.
        """
        found = self._parameters if present is None else list(present)
        is_same = len(found) == len(self._expected)
        for parameter, expected in zip(found, self._expected, strict=False):
            if not is_same or not _same(parameter.detach(), expected):
                raise PrivacyProtocolError(
                    "A parameter of a released network changed outside a step on a released gradient (by another "
                    "optimizer, or an edit in place). Nothing private may reach it but through release()."
                )

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.check_parameters()
        self._check_gradients(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._check_gradients(optimizer)
        self.remember()

    def _check_gradients(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name, gradient = id(parameter), parameter.grad
                if gradient is None or name not in self._mine:
                    continue
                admitted = self._admitted.get(name)
                if admitted is None or not _same(gradient, admitted):
                    raise PrivacyProtocolError(
                        "An optimizer of a released network was about to step on a gradient that did not come from a "
                        "release (or was changed since). Use self.backward_released(outputs, self.release(...))."
                    )


def _same(left: Tensor, right: Tensor) -> bool:
    """Compare by value; a NaN equals a NaN in the same place."""
    if left.device != right.device:  # strategies move a module off its device when training is over
        right = right.to(left.device)
    return torch.equal(left, right) or torch.equal(torch.nan_to_num(left), torch.nan_to_num(right))

"""Says which layer of a network per-record gradients fail at."""

from types import TracebackType
from typing import Any, Self

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_dp.errors import ConfigurationError, PrivacyProtocolError

_DRAWS = "random operation"
_LONGEST = 200


class FailingLayer:
    """While it is active, an error in the forward pass of a network is told with the layer that it arose in.

    Args:
        network: The network.

    Raises:
        ConfigurationError: On leaving, in place of an error that was raised meanwhile.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._inside: list[str] = []
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, layer in self._network.named_modules():
            self._hooks.append(layer.register_forward_pre_hook(self._entering(name)))
            self._hooks.append(layer.register_forward_hook(self._leaving))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if not isinstance(error, Exception) or isinstance(error, ConfigurationError | PrivacyProtocolError | Warning):
            return
        reason = (str(error).splitlines() or [type(error).__name__])[0][:_LONGEST].rstrip(". ")
        if isinstance(error, MemoryError) or "memory" in reason:
            return  # told elsewhere, with what takes it
        mend = "write it in operations that torch.func.vmap knows"
        if _DRAWS in reason:
            reason, mend = "it draws random numbers", "leave it out (the noise of a private step regularises already)"
        raise ConfigurationError(
            f"Expected a gradient of each record by itself, but there is none {self._where()}: {reason}. Change that: "
            f"{mend}. Nothing was released."
        ) from error

    def _entering(self, name: str) -> Any:
        def enter(layer: nn.Module, inputs: Any) -> None:
            self._inside.append(f"{name} ({type(layer).__name__})" if name else "")

        return enter

    def _leaving(self, layer: nn.Module, inputs: Any, outputs: Any) -> None:
        self._inside.pop()

    def _where(self) -> str:
        """Say where the error arose: in the innermost layer that was entered and not left."""
        network = type(self._network).__name__
        if not self._inside:
            return f"of the loss of {network}"
        return f"at {self._inside[-1]} of {network}" if self._inside[-1] else f"in the forward pass of {network}"

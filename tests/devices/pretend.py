"""A device that is not the CPU, on a machine that has none: its tensors refuse to meet those of the CPU.

Numbers lie on the CPU all the same, so what comes out can be compared. It shows what no accelerator is needed for: a
tensor made in the wrong place, a draw that is not moved, NumPy asked to read device memory. It does not show kernels,
streams, other precisions or the allocator of a real one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from pytorch_lightning.accelerators import CPUAccelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
# As on a GPU: copies go anywhere, and whole numbers of the CPU may index.
_COPIES = {"aten::copy_", "aten::_to_copy"}
_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class _Backend:
    """What PyTorch asks of a device's module."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class OnDevice(torch.Tensor):
    """A tensor of the device; `raw` holds its numbers."""

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> "OnDevice":
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, raw: torch.Tensor) -> None:
        self.raw = raw

    def __repr__(self) -> str:
        return f"OnDevice({self.raw!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnDevice":
        made = OnDevice(self.raw.clone())
        made = torch.nn.Parameter(made, self.requires_grad) if isinstance(self, torch.nn.Parameter) else made
        memo[id(self)] = made
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Sends there what is made there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """What goes past any dispatch: numbers become tensors, and tensors numbers, by way of the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and args[0].dim() == 1 < args[1].dim():  # ends in a squeeze that a wrapper does not see
            return func(args[0].unsqueeze(0), args[1]).squeeze(0)
        if func is torch.Tensor.tolist:
            return func(args[0].detach().cpu())
        if func is not torch.tensor or kwargs.get("device") is None:
            return func(*args, **kwargs)
        device = kwargs["device"]
        return func(*args, **{**kwargs, "device": "cpu"}).to(device)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    there = any(isinstance(tensor, OnDevice) for tensor in tensors)
    name = func._schema.name
    if there and name not in _COPIES:
        first = tensors[0]
        for tensor in tensors:
            is_index = name in _INDEXING and isinstance(first, OnDevice) and not tensor.is_floating_point()
            if not isinstance(tensor, OnDevice) and tensor.dim() > 0 and not is_index:
                raise RuntimeError(
                    f"Expected all tensors on {NAME}, got one of shape {tuple(tensor.shape)} on the CPU in {name}."
                )
    goes_to = kwargs.get("device")
    if goes_to is not None:
        there = torch.device(goes_to).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    raw_args, raw_kwargs = tree_map(_raw, (args, kwargs))
    out = func(*raw_args, **raw_kwargs)
    if name.endswith("_") and tensors and out is _raw(tensors[0]):
        return tensors[0]
    return tree_map(_wrapped, out) if there and name != "aten::_local_scalar_dense" else out


def _raw(leaf: Any) -> Any:
    return leaf.raw if isinstance(leaf, OnDevice) else leaf


def _wrapped(leaf: Any) -> Any:
    return OnDevice(leaf) if isinstance(leaf, torch.Tensor) and not isinstance(leaf, OnDevice) else leaf


class PretendAccelerator(CPUAccelerator):
    """Lets a trainer put its module there."""

    def setup_device(self, device: torch.device) -> None:
        assert device.type == NAME


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Have the device for a while; modules keep their parameters' identity when they are moved, as on a GPU."""
    _register()
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with _Literals(), _Factories():
            yield torch.device(NAME, 0)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@cache
def _register() -> None:
    """Make the device known; it cannot be taken out of this process again."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())

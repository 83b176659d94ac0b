"""State of many teachers of one architecture, stacked: on a device, or in memory or files of its host.

Shapes: T teachers, t of them on this process (every W-th of W processes), n of one chunk.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.optim.adam import adam

from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.mapped_state import MappedState
from lightning_dp.gradients.ranks import Ranks
from lightning_dp.gradients.teacher_backends import Stack
from lightning_dp.networks.discriminator import Discriminator

StatePlace = Literal["auto", "device", "host"]

ADAM_EPS: Final = 1e-8
_DROPPED_AT_ONCE: Final = 8
_CUDA_STATE_FRACTION: Final = 0.5  # of the free memory; the rest is for chunks


@dataclass(frozen=True)
class AdamSlice:
    """Some teachers at work, on the device.

    Attributes:
        parameters: name -> (n, ...).
        exp_avg: Adam's first moments.
        exp_avg_sq: Adam's second moments.
    """

    parameters: Stack
    exp_avg: Stack
    exp_avg_sq: Stack

    def step(self, gradients: Stack, *, steps_before: int, learning_rate: float, betas: tuple[float, float]) -> None:
        """Step the Adam of each teacher.

        Args:
            gradients: name -> (n, ...).
            steps_before: Steps that each of them has made.
            learning_rate: Of every teacher.
            betas: Of every teacher.
        """
        parameters = list(self.parameters.values())
        device = parameters[0].device
        counters = [torch.full((), float(steps_before), device=device) for _ in parameters]
        with torch.no_grad():
            adam(
                parameters,
                [gradients[name].contiguous() for name in self.parameters],
                list(self.exp_avg.values()),
                list(self.exp_avg_sq.values()),
                [],
                counters,
                fused=device.type in ("cpu", "cuda"),
                amsgrad=False,
                beta1=betas[0],
                beta2=betas[1],
                lr=learning_rate,
                weight_decay=0.0,
                eps=ADAM_EPS,
                maximize=False,
            )


class AdamStacks:
    """The state of the teachers that live here, (t, ...), which is saved as (T, ...) whatever t was.

    Adam is element-wise: run on a slice of the stacks it is one Adam per teacher. Nothing else is kept.

    Args:
        network: The architecture, on a CPU; each teacher starts from its `reset_parameters`.
        num_teachers: T.
        ranks: The processes that share the teachers.
        device: Where the teachers work.
        seed: Teacher i starts from (seed, i): the same on any device and process.
        place: Where the state is kept: on the device, or in the memory of its host, from which chunks are lent to the
            device; auto is the device where half of its free memory holds the state.
        state_dir: Folder for memory-mapped files of the host (Linux); None keeps everything in memory.

    Attributes:
        parameters: name -> (t, ...), where they are kept.
        files: Of parameters and of moments, or nothing.
        is_remote: Whether teachers are lent to the device, chunk by chunk.

    Raises:
        ConfigurationError: Files cannot be made, or are asked for on the device.
    """

    def __init__(
        self,
        network: Discriminator,
        *,
        num_teachers: int,
        ranks: Ranks,
        device: torch.device,
        seed: int,
        place: StatePlace = "auto",
        state_dir: str | None = None,
    ) -> None:
        if state_dir is not None and place == "device" and device.type != "cpu":
            raise ConfigurationError(
                f"teachers.state_dir={state_dir} keeps teachers in files of the host, not on device={device}. Set "
                "teachers.state to host, or leave one of them out."
            )
        self.num_teachers = num_teachers
        self._ranks, self._owned = ranks, ranks.owned(num_teachers)
        self._device, self._state_dir = device, state_dir
        size = 3 * len(self._owned) * sum(p.numel() * p.element_size() for p in network.parameters())
        on_host = state_dir is not None or place == "host" or (place == "auto" and not _holds(device, size))
        self._home = torch.device("cpu") if on_host else device
        self.is_remote = self._home.type != device.type
        # Rows need the first only.
        kinds = 0 if state_dir is None else 2
        self.files = tuple(MappedState(str(state_dir), len(self._owned)) for _ in range(kinds))
        self.parameters = self._initial_parameters(network, seed)
        like = [(name, stack.shape, stack.dtype) for name, stack in self.parameters.items()]
        self._exp_avg = {name: self._zeros(shape, dtype, moments=True) for name, shape, dtype in like}
        self._exp_avg_sq = {name: self._zeros(shape, dtype, moments=True) for name, shape, dtype in like}

    @property
    def bytes_per_teacher(self) -> int:
        """Memory that the parameters of one teacher take."""
        return sum(stack[0].numel() * stack.element_size() for stack in self.parameters.values())

    def of(self, teachers: slice | Tensor) -> Stack:
        """Return the parameters of some teachers, by their places in the stacks, on the device."""
        return self._there(
            _slice(self.parameters, teachers if isinstance(teachers, slice) else teachers.to(self._home))
        )

    def moments(self, teachers: slice) -> tuple[Stack, Stack]:
        """Return Adam's moments of some teachers, first and second, by their places, where they are kept."""
        return _slice(self._exp_avg, teachers), _slice(self._exp_avg_sq, teachers)

    @contextmanager
    def at_work(self, teachers: slice) -> Iterator[AdamSlice]:
        """Have some teachers on the device for a while; what became of them is kept.

        Args:
            teachers: Their places in the stacks.
        """
        stored = (_slice(self.parameters, teachers), *self.moments(teachers))
        few = AdamSlice(*(self._there(stack) for stack in stored))
        yield few
        if not self.is_remote:
            return
        for home, away in zip(stored, (few.parameters, few.exp_avg, few.exp_avg_sq), strict=True):
            for name, values in away.items():
                home[name].copy_(values)

    def state_dict(self) -> dict[str, Any]:
        """Return parameters and moments (references, (T, ...) each). Private.

        Of many processes, the first one gets them together in its memory, or in files beside those of its own.
        """
        whole = () if self._state_dir is None else (MappedState(self._state_dir, self.num_teachers),)
        return {
            key: {name: self._of_all(stack, whole) for name, stack in stacks.items()}
            for key, stacks in self._saved().items()
        }

    def load_state_dict(self, state: dict[str, Any], *, network_name: str) -> None:
        """Copy the state of as many teachers of the same network.

        Args:
            state: What `state_dict` returned on process 0.
            network_name: Of these teachers, for the error.

        Raises:
            ConfigurationError: Names or shapes differ.
        """
        pairs = [(own, state[key]) for key, own in self._saved().items()]
        for own, saved in pairs:
            expected = {name: (self.num_teachers, *stack.shape[1:]) for name, stack in own.items()}
            got = {name: tuple(stack.shape) for name, stack in saved.items()}
            if expected != got:
                raise ConfigurationError(
                    f"Expected teachers of network={network_name!r}, num_teachers={self.num_teachers}, got a "
                    f"checkpoint with shapes {got}. Resume with the settings of the run that wrote it."
                )
        for own, saved in pairs:
            for name, stack in own.items():
                stack.copy_(saved[name][self._owned.start :: self._owned.step])

    def _saved(self) -> dict[str, Stack]:
        return {"parameters": self.parameters, "exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq}

    def _of_all(self, stack: Tensor, files: tuple[MappedState, ...]) -> Tensor:
        """Return a stack of all teachers, (T, ...), on process 0; what this one has elsewhere."""
        if self._ranks.size == 1:
            return stack
        if self._ranks.rank > 0:
            self._ranks.collect(stack, None)
            return stack
        shape = torch.Size((self.num_teachers, *stack.shape[1:]))
        whole = files[0].zeros(shape, stack.dtype) if files else torch.zeros(shape, dtype=stack.dtype)
        self._ranks.collect(stack, whole)
        return whole

    def _initial_parameters(self, network: Discriminator, seed: int) -> Stack:
        names = dict(network.named_parameters())
        stacks = {
            name: self._zeros(torch.Size((len(self._owned), *parameter.shape)), parameter.dtype)
            for name, parameter in names.items()
        }
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for place, teacher in enumerate(self._owned):
                torch.default_generator.manual_seed((seed * 1_000_003 + teacher) % 2**63)
                network.reset_parameters()
                for name, parameter in names.items():
                    stacks[name][place] = parameter
                if self.files and place % _DROPPED_AT_ONCE == _DROPPED_AT_ONCE - 1:
                    self.files[0].drop(slice(place + 1 - _DROPPED_AT_ONCE, place + 1))
        return stacks

    def _zeros(self, shape: torch.Size, dtype: torch.dtype, *, moments: bool = False) -> Tensor:
        """Return a stack of zeros, in memory or in a file that only this process can reach."""
        if self.files:
            return self.files[moments].zeros(shape, dtype)
        # Pinned, what is lent to a GPU travels without a copy on the way.
        return torch.zeros(shape, dtype=dtype, device=self._home, pin_memory=self.is_remote and _is_cuda(self._device))

    def _there(self, stack: Stack) -> Stack:
        """Return a stack on the device: the same memory if it is kept there."""
        if not self.is_remote:
            return stack
        # Without waiting: nobody writes to what is kept before the device's own work has come back.
        return {name: values.to(self._device, non_blocking=True) for name, values in stack.items()}


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _holds(device: torch.device, size: int) -> bool:
    """Tell whether the device has room for a state of so many bytes."""
    return not _is_cuda(device) or size <= _CUDA_STATE_FRACTION * torch.cuda.mem_get_info(device)[0]


def _slice(stack: Stack, teachers: slice | Tensor) -> Stack:
    return {name: values[teachers] for name, values in stack.items()}

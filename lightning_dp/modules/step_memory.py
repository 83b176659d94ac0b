"""What one training step needs at least, from public facts: a run that cannot fit is refused before it releases."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import functional_call

from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.free_memory import free_memory
from lightning_dp.mechanisms.base import Mechanism
from lightning_dp.networks.generator import Generator

if TYPE_CHECKING:
    from lightning_dp.modules.base import PrivateModule

_FEW = 7  # images that tell how much one takes; no usual size of a layer


def check_memory(module: "PrivateModule", mechanism: Mechanism, device: torch.device, *, processes: int = 1) -> None:
    """Refuse a run whose steps cannot fit: the kernel would end it without a word, perhaps after a release.

    A lower bound, counted from sizes alone; what it lets through may still be too large.

    Args:
        module: The method, after `describe_data`.
        mechanism: Sums and perturbs its rows.
        device: Where it will train.
        processes: Of the run; they share what it keeps from step to step.

    Raises:
        ConfigurationError: A step takes more than there is.
    """
    kept = {name: size // processes for name, size in module.kept_bytes(device).items()}
    needs = {**module.step_bytes(), **kept, "the sum of a release": _release_bytes(mechanism, module)}
    needs["gradients of the networks"] = _training_bytes(module)
    _refuse("a training step", needs, free_memory(device))


def check_judging_memory(image_shape: tuple[int, int, int], num_samples: int) -> None:
    """Refuse samples that cannot be judged, before the budget of a run is spent on them.

    Args:
        image_shape: Of one.
        num_samples: Images that are judged.

    Raises:
        ConfigurationError: They take more memory than there is.
    """
    # As made, and as judged; on this machine, wherever training is.
    needs = {f"evaluation.num_samples={num_samples}": 2 * 4 * num_samples * math.prod(image_shape)}
    _refuse("the judging of samples", needs, free_memory(torch.device("cpu")))


def record_bytes(image_shape: tuple[int, int, int]) -> int:
    """Return the memory of a record's image as it is read and as a network takes it."""
    return (1 + 4) * math.prod(image_shape)


def _refuse(what: str, needs: dict[str, int], free: int | None) -> None:
    if free is None or sum(needs.values()) <= free:
        return
    most = max(needs, key=lambda name: needs[name])
    raise ConfigurationError(
        f"Expected {what} to fit the {free / 1e9:,.1f} GB of memory that are free, but it takes "
        f"{sum(needs.values()) / 1e9:,.1f} GB at least, {needs[most] / 1e9:,.1f} GB of it for {most}. Lower that, or "
        "free memory; nothing was released."
    )


def generated_bytes(generator: Generator, num_images: int) -> int:
    """Return the memory that generating and differentiating images takes at least; computes nothing.

    Args:
        generator: Its sizes count, not its weights.
        num_images: Images at a time.
    """
    saved = [0]

    def count(tensor: Tensor) -> Tensor:
        if tensor.dim() and len(tensor) == _FEW:
            saved[0] += tensor.numel() * tensor.element_size()
        return tensor

    tensors = {**dict(generator.named_parameters()), **dict(generator.named_buffers())}
    shapes = {
        name: torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }
    latent = generator.sample_latent(_FEW, torch.Generator().manual_seed(0)).to("meta")
    labels = torch.zeros(_FEW, dtype=torch.int64, device="meta")
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            functional_call(generator, shapes, (latent, labels))
    except (RuntimeError, NotImplementedError):  # a network that looks at values: its images count, at least
        saved[0] = 0
    images = 3 * 4 * math.prod(generator.image_shape)  # as made, as judged, and their gradient
    return num_images * (saved[0] // _FEW + images)


def _release_bytes(mechanism: Mechanism, module: "PrivateModule") -> int:
    """Return the memory of the sum, of it in double precision, and of its noise."""
    spec = module.contribution_spec()
    numbers = spec.num_vectors * mechanism.encoded_dim(spec)
    return numbers * (mechanism.total_dtype.itemsize + 2 * torch.float64.itemsize)


def _training_bytes(module: "PrivateModule") -> int:
    """Return the memory of their gradients; the weights are there already, and not all optimizers keep more."""
    parameters = [p for network in module.released_networks().values() for p in network.parameters()]
    return sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)

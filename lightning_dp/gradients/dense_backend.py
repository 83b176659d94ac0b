"""Teachers that are nothing but dense layers, differentiated by hand: one batched product for each layer and direction.

Under `vmap` half of such a round goes into copies, saved tensors and the steps of autograd (docs/performance.md).

Shapes: n teachers of one chunk, M samples of each, y classes, w the width of the last hidden layer.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dp.gradients.teacher_backends import Stack, StackedBackend
from lightning_dp.losses.adversarial import Objective
from lightning_dp.networks.discriminator import Discriminator
from lightning_dp.networks.small import LEAK


class _Pass(NamedTuple):
    """What a forward pass leaves behind.

    Attributes:
        inputs: Of each layer, (n, M, width).
        read: Weights of the last layer that each sample's label reads, (n, M, w).
        logits: (n, M).
    """

    inputs: list[Tensor]
    read: Tensor
    logits: Tensor


class DenseBackend(StackedBackend):
    """`StackedBackend` for networks that have `dense_layers`, in closed form for all but the slopes of a critic.

    Gradients are written where those of the last chunk stood: in fresh memory a page fault every 4 KB takes up to a
    quarter of a round. What `training_gradients` returns holds until it is called again.
    """

    def __init__(
        self, network: Discriminator, *, objective: Objective = "non_saturating", penalty: float = 10.0
    ) -> None:
        super().__init__(network, objective=objective, penalty=penalty)
        self._kept: Stack = {}

    @torch.no_grad()
    def training_gradients(  # noqa: D102
        self, parameters: Stack, samples: Tensor, one_hot: Tensor, shares: Tensor | None = None
    ) -> Stack:
        if self.objective != "non_saturating":
            return super().training_gradients(parameters, samples, one_hot, shares)
        both = torch.cat([one_hot, one_hot], 1)
        done = self._forward(parameters, samples.flatten(2), both)
        half = one_hot.shape[1]
        # Of mean softplus(-logit) over records and mean softplus(logit) over fakes.
        sign = torch.ones(2 * half, dtype=samples.dtype, device=samples.device)
        sign[:half] = -1
        slopes = torch.sigmoid(done.logits * sign) * (sign / half)  # (n, M)
        gradients = self._backward(parameters, done, slopes, both)
        return {name: gradients[name].to(values.dtype) for name, values in parameters.items()}

    @torch.no_grad()
    def logits(self, parameters: Stack, fakes: Tensor, one_hot: Tensor) -> Tensor:  # noqa: D102
        return self._forward(parameters, *_for_all(parameters, fakes.flatten(1), one_hot)).logits

    @torch.no_grad()
    def descent_directions(self, parameters: Stack, fakes: Tensor, one_hot: Tensor) -> Tensor:  # noqa: D102
        done = self._forward(parameters, *_for_all(parameters, fakes.flatten(1), one_hot))
        share = 1 / fakes.shape[0]
        rises = torch.sigmoid(-done.logits) * share  # of -mean softplus(-logit)
        push = (rises if self.objective == "non_saturating" else torch.full_like(rises, share))[:, :, None] * done.read
        for layer, inputs in reversed([*zip(self._hidden, done.inputs[1:], strict=True)]):
            push = torch.bmm(_through_activation(push, inputs), parameters[f"{layer}.weight"])
        return push.to(fakes.dtype).view(-1, *fakes.shape)

    @property
    def _hidden(self) -> tuple[str, ...]:
        return self.network.dense_layers[:-1]

    def _forward(self, parameters: Stack, samples: Tensor, one_hot: Tensor) -> _Pass:
        """Judge samples (n, M, d) with labels (n, M, y)."""
        inputs, head = [samples], self.network.dense_layers[-1]
        for layer in self._hidden:
            weight, bias = parameters[f"{layer}.weight"], parameters[f"{layer}.bias"]
            inputs.append(F.leaky_relu_(torch.baddbmm(bias[:, None], inputs[-1], weight.mT), LEAK))
        read = torch.bmm(one_hot, parameters[f"{head}.weight"])
        shift = torch.bmm(one_hot, parameters[f"{head}.bias"][:, :, None]).squeeze(2)
        return _Pass(inputs, read, (inputs[-1] * read).sum(2) + shift)

    def _backward(self, parameters: Stack, done: _Pass, slopes: Tensor, one_hot: Tensor) -> Stack:
        """Return gradients by the parameters, given those by the logits, (n, M)."""
        found, head = {}, self.network.dense_layers[-1]
        push = one_hot * slopes[:, :, None]
        found[f"{head}.weight"], found[f"{head}.bias"] = torch.bmm(push.mT, done.inputs[-1]), push.sum(1)
        push = done.read * slopes[:, :, None]
        for place in reversed(range(len(self._hidden))):
            layer = self._hidden[place]
            push = _through_activation(push, done.inputs[place + 1])
            weight = parameters[f"{layer}.weight"]
            found[f"{layer}.weight"] = self._product(f"{layer}.weight", push.mT, done.inputs[place], weight)
            found[f"{layer}.bias"] = push.sum(1)
            if place:
                push = torch.bmm(push, weight)
        return found

    def _product(self, name: str, left: Tensor, right: Tensor, like: Tensor) -> Tensor:
        """Return products shaped as `like`, in memory that is kept, unless autocast has other types in mind."""
        if not left.dtype == right.dtype == like.dtype:
            return torch.bmm(left, right)
        kept = self._kept.get(name)
        if kept is None or len(kept) < len(like):
            kept = torch.empty_like(like, memory_format=torch.contiguous_format)
            self._kept[name] = kept
        return torch.bmm(left, right, out=kept[: len(like)])


def _through_activation(push: Tensor, outputs: Tensor) -> Tensor:
    """Return gradients by what went into a leaky ReLU, given those by what came out, in place."""
    return torch.ops.aten.leaky_relu_backward.grad_input(push, outputs, LEAK, True, grad_input=push)


def _for_all(parameters: Stack, samples: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor]:
    """Return samples and labels as every teacher sees them, without copying."""
    num = len(next(iter(parameters.values())))
    return samples.expand(num, *samples.shape), one_hot.expand(num, *one_hot.shape)

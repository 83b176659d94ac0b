"""Two ways to differentiate many copies of one discriminator: one after another, or stacked under `vmap`.

Both take the same stacked parameters and return the same gradients; neither owns any state of a teacher.

Shapes: n teachers of one chunk, B samples, y classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from lightning_dp.losses.adversarial import (
    Objective,
    between,
    discriminator_loss,
    generator_loss,
    wasserstein_critic_loss,
)
from lightning_dp.networks.discriminator import Discriminator

Stack = dict[str, Tensor]
"""Parameters, or anything of their shape, of n teachers: name -> (n, *parameter_shape)."""


class TeacherBackend(ABC):
    """Gradients of the losses of n teachers that share an architecture and nothing else.

    Args:
        network: The architecture; its own parameter values are not used.
        objective: What teachers and generator play for.
        penalty: Weight of the slopes of a Wasserstein critic.
    """

    def __init__(
        self, network: Discriminator, *, objective: Objective = "non_saturating", penalty: float = 10.0
    ) -> None:
        self.network = network
        self.objective: Objective = objective
        self.penalty = penalty

    @abstractmethod
    def training_gradients(
        self, parameters: Stack, samples: Tensor, one_hot: Tensor, shares: Tensor | None = None
    ) -> Stack:
        """Return each teacher's gradient of its discriminator loss, name -> (n, ...).

        Args:
            parameters: name -> (n, ...).
            samples: (n, 2B, *sample_shape), the teachers' own records, then their fakes; batch statistics of the two
                are taken apart.
            one_hot: (n, B, y), labels of both.
            shares: (B,), where between fake and record slopes are taken; a Wasserstein critic needs them.
        """

    @abstractmethod
    def logits(self, parameters: Stack, fakes: Tensor, one_hot: Tensor) -> Tensor:
        """Return what each teacher says of each fake, (n, B).

        Args:
            parameters: name -> (n, ...).
            fakes: (B, *sample_shape), the same for all teachers.
            one_hot: (B, y).
        """

    @abstractmethod
    def descent_directions(self, parameters: Stack, fakes: Tensor, one_hot: Tensor) -> Tensor:
        """Return -d generator_loss / d fakes of each teacher, (n, B, *sample_shape), with the 1/B of the batch mean.

        Args:
            parameters: name -> (n, ...).
            fakes: (B, *sample_shape), the same for all teachers.
            one_hot: (B, y).
        """


class LoopBackend(TeacherBackend):
    """One teacher after another through one module: least memory, fastest for convolutions on a CPU."""

    def _load(self, parameters: Stack, row: int) -> list[Tensor]:
        own: list[Tensor] = []
        for name, parameter in self.network.named_parameters():
            parameter.data = parameters[name][row]  # a view: nothing is copied
            own.append(parameter)
        return own

    @torch.enable_grad()
    def training_gradients(  # noqa: D102
        self, parameters: Stack, samples: Tensor, one_hot: Tensor, shares: Tensor | None = None
    ) -> Stack:
        gradients = {name: torch.empty_like(values) for name, values in parameters.items()}
        for row in range(samples.shape[0]):
            own = self._load(parameters, row)
            loss = self._training_loss(samples[row], one_hot[row], shares)
            # A Wasserstein critic's shift has no slope; what a loss does not reach has gradient zero.
            found = torch.autograd.grad(loss, own, materialize_grads=True)
            for stacked, gradient in zip(gradients.values(), found, strict=True):
                stacked[row] = gradient
        return gradients

    def _training_loss(self, samples: Tensor, one_hot: Tensor, shares: Tensor | None) -> Tensor:
        judged_real, judged_fake = _judge_both(self.network, self.network, samples, one_hot)
        if self.objective == "non_saturating":
            return discriminator_loss(judged_real, judged_fake)
        real, fake = samples.chunk(2)
        points = between(real, fake, _given(shares)).detach().requires_grad_()
        (slopes,) = torch.autograd.grad(self.network(points, one_hot).sum(), points, create_graph=True)
        return wasserstein_critic_loss(judged_real, judged_fake, slopes, penalty=self.penalty)

    @torch.no_grad()
    def logits(self, parameters: Stack, fakes: Tensor, one_hot: Tensor) -> Tensor:  # noqa: D102
        num_rows = next(iter(parameters.values())).shape[0]
        said = fakes.new_empty(num_rows, fakes.shape[0])
        for row in range(num_rows):
            self._load(parameters, row)
            said[row] = self.network(fakes, one_hot)
        return said

    @torch.enable_grad()
    def descent_directions(self, parameters: Stack, fakes: Tensor, one_hot: Tensor) -> Tensor:  # noqa: D102
        num_rows = next(iter(parameters.values())).shape[0]
        directions = fakes.new_empty(num_rows, *fakes.shape)
        inputs = fakes.detach().requires_grad_()
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)  # spares the backward pass the parameter gradients
        try:
            for row in range(num_rows):
                self._load(parameters, row)
                loss = generator_loss(self.network(inputs, one_hot), self.objective)
                torch.neg(torch.autograd.grad(loss, inputs)[0], out=directions[row])
        finally:
            for parameter in self.network.parameters():
                parameter.requires_grad_(True)
        return directions


class StackedBackend(TeacherBackend):
    """All teachers of a chunk at once under `vmap`: fastest for dense layers, and on a GPU."""

    def _training_loss(self, own: Stack, samples: Tensor, one_hot: Tensor) -> Tensor:
        return discriminator_loss(*self._judged(own, samples, one_hot))

    def _judged(self, own: Stack, samples: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor]:
        def judge(judged: Tensor, labels: Tensor) -> Tensor:
            said: Tensor = functional_call(self.network, own, (judged, labels))
            return said

        return _judge_both(judge, self.network, samples, one_hot)

    def _critic_loss(self, own: Stack, samples: Tensor, one_hot: Tensor, shares: Tensor) -> Tensor:
        def total_score(points: Tensor) -> Tensor:
            total: Tensor = functional_call(self.network, own, (points, one_hot)).sum()
            return total

        judged_real, judged_fake = self._judged(own, samples, one_hot)
        real, fake = samples.chunk(2)
        slopes = grad(total_score)(between(real, fake, shares))
        return wasserstein_critic_loss(judged_real, judged_fake, slopes, penalty=self.penalty)

    def _negative_generator_loss(self, fakes: Tensor, own: Stack, one_hot: Tensor) -> Tensor:
        return -generator_loss(functional_call(self.network, own, (fakes, one_hot)), self.objective)

    def training_gradients(  # noqa: D102
        self, parameters: Stack, samples: Tensor, one_hot: Tensor, shares: Tensor | None = None
    ) -> Stack:
        # One gradient per teacher, no mean over teachers: that would scale each by 1/n, visible through Adam's eps.
        gradients: Stack
        if self.objective == "non_saturating":
            gradients = vmap(grad(self._training_loss))(parameters, samples, one_hot)
        else:
            each = vmap(grad(self._critic_loss), in_dims=(0, 0, 0, None))
            gradients = each(parameters, samples, one_hot, _given(shares))
        return gradients

    @torch.no_grad()
    def logits(self, parameters: Stack, fakes: Tensor, one_hot: Tensor) -> Tensor:  # noqa: D102
        said: Tensor = vmap(lambda own: functional_call(self.network, own, (fakes, one_hot)))(parameters)
        return said

    def descent_directions(self, parameters: Stack, fakes: Tensor, one_hot: Tensor) -> Tensor:  # noqa: D102
        each = vmap(grad(self._negative_generator_loss), in_dims=(None, 0, None))
        directions: Tensor = each(fakes.detach(), parameters, one_hot)
        return directions


def _judge_both(
    judge: Callable[[Tensor, Tensor], Tensor], network: Discriminator, samples: Tensor, one_hot: Tensor
) -> tuple[Tensor, Tensor]:
    """Return logits of records and fakes, in one pass where a network takes no statistics of a batch."""
    if network.min_batch > 1:
        real, fake = samples.chunk(2)
        return judge(real, one_hot), judge(fake, one_hot)
    judged_real, judged_fake = judge(samples, torch.cat([one_hot, one_hot])).chunk(2)
    return judged_real, judged_fake


def _given(shares: Tensor | None) -> Tensor:
    if shares is None:
        raise ValueError("Expected shares for the slopes of a Wasserstein critic, got none. Pass shares, (B,).")
    return shares

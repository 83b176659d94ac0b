import math

import pytest
import torch

from lightning_dp.losses.adversarial import discriminator_loss, generator_loss


def test_losses_of_an_undecided_discriminator_are_log_two_each():
    zeros = torch.zeros(4)
    assert discriminator_loss(zeros, zeros).item() == pytest.approx(2 * math.log(2))
    assert generator_loss(zeros).item() == pytest.approx(math.log(2))


def test_generator_loss_does_not_saturate_on_obvious_fakes():
    logits = torch.tensor([-50.0, -50.0], requires_grad=True)
    generator_loss(logits).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([-0.5, -0.5]))  # the 1/B of the mean over two


def test_discriminator_loss_falls_as_it_gets_better():
    assert discriminator_loss(torch.tensor([3.0]), torch.tensor([-3.0])) < discriminator_loss(
        torch.tensor([-3.0]), torch.tensor([3.0])
    )

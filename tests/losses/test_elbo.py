import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from lightning_dp.losses.elbo import bernoulli_nll, gaussian_nll, kl_to_standard_normal


def test_kl_known_answers():
    """KL of N(0, I) is 0; with mean 1 and variance 1 in m dimensions it is m / 2 (other_methods, 1.8)."""
    assert torch.equal(kl_to_standard_normal(torch.zeros(2, 6), torch.zeros(2, 6)), torch.zeros(2))
    assert torch.equal(kl_to_standard_normal(torch.ones(2, 6), torch.zeros(2, 6)), torch.full((2,), 3.0))


def test_kl_equals_the_library():
    mean, log_variance = torch.randn(4, 5), torch.randn(4, 5)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(kl_to_standard_normal(mean, log_variance), expected)


def test_bernoulli_is_summed_over_pixels():
    logits, bits = torch.randn(3, 2, 4, 4), torch.randint(2, (3, 2, 4, 4)).float()
    expected = -Bernoulli(logits=logits).log_prob(bits).sum((1, 2, 3))
    torch.testing.assert_close(bernoulli_nll(logits, bits), expected)


@pytest.mark.parametrize("std", [0.1, 1.0])
def test_gaussian_is_summed_over_pixels(std):
    logits, images = torch.randn(3, 2, 4, 4), torch.rand(3, 2, 4, 4)
    expected = -Normal(torch.sigmoid(logits), std).log_prob(images).sum((1, 2, 3))
    torch.testing.assert_close(gaussian_nll(logits, images, std=std), expected)


def test_one_image_stands_for_all_draws_of_it():
    logits, image = torch.randn(5, 1, 4, 4), torch.rand(1, 1, 4, 4)
    torch.testing.assert_close(bernoulli_nll(logits, image), bernoulli_nll(logits, image.repeat(5, 1, 1, 1)))
    torch.testing.assert_close(
        gaussian_nll(logits, image, std=0.3), gaussian_nll(logits, image.repeat(5, 1, 1, 1), std=0.3)
    )

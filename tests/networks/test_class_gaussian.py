import pytest
import torch

from lightning_dp.errors import ConfigurationError
from lightning_dp.modules.published import load_generator, save_released
from lightning_dp.networks.class_gaussian import ClassGaussianGenerator


def tiny(**options) -> ClassGaussianGenerator:
    return ClassGaussianGenerator((1, 8, 8), **{"num_classes": 2, "num_coefficients": 5, **options})


def test_coefficients_have_the_moments_of_their_cell():
    generator = tiny(num_components=2)
    torch.manual_seed(0)
    torch.nn.init.normal_(generator.means)
    torch.nn.init.normal_(generator.factors)
    with torch.no_grad():
        generator.logits.copy_(torch.tensor([[0.0, 0.0], [1.0, -1.0]]))
        latent, labels = generator.sample_latent(40_000, torch.Generator().manual_seed(0)), torch.ones(40_000).long()
        component = generator._component(latent[:, 5], labels)
        found = generator._coefficients(latent[:, :5], 2 + component)
    assert component.float().mean() == pytest.approx(generator.logits.softmax(1)[1, 1].item(), abs=0.01)
    for k in range(2):
        rows, factor = found[component == k], generator.factors[1, k].detach()
        torch.testing.assert_close(rows.mean(0), generator.means[1, k].detach(), atol=0.15, rtol=0)
        torch.testing.assert_close(rows.T.cov(), factor @ factor.T, atol=0.4, rtol=0.05)


def test_images_have_their_coefficients_and_stay_in_range():
    generator = tiny(window=6)
    coefficients = torch.randn(3, 5)
    images = generator.to_images(coefficients)
    torch.testing.assert_close(generator.basis(images), coefficients, atol=1e-5, rtol=0)
    torch.nn.init.normal_(generator.factors)
    images, labels = generator.sample(20, seed=1)
    assert images.min() >= 0
    assert images.max() <= 1
    assert images[:, :, 0].abs().max() == 0  # outside of the window
    assert labels.bincount().tolist() == [10, 10]


def test_contrast_is_raised_around_black():
    generator = tiny(gain=2.0, black=0.25)
    with torch.no_grad():
        generator.means[..., 0] = 8 * 0.5  # a grey image
    assert generator.sample(2, seed=0)[0].flatten().tolist() == pytest.approx([0.5] * 128, abs=1e-5)


def test_edges_and_texture_come_last():
    generator = tiny(sharpness=2.0, texture=0.1, gain=2.0, black=0.25)
    assert generator.latent_dim == 5 + 1 + 64
    with torch.no_grad():
        generator.means[..., 0] = 8 * 0.5  # a grey image, which has no edge
    images, _ = generator.sample(50, seed=0)
    assert images.mean() == pytest.approx(0.5, abs=0.01)
    assert images.std() == pytest.approx(0.1, abs=0.01)
    with pytest.raises(ConfigurationError, match="sharpness >= 0"):
        tiny(sharpness=-1.0)


def test_distortions_move_images_and_nothing_else():
    plain = torch.rand(3, 1, 8, 8)
    still = tiny(distortion=(0.0, 0.0, 0.0, 0.0))
    torch.testing.assert_close(still._distorted(plain, torch.randn(3, 6), still.distortion), plain, atol=1e-6, rtol=0)
    generator = tiny(distortion=(90.0, 0.0, 0.0, 1.0))
    assert generator.sample_latent(2).shape == (2, 5 + 1 + 6)
    quarter = torch.tensor([[1.0, 0, 0, 0, 0, 0]])
    turned = generator._distorted(plain[:1], quarter, generator.distortion)
    torch.testing.assert_close(turned, plain[:1].rot90(1, (2, 3)), atol=1e-5, rtol=0)
    shifted = generator._distorted(plain[:1], torch.tensor([[0.0, 0, 0, 0, 1, 0]]), generator.distortion)
    torch.testing.assert_close(shifted[..., :7], plain[:1, ..., 1:], atol=1e-5, rtol=0)


def test_it_survives_its_release(tmp_path):
    generator = tiny(num_components=3, window=7, gain=1.3, black=0.1, distortion=(5.0, 0.1, 0.1, 0.5))
    torch.nn.init.normal_(generator.factors)
    save_released(tmp_path, generator, {})
    again, _ = load_generator(tmp_path)
    assert torch.equal(again.sample(6, seed=2)[0], generator.sample(6, seed=2)[0])


@pytest.mark.parametrize(
    "options", [{"num_components": 0}, {"num_coefficients": 65}, {"window": 9}, {"gain": 0.0}, {"black": 2.0}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigurationError):
        tiny(**options)

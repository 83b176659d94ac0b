import pytest
import torch
from torch import nn

from lightning_dp.errors import ConfigurationError
from lightning_dp.modules.published import load_generator, save_released
from lightning_dp.networks.sinkhorn import SinkhornConvGenerator, SinkhornResidualGenerator, normalised_weight

MNIST, CELEBA = (1, 28, 28), (3, 32, 32)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_are_those_of_the_paper():
    with torch.device("meta"):
        assert count(SinkhornConvGenerator(MNIST, 10)) == 957_969
        assert count(SinkhornResidualGenerator(CELEBA, 2)) == 3_886_595


SMALL = [
    lambda: SinkhornConvGenerator(MNIST, 10, latent_dim=4, width=4),
    lambda: SinkhornConvGenerator((3, 8, 12), 2, latent_dim=4, width=4),
    lambda: SinkhornResidualGenerator((1, 16, 16), 3, latent_dim=4, width=2),
]


@pytest.mark.parametrize("make", SMALL)
def test_images_have_the_shape_and_range_of_the_data(make):
    torch.manual_seed(0)
    generator = make()
    labels = torch.arange(6) % generator.num_classes
    latent = generator.sample_latent(6, torch.Generator().manual_seed(0))
    assert latent.shape == (6, 4)
    assert 0 <= latent.min() <= latent.max() <= 1
    images = generator(latent, labels)
    assert images.shape == (6, *generator.image_shape)
    assert 0 <= images.min() < images.max() <= 1
    images.square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in generator.parameters())
    assert all(parameter.grad.any() for name, parameter in generator.named_parameters() if "embedding" in name)


@pytest.mark.parametrize("make", SMALL)
def test_labels_matter(make):
    torch.manual_seed(0)
    generator = make()
    latent = generator.sample_latent(4)
    one, other = (generator(latent, torch.tensor(labels)) for labels in ([0, 0, 1, 1], [1, 0, 1, 1]))
    assert not torch.allclose(one[0], other[0], atol=1e-3)


@pytest.mark.parametrize("make", SMALL)
def test_a_published_copy_makes_the_same_images(make, tmp_path):
    torch.manual_seed(0)
    generator = make()
    save_released(tmp_path, generator, {"level": "PROVED"})
    again, _ = load_generator(tmp_path)
    assert torch.equal(again.sample(6, seed=1)[0], generator.sample(6, seed=1)[0])
    assert not list(generator.buffers())


def test_a_small_width_is_a_small_network():
    assert count(SinkhornConvGenerator(MNIST, 10, width=8)) < 50_000


@pytest.mark.parametrize("layer", [nn.Linear(40, 30), nn.Conv2d(12, 20, 3), nn.Conv2d(16, 16, 1)], ids=str)
def test_the_largest_singular_value_becomes_one(layer):
    torch.manual_seed(0)
    nn.init.orthogonal_(layer.weight)
    assert torch.linalg.matrix_norm(normalised_weight(layer).flatten(1), 2).item() == pytest.approx(1, rel=1e-5)
    with torch.no_grad():
        left, right = torch.randn(layer.weight.shape[0], 1), torch.randn(1, layer.weight[0].numel())
        layer.weight += 0.3 * (left @ right).reshape(layer.weight.shape)
    assert torch.linalg.matrix_norm(normalised_weight(layer).flatten(1), 2).item() == pytest.approx(1, rel=1e-3)


def test_the_norm_is_differentiated():
    """Scaling a weight changes nothing, so its gradient has no component along it."""
    layer = nn.Linear(6, 5)
    (normalised_weight(layer) * torch.randn(5, 6)).sum().backward()
    along = (layer.weight.grad * layer.weight).sum() / layer.weight.norm() / layer.weight.grad.norm()
    assert abs(along) < 1e-5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SinkhornConvGenerator((1, 30, 28), 10), "divisible by 4"),
        (lambda: SinkhornConvGenerator(MNIST, 10, width=0), "width >= 1"),
        (lambda: SinkhornResidualGenerator(MNIST, 10), "square images of 8, 16"),
        (lambda: SinkhornResidualGenerator((1, 4, 4), 10), "square images of 8, 16"),
        (lambda: SinkhornResidualGenerator((1, 32, 16), 10), "square images of 8, 16"),
        (lambda: SinkhornResidualGenerator(CELEBA, 10, latent_dim=0), "latent_dim >= 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, words):
    with pytest.raises(ConfigurationError, match=words):
        make()

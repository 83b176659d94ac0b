import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_dp.errors import ConfigurationError
from lightning_dp.networks.datalens import DataLensDiscriminator, DataLensGenerator

MNIST, CIFAR, CELEBA = (1, 28, 28), (3, 32, 32), (3, 64, 64)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("image_shape", "num_classes", "expected"),
    [(MNIST, 10, 555_655), (CELEBA, 2, 2_236_445), (CELEBA, 3, 2_304_442), (CIFAR, 10, 720_237)],
)
def test_discriminator_has_the_published_parameter_count(image_shape, num_classes, expected):
    assert count(DataLensDiscriminator(image_shape, num_classes)) == expected


@pytest.mark.parametrize(
    ("image_shape", "num_classes", "latent_dim", "expected"),
    [(MNIST, 10, 50, 7_014_011), (CELEBA, 2, 100, 34_251_929), (CELEBA, 3, 100, 34_288_996)],
)
def test_generator_has_the_published_parameter_count(image_shape, num_classes, latent_dim, expected):
    with torch.device("meta"):
        generator = DataLensGenerator(image_shape, num_classes, latent_dim)
    assert count(generator) == expected


def test_initial_values():
    torch.manual_seed(0)
    network = DataLensDiscriminator(MNIST, 10)
    # A normal of std 0.02 cut at two deviations has std 0.02 * 0.8796.
    assert network.conv1.weight.std().item() == pytest.approx(0.02 * 0.8796, rel=0.02)
    assert network.conv1.weight.abs().max() <= 0.04
    assert network.fc2.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert network.fc2.weight.abs().max() > 0.04
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            assert not layer.bias.any()
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            assert layer.eps == 1e-5
            assert (layer.weight == 1).all()
            assert not layer.bias.any()


def test_no_network_holds_a_buffer():
    for network in (DataLensDiscriminator(MNIST, 10), DataLensGenerator(MNIST, 10)):
        assert list(network.buffers()) == []


def test_batch_statistics_are_used_in_eval_mode_too():
    network = DataLensDiscriminator(MNIST, 10)
    samples, one_hot = torch.rand(6, *MNIST), F.one_hot(torch.arange(6), 10).float()
    trained = network.train()(samples, one_hot)
    assert torch.equal(network.eval()(samples, one_hot), trained)
    assert trained.shape == (6,)


def test_generator_makes_images_of_its_latents():
    generator = DataLensGenerator(MNIST, 10, latent_dim=50)
    source = torch.Generator().manual_seed(3)
    latent = generator.sample_latent(4, source)
    assert latent.shape == (4, 50)
    assert latent.min() < -0.9
    assert latent.max() > 0.9
    assert latent.abs().max() <= 1
    images = generator(latent, torch.tensor([0, 1, 2, 9]))
    assert images.shape == (4, *MNIST)
    assert images.min() >= 0
    assert images.max() <= 1


def test_the_label_reaches_both_networks():
    torch.manual_seed(0)
    generator, network = DataLensGenerator(MNIST, 10), DataLensDiscriminator(MNIST, 10)
    latent = generator.sample_latent(4)
    ones, twos = torch.tensor([1, 1, 2, 2]), torch.tensor([1, 1, 3, 3])
    assert not torch.equal(generator(latent, ones), generator(latent, twos))
    samples = torch.rand(4, *MNIST)
    assert not torch.equal(network(samples, F.one_hot(ones, 10).float()), network(samples, F.one_hot(twos, 10).float()))


@pytest.mark.parametrize("network", [DataLensDiscriminator, DataLensGenerator])
def test_sizes_that_do_not_halve_twice_are_refused(network):
    with pytest.raises(ConfigurationError, match=r"divisible by 4.*image_shape=\(1, 30, 28\)"):
        network((1, 30, 28), 10)

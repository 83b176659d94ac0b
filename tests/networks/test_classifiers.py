import pytest
import torch
from torch import nn

from lightning_dp.errors import ConfigurationError
from lightning_dp.networks.classifiers import (
    ConvClassifier,
    FeatureClassifier,
    MLPClassifier,
    build_unset,
    initialise,
)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 16), (1, 4, 5)])
def test_logits_have_one_column_per_class(shape):
    for network in (ConvClassifier(shape, 7), MLPClassifier(shape, 7)):
        assert network(torch.rand(2, *shape)).shape == (2, 7)


def test_feature_network_size_and_features():
    network = FeatureClassifier(num_classes=20)
    images = torch.rand(2, 1, 28, 28)
    assert network.features(images).shape == (2, 128)
    assert (network.features(images) >= 0).all()
    assert network(images).shape == (2, 20)
    assert sum(p.numel() for p in network.parameters()) == 99_732


def test_no_buffers():
    for network in (ConvClassifier((1, 28, 28), 10), MLPClassifier((1, 8, 8), 10), FeatureClassifier()):
        assert list(network.buffers()) == []


def test_initialise_depends_on_the_generator_alone():
    before = torch.get_rng_state()
    networks = []
    for seed in (0, 0, 1):
        network = build_unset(lambda: ConvClassifier((1, 8, 8), 3))
        initialise(network, torch.Generator().manual_seed(seed))
        networks.append(nn.utils.parameters_to_vector(network.parameters()))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(networks[0], networks[1])
    assert not torch.equal(networks[0], networks[2])
    assert networks[0].abs().max() <= 1 / 3  # the largest bound: fan-in 9


def test_too_small_images():
    with pytest.raises(ConfigurationError, match=r"image_shape=\(1, 3, 9\)"):
        ConvClassifier((1, 3, 9), 2)


@pytest.mark.parametrize("build", [lambda: ConvClassifier((1, 28, 28), 10), lambda: FeatureClassifier()])
def test_pooling_before_the_relu_changes_no_bit(build):
    """Of values and gradients, against the order in which everyone writes it."""
    network, images = build(), torch.rand(3, 1, 28, 28)
    layers = list(network.body)
    for place in range(1, len(layers)):
        if isinstance(layers[place], nn.ReLU) and isinstance(layers[place - 1], nn.MaxPool2d):
            layers[place - 1 : place + 1] = layers[place], layers[place - 1]
    usual = nn.Sequential(*layers)
    assert [type(layer) for layer in usual] != [type(layer) for layer in network.body]
    parameters = list(network.body.parameters())
    found = [body(images) for body in (network.body, usual)]
    assert torch.equal(*found)
    gradients = [torch.autograd.grad(outputs.square().sum(), parameters) for outputs in found]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))

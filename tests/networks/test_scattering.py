import math

import pytest
import torch

from lightning_dp.errors import ConfigurationError
from lightning_dp.networks.scattering import ScatteringClassifier, morlet_wavelets

MNIST = (1, 28, 28)


@pytest.mark.parametrize(("order", "maps"), [(1, 17), (2, 81)])
def test_only_the_linear_layer_is_learnt(order, maps):
    network = ScatteringClassifier(MNIST, order=order)
    assert sum(parameter.numel() for parameter in network.parameters()) == 10 * (maps * 49 + 1)
    assert list(network.state_dict()) == ["head.weight", "head.bias"]
    images = torch.rand(3, *MNIST)
    assert network(images).abs().max() == 0
    assert network.features(images).shape == (3, maps * 49)


@pytest.mark.parametrize("shape", [MNIST, (3, 32, 20), (1, 8, 8)])
def test_an_image_has_its_own_features_whatever_is_beside_it(shape):
    network, images = ScatteringClassifier(shape, order=2), torch.rand(4, *shape)
    together = network.features(images)
    assert torch.isfinite(together).all()
    torch.testing.assert_close(network.features(images[2:3]), together[2:3], rtol=1e-4, atol=1e-4)


def test_wavelets_have_unit_norm_and_see_no_constant():
    wavelets = morlet_wavelets(8)
    torch.testing.assert_close(wavelets.unflatten(0, (8, 2)).flatten(1).norm(dim=1), torch.ones(8))
    assert wavelets.flatten(1).sum(1).abs().max() < 1e-5


def test_a_wave_is_seen_by_the_wavelet_of_its_direction():
    network = ScatteringClassifier(MNIST)
    places = torch.arange(28.0)
    for index, wave in ((0, places[None, :].expand(28, 28)), (4, places[:, None].expand(28, 28))):
        image = torch.cos(3 * math.pi / 4 * wave)[None, None] / 2 + 0.5
        found = network._moduli(image, stride=2)[0, :, 3:-3, 3:-3].mean((1, 2))
        assert int(found.argmax()) == index


def test_contrast_and_brightness_of_an_image_do_not_matter():
    network, images = ScatteringClassifier(MNIST), torch.rand(2, *MNIST)
    torch.testing.assert_close(
        network.features(images * 0.5)[:, 49:], network.features(images)[:, 49:], rtol=0.05, atol=0.02
    )


def test_black_images_have_finite_gradients():
    network = ScatteringClassifier(MNIST, order=2)
    network.features(torch.zeros(1, *MNIST, requires_grad=True)).sum().backward()
    assert torch.isfinite(network.features(torch.zeros(1, *MNIST))).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_shape": (1, 30, 28)}, r"divisible by 4.*30"),
        ({"order": 3}, "order=3"),
        ({"orientations": 0}, "orientations=0"),
    ],
)
def test_options_that_cannot_work_are_refused(options, words):
    with pytest.raises(ConfigurationError, match=words):
        ScatteringClassifier(**options)


def test_it_can_be_rebuilt_from_its_options():
    network = ScatteringClassifier(MNIST, num_classes=4, order=2, orientations=3)
    again = ScatteringClassifier(**network.options())
    again.load_state_dict(network.state_dict())
    images = torch.rand(2, *MNIST)
    assert torch.equal(network(images), again(images))

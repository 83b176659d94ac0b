import pytest
import torch
import torch.nn.functional as F

from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.per_record import per_record_rows
from lightning_dp.modules.dpsgd import mean_cross_entropy
from lightning_dp.networks.tempered import TemperedCNN, TemperedSigmoid
from lightning_dp.networks.wide_resnet import StandardisedConv2d, WideResNet


def num_parameters(network) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_published_parameter_counts():
    with torch.device("meta"):
        assert num_parameters(TemperedCNN()) == 26_010
        assert num_parameters(WideResNet()) == 2_753_818
        assert num_parameters(WideResNet(depth=40)) == 8_961_306
        assert num_parameters(WideResNet(depth=28, width=10)) == 36_500_378


def test_tempered_sigmoid_contains_tanh():
    values = torch.linspace(-4, 4, 101)
    torch.testing.assert_close(TemperedSigmoid(2.0, 2.0, 1.0)(values), torch.tanh(values))


@pytest.mark.parametrize("activation", ["relu", "tanh", "tempered_sigmoid"])
def test_small_network_runs_and_can_be_rebuilt(activation):
    network = TemperedCNN(activation=activation)
    again = TemperedCNN(**network.options())
    again.load_state_dict(network.state_dict())
    images = torch.rand(3, 1, 28, 28)
    assert network(images).shape == (3, 10)
    assert torch.equal(network(images), again(images))


def test_weights_are_standardised_over_their_inputs():
    conv = StandardisedConv2d(8, 4, 3)
    with torch.no_grad():
        conv.weight.mul_(7).add_(3)
        conv.gain.fill_(1.5)
    outputs = conv(torch.randn(64, 8, 12, 12))
    torch.testing.assert_close(outputs[..., 2:-2, 2:-2].std(), torch.tensor(1.5), rtol=0.05, atol=0)


def test_standardised_convolution_by_hand():
    conv = StandardisedConv2d(2, 3, 3, stride=2)
    weight = conv.weight.detach()
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    by_hand = centred / (18 * weight.var((1, 2, 3), correction=0, keepdim=True)).sqrt()
    images = torch.randn(1, 2, 9, 9)
    torch.testing.assert_close(conv(images), F.conv2d(images, by_hand, stride=2, padding=1))


def test_stages_halve_the_maps_twice():
    network = WideResNet(depth=10, width=1)
    assert network.blocks(torch.zeros(1, 16, 32, 32)).shape == (1, 64, 8, 8)
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert WideResNet(**network.options()).options() == network.options()


@pytest.mark.parametrize(
    ("network", "shape"),
    [(TemperedCNN(), (1, 28, 28)), (WideResNet((3, 16, 16), depth=10, width=1), (3, 16, 16))],
    ids=["tempered", "wide"],
)
def test_per_record_gradients_equal_single_backward_passes(network, shape):
    network = network.double()
    views, labels = torch.rand(3, 2, *shape, dtype=torch.float64), torch.tensor([0, 3, 9])
    rows = torch.cat(
        [c.values[:, 0] for c in per_record_rows(network, mean_cross_entropy, (views, labels), chunk_size=2)]
    )
    for index in range(3):
        network.zero_grad(set_to_none=True)
        mean_cross_entropy(network, views[index : index + 1], labels[index : index + 1]).backward()
        alone = torch.cat([p.grad.flatten() for p in network.parameters()])
        torch.testing.assert_close(rows[index], alone, rtol=1e-8, atol=1e-11)


def test_predictions_do_not_depend_on_the_batch():
    network, images = TemperedCNN(), torch.randint(0, 256, (7, 1, 28, 28), dtype=torch.uint8)
    assert torch.equal(network.predict(images, batch_size=3), network.predict(images))
    assert network.predict(images[:0]).shape == (0,)


@pytest.mark.parametrize("options", [{"image_shape": (1, 8, 8)}, {"input_std": 0.0}])
def test_bad_small_networks_are_refused(options):
    with pytest.raises(ConfigurationError, match="Expected"):
        TemperedCNN(**options)


@pytest.mark.parametrize("options", [{"depth": 17}, {"depth": 4}, {"width": 0}, {"input_std": -1.0}])
def test_bad_wide_networks_are_refused(options):
    with pytest.raises(ConfigurationError, match="6 n \\+ 4"):
        WideResNet(**options)

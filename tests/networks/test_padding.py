import pytest
import torch
import torch.nn.functional as F

from lightning_dp.networks.padding import SameConv2d, SameConvTranspose2d, same_conv2d, same_conv_transpose2d


@pytest.mark.parametrize("size", [(28, 28), (14, 14), (8, 12), (2, 2)])
def test_transposed_convolution_is_the_adjoint(size):
    source = torch.Generator().manual_seed(0)
    height, width = size
    images = torch.randn(3, 4, height, width, generator=source, dtype=torch.float64)
    maps = torch.randn(3, 6, height // 2, width // 2, generator=source, dtype=torch.float64)
    weight = torch.randn(6, 4, 5, 5, generator=source, dtype=torch.float64)
    forward = (same_conv2d(images, weight) * maps).sum()
    backward = (images * same_conv_transpose2d(maps, weight)).sum()
    assert abs(forward - backward) <= 1e-12 * max(1.0, abs(forward))


def test_pytorch_padding_is_another_operator():
    # The check above would not notice a shift that both directions share: tie the operator to TensorFlow's definition.
    impulse = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    impulse[0, 0, 0, 0] = 1
    weight = torch.arange(25, dtype=torch.float64).reshape(1, 1, 5, 5)
    # SAME, even size: output (0, 0) covers rows -1..3, so pixel (0, 0) meets kernel entry (1, 1).
    assert same_conv2d(impulse, weight)[0, 0, 0, 0] == weight[0, 0, 1, 1]
    assert F.conv2d(impulse, weight, stride=2, padding=2)[0, 0, 0, 0] == weight[0, 0, 2, 2]


def test_layers_halve_and_double():
    maps = torch.rand(2, 3, 8, 12)
    assert SameConv2d(3, 5)(maps).shape == (2, 5, 4, 6)
    assert SameConvTranspose2d(3, 5)(maps).shape == (2, 5, 16, 24)

import pytest
import torch
import torch.nn.functional as F

from lightning_dp.errors import ConfigurationError
from lightning_dp.networks.small import MLPDiscriminator, MLPGenerator, SmallConvDiscriminator, SmallConvGenerator

MNIST = (1, 28, 28)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("network", [SmallConvDiscriminator, MLPDiscriminator])
@pytest.mark.parametrize("shape", [MNIST, (3, 30, 27)])
def test_discriminators_judge_each_sample_by_itself(network, shape):
    judge = network(shape, 10)
    samples, one_hot = torch.rand(5, *shape), F.one_hot(torch.arange(5), 10).float()
    logits = judge(samples, one_hot)
    assert logits.shape == (5,)
    assert list(judge.buffers()) == []
    torch.testing.assert_close(judge(samples[2:3], one_hot[2:3]), logits[2:3])


@pytest.mark.parametrize("network", [SmallConvDiscriminator, MLPDiscriminator])
def test_the_image_gradient_depends_on_the_label(network):
    torch.manual_seed(0)
    judge, samples = network(MNIST, 10), torch.rand(2, *MNIST)
    samples[1] = samples[0]
    samples.requires_grad_()
    judge(samples, F.one_hot(torch.tensor([3, 4]), 10).float()).sum().backward()
    cosine = F.cosine_similarity(samples.grad[0].flatten(), samples.grad[1].flatten(), dim=0)
    assert cosine.abs() < 0.5


@pytest.mark.parametrize("network", [SmallConvGenerator, MLPGenerator])
def test_generators_are_small_and_make_images(network):
    generator = network(MNIST, 10)
    assert 30_000 <= count(generator) <= 250_000
    assert list(generator.buffers()) == []
    latent = generator.sample_latent(3, torch.Generator().manual_seed(0))
    assert torch.equal(latent, generator.sample_latent(3, torch.Generator().manual_seed(0)))
    assert latent.abs().max() <= 1
    images = generator(latent, torch.tensor([0, 1, 2]))
    assert images.shape == (3, *MNIST)
    assert images.min() >= 0
    assert images.max() <= 1
    assert not torch.equal(images, generator(latent, torch.tensor([5, 6, 7])))


@pytest.mark.parametrize("network", [SmallConvGenerator, MLPGenerator, SmallConvDiscriminator, MLPDiscriminator])
def test_reset_draws_every_weight_anew(network):
    module = network(MNIST, 10)
    before = {name: value.clone() for name, value in module.named_parameters() if "norm" not in name}
    module.reset_parameters()
    assert all(not torch.equal(module.get_parameter(name), value) for name, value in before.items())


def test_sizes_and_shapes_that_cannot_work_are_refused():
    with pytest.raises(ConfigurationError, match=r"divisible by 4.*\(1, 30, 28\)"):
        SmallConvGenerator((1, 30, 28), 10)
    with pytest.raises(ConfigurationError, match=r"\(C, H, W\).*sample_shape=\(64,\)"):
        SmallConvDiscriminator((64,), 10)


def test_mlp_discriminator_takes_vectors():
    judge = MLPDiscriminator((64,), 10)
    assert judge(torch.rand(2, 64), F.one_hot(torch.tensor([0, 1]), 10).float()).shape == (2,)


@pytest.mark.parametrize("build", [SmallConvGenerator, MLPGenerator])
def test_generators_can_be_rebuilt_from_their_options(build):
    generator = build((1, 8, 8), num_classes=2, latent_dim=3, width=4)
    again = build(**generator.options())
    again.load_state_dict(generator.state_dict())
    assert torch.equal(generator.sample(4, seed=0)[0], again.sample(4, seed=0)[0])

import pytest
import torch

from lightning_dp.errors import ConfigurationError
from lightning_dp.networks.dcgan import DCGANCritic, DCGANGenerator


def test_published_parameter_counts():
    with torch.device("meta"):
        assert sum(p.numel() for p in DCGANCritic((1, 28, 28)).parameters()) == 1_724_289
        assert sum(p.numel() for p in DCGANGenerator((1, 28, 28)).parameters()) == 2_272_129


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_shapes(shape):
    generator = DCGANGenerator(shape, num_classes=3, latent_dim=5, width=4)
    critic = DCGANCritic(shape, num_classes=3, width=4)
    images, labels = generator.sample(6, seed=0)
    assert images.shape == (6, *shape)
    assert 0 <= images.min() <= images.max() <= 1
    assert critic(images, torch.nn.functional.one_hot(labels, 3).float()).shape == (6,)


def test_labels_matter():
    generator, critic = DCGANGenerator((1, 28, 28), width=4), DCGANCritic((1, 28, 28), width=4)
    latent = generator.sample_latent(1)
    first, second = (generator(latent, torch.tensor([label])) for label in (0, 1))
    assert not torch.equal(first, second)
    one_hot = torch.eye(10)
    assert critic(first, one_hot[:1]) != critic(first, one_hot[1:2])


def test_it_can_be_rebuilt():
    generator = DCGANGenerator((1, 28, 28), latent_dim=5, width=4)
    again = DCGANGenerator(**generator.options())
    again.load_state_dict(generator.state_dict())
    assert torch.equal(generator.sample(3, seed=1)[0], again.sample(3, seed=1)[0])


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 32), (784,)])
@pytest.mark.parametrize("build", [DCGANCritic, DCGANGenerator])
def test_other_sizes_are_refused(build, shape):
    with pytest.raises(ConfigurationError, match="28 x 28 or 32 x 32"):
        build(shape)

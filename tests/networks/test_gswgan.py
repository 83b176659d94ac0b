import pytest
import torch
import torch.nn.functional as F

from lightning_dp.errors import ConfigurationError
from lightning_dp.modules.published import load_generator, save_released
from lightning_dp.networks.gswgan import GSWGANCritic, GSWGANGenerator


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_parameter_counts_are_those_of_the_paper():
    assert count(GSWGANCritic((1, 28, 28), 10)) == 1_071_105
    assert count(GSWGANGenerator((1, 28, 28))) == 3_826_177


def test_critic_scores_each_sample_by_itself_and_by_its_label():
    critic = GSWGANCritic((1, 9, 8), 3, width=4)
    samples, one_hot = torch.rand(5, 1, 9, 8), F.one_hot(torch.arange(5) % 3, 3).float()
    scores = critic(samples, one_hot)
    assert scores.shape == (5,)
    torch.testing.assert_close(critic(samples[2:3], one_hot[2:3]), scores[2:3])
    assert not torch.equal(critic(samples, one_hot.roll(1, 0)), scores)


def test_generator_makes_images_from_coins_and_is_released(tmp_path):
    generator = GSWGANGenerator((1, 28, 28), width=8)
    images, labels = generator.sample(6, seed=0)
    assert images.shape == (6, 1, 28, 28)
    assert 0 <= images.min() <= images.max() <= 1
    assert set(generator.sample_latent(50).unique().tolist()) == {0.0, 1.0}
    save_released(tmp_path, generator, {})
    again, _ = load_generator(tmp_path)
    assert torch.equal(again.sample(6, seed=0)[0], images)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("shape", [(1, 28, 26), (1, 32, 32), (1, 8, 8)])
def test_other_sizes_are_refused(shape):
    with pytest.raises(ConfigurationError, match="side from 17 to 30"):
        GSWGANGenerator(shape)


def test_vectors_are_refused():
    with pytest.raises(ConfigurationError, match="network='mlp'"):
        GSWGANCritic((64,), 10)

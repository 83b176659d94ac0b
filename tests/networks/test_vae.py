import pytest
import torch
import torch.nn.functional as F

from lightning_dp.errors import ConfigurationError
from lightning_dp.networks.vae import Autoencoder, ConvDecoder, ConvEncoder, CosineDecoder, CosineEncoder, one_hot

PAIRS = [
    lambda shape, **options: (
        CosineEncoder(shape, num_coefficients=20, width=8, latent_dim=4, **options),
        CosineDecoder(shape, num_coefficients=20, width=8, latent_dim=4, **options),
    ),
    lambda shape, **options: (
        ConvEncoder(shape, latent_dim=4, **options),
        ConvDecoder(shape, latent_dim=4, **options),
    ),
]
NAMES = ["cosine", "conv"]


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8)])
@pytest.mark.parametrize("pair", PAIRS, ids=NAMES)
def test_shapes(pair, shape):
    encoder, decoder = pair(shape)
    labels = torch.tensor([0, 3, 9])
    mean, log_variance = encoder(torch.rand(3, *shape), labels)
    assert mean.shape == log_variance.shape == (3, 4)
    images = decoder(mean, labels)
    assert images.shape == (3, *shape)
    assert images.min() >= 0
    assert images.max() <= 1
    torch.testing.assert_close(images, torch.sigmoid(decoder.logits(mean, labels)))


@pytest.mark.parametrize("pair", PAIRS, ids=NAMES)
def test_labels_matter_to_conditional_networks_only(pair):
    image, latent = torch.rand(1, 1, 28, 28), torch.randn(1, 4)
    for conditional in (True, False):
        encoder, decoder = pair((1, 28, 28), conditional=conditional)
        if conditional and isinstance(decoder, CosineDecoder):
            torch.nn.init.normal_(decoder.means.weight)
        first, second = torch.tensor([0]), torch.tensor([1])
        assert torch.equal(encoder(image, first)[0], encoder(image, second)[0]) is not conditional
        assert torch.equal(decoder(latent, first), decoder(latent, second)) is not conditional


@pytest.mark.parametrize("pair", PAIRS, ids=NAMES)
def test_a_decoder_can_be_rebuilt_and_keeps_no_buffer(pair):
    _, decoder = pair((1, 28, 28), conditional=True)
    again = type(decoder)(**decoder.options())
    again.load_state_dict(decoder.state_dict())
    assert set(decoder.state_dict()) == {name for name, _ in decoder.named_parameters()}
    assert torch.equal(decoder.sample(5, seed=1)[0], again.sample(5, seed=1)[0])


def test_log_variances_are_cut():
    encoder = CosineEncoder((1, 8, 8), num_coefficients=10)
    torch.nn.init.constant_(encoder.head.bias, 100.0)
    assert encoder(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))[1].max() == 4.0
    torch.nn.init.constant_(encoder.head.bias, -100.0)
    assert encoder(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))[1].min() == -8.0


def test_a_blank_decoder_paints_the_background():
    decoder = CosineDecoder((1, 8, 8), num_coefficients=10, background=-3.0)
    torch.nn.init.zeros_(decoder.head.weight)
    torch.nn.init.zeros_(decoder.head.bias)
    torch.testing.assert_close(decoder.logits(torch.randn(2, 16), torch.tensor([0, 1])), torch.full((2, 1, 8, 8), -3.0))


def test_one_hot_equals_the_library_and_passes_vmap():
    labels = torch.tensor([3, 0, 1])
    assert torch.equal(one_hot(labels, 4), F.one_hot(labels, 4).float())
    mapped = torch.func.vmap(lambda label: one_hot(label.unsqueeze(0), 4))(labels)
    assert torch.equal(mapped.squeeze(1), one_hot(labels, 4))


def test_published_decoders_are_small():
    assert sum(p.numel() for p in ConvDecoder((1, 28, 28)).parameters()) < 1_000_000
    assert sum(p.numel() for p in CosineDecoder((1, 28, 28)).parameters()) < 30_000


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(ConfigurationError, match="equal latent_dim"):
        Autoencoder(ConvEncoder((1, 28, 28), latent_dim=4), ConvDecoder((1, 28, 28), latent_dim=5))


@pytest.mark.parametrize(
    "build",
    [
        lambda: CosineEncoder((1, 8, 9)),
        lambda: CosineDecoder((1, 8, 8), num_coefficients=65),
        lambda: ConvEncoder((1, 7, 7)),
        lambda: ConvDecoder((1, 30, 28)),
    ],
)
def test_images_that_do_not_fit_are_refused(build):
    with pytest.raises(ConfigurationError, match="Expected"):
        build()

import copy

import pytest
import torch
from dp_accounting import NeighboringRelation
from torch import nn

from callbacks import RunFolder, SampleGrid
from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.per_record import per_record_rows, row_segments
from lightning_dp.gradients.poisson import PoissonSampler
from lightning_dp.losses.elbo import kl_to_standard_normal
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.no_privacy import NoPrivacy
from lightning_dp.mechanisms.topagg import TopAgg
from lightning_dp.modules.published import load_generator
from lightning_dp.modules.vae import DPVAE
from lightning_dp.networks.vae import ConvDecoder, ConvEncoder, CosineDecoder, CosineEncoder, VAEDecoder, VAEEncoder
from tests.conftest import Blobs, TinyData, callbacks_for, trainer_for
from tests.contracts.records import moves

SHAPE = (1, 8, 8)
# Given noise: calibrating it takes seconds.
PRIVACY = {"neighboring_relation": "add_or_remove_one", "target_epsilon": None, "noise_multiplier": 8.0}


def tiny_vae(conditional=True, **options) -> DPVAE:
    torch.manual_seed(0)
    shared = {"num_classes": 2, "latent_dim": 3, "num_coefficients": 10, "width": 6, "conditional": conditional}
    defaults = {"expected_batch_size": 10, "learning_rate": 0.02, "chunk_size": 4}
    return DPVAE(CosineEncoder(SHAPE, **shared), CosineDecoder(SHAPE, **shared), **{**defaults, **options})


def train(tmp_path, module=None, mechanism=None, data=None, max_steps=5, callbacks=(), **privacy):
    own = callbacks_for(mechanism or Gaussian(), **{**PRIVACY, **privacy})
    module = module or tiny_vae()
    trainer_for(tmp_path, [*callbacks, *own], max_steps).fit(module, datamodule=data or TinyData())
    return module, own


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
@pytest.mark.parametrize(
    "mechanism", [Gaussian(max_grad_norm=0.5), TopAgg(top_k=7, votes="stochastic", output="votes")], ids=["l2", "votes"]
)
@pytest.mark.parametrize("draws", [1, 4])
def test_one_record_moves_the_sum_no_further_than_the_event_says(mechanism, relation, draws):
    module = tiny_vae(draws_per_record=draws)
    found = moves(module, TinyData, torch.tensor([0, 3, 5, 18, 19, 30]), mechanism, relation=relation)
    bound = mechanism.l2_sensitivity(module.contribution_spec(), NeighboringRelation[relation.upper()])
    assert 0 < max(found) <= bound * (1 + 1e-9)


def test_latents_drawn_in_the_order_of_the_batch_would_be_caught():
    """The broken twin: a record that leaves shifts the draws of all that follow."""

    class InOrder(DPVAE):
        def record_rows(self, records):
            stream = torch.Generator().manual_seed(0)
            draws = torch.randn(len(records), 1, 3, generator=stream)
            batch = (self.images_of(records), self.labels_of(records), draws)
            return per_record_rows(self.autoencoder, self.record_loss, batch, chunk_size=50)

    module = tiny_vae()
    for parameter in module.autoencoder.parameters():
        nn.init.normal_(parameter)  # so that draws matter
    module.__class__ = InOrder
    mechanism = Gaussian(max_grad_norm=0.5)
    found = moves(module, TinyData, torch.arange(30), mechanism, relation="add_or_remove_one")
    bound = mechanism.l2_sensitivity(module.contribution_spec(), NeighboringRelation.ADD_OR_REMOVE_ONE)
    assert max(found) > 1.2 * bound


@pytest.mark.parametrize(
    ("encoder", "decoder", "shape"),
    [
        (CosineEncoder, CosineDecoder, SHAPE),
        (ConvEncoder, ConvDecoder, SHAPE),
    ],
    ids=["cosine", "conv"],
)
def test_per_record_gradients_equal_single_backward_passes(encoder, decoder, shape):
    torch.manual_seed(0)
    options = {"num_coefficients": 10} if encoder is CosineEncoder else {}
    module = DPVAE(encoder(shape, **options), decoder(shape, **options), draws_per_record=2).double()
    latent_dim = module.autoencoder.decoder.latent_dim
    records = (torch.rand(3, *shape).double(), torch.tensor([1, 0, 9]), torch.randn(3, 2, latent_dim).double())
    rows = torch.cat(
        [c.values[:, 0] for c in per_record_rows(module.autoencoder, module.record_loss, records, chunk_size=2)]
    )
    for index in range(3):
        module.zero_grad(set_to_none=True)
        module.record_loss(module.autoencoder, *(t[index : index + 1] for t in records)).backward()
        alone = torch.cat([p.grad.flatten() for p in module.autoencoder.parameters()])
        torch.testing.assert_close(rows[index], alone, rtol=1e-8, atol=1e-10)


def test_draws_are_averaged_inside_one_record():
    module = tiny_vae(draws_per_record=3).double()
    image, label, draws = torch.rand(1, *SHAPE).double(), torch.tensor([1]), torch.randn(1, 3, 3).double()
    together = module.record_loss(module.autoencoder, image, label, draws)
    apart = [module.record_loss(module.autoencoder, image, label, draws[:, k : k + 1]) for k in range(3)]
    torch.testing.assert_close(together, torch.stack(apart).mean())


def test_the_divergence_does_not_reach_the_decoder():
    module = tiny_vae(kl_weight=0.0)
    record = (torch.rand(1, *SHAPE), torch.tensor([1]), torch.randn(1, 1, 3))
    decoder = list(module.autoencoder.decoder.parameters())
    plain = torch.autograd.grad(module.record_loss(module.autoencoder, *record), decoder)
    module.kl_weight = 4.0
    weighted = torch.autograd.grad(module.record_loss(module.autoencoder, *record), decoder)
    assert all(torch.equal(a, b) for a, b in zip(plain, weighted, strict=True))


def test_a_frozen_encoder_leaves_the_decoders_parameters():
    module = tiny_vae()
    module.autoencoder.encoder.requires_grad_(False)
    assert row_segments(module.autoencoder) == row_segments(module.autoencoder.decoder)
    assert module.contribution_spec().vector_dim == sum(p.numel() for p in module.autoencoder.decoder.parameters())


@pytest.mark.parametrize("options", [{}, {"conditional": False}, {"kl_weight": 4.0}, {"likelihood": "gaussian"}])
@pytest.mark.parametrize("mechanism", [Gaussian(), NoPrivacy()], ids=["private", "none"])
def test_every_variant_trains(tmp_path, options, mechanism):
    module = tiny_vae(**options)
    before = copy.deepcopy(module.autoencoder.state_dict())
    module, own = train(tmp_path, module, mechanism)
    assert len(own[1].ledger) == 5
    after = module.autoencoder.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert all(not torch.equal(before[name], value) for name, value in after.items())


def test_empty_batches_release_noise_and_are_charged(tmp_path, monkeypatch):
    monkeypatch.setattr(PoissonSampler, "draw", lambda self: torch.zeros(0, dtype=torch.int64))
    _, own = train(tmp_path)
    assert len(own[1].ledger) == 5
    assert own[1].claim().level == "PROVED"


def test_without_noise_it_learns_the_classes(tmp_path):
    module, _ = train(tmp_path, tiny_vae(expected_batch_size=40, learning_rate=0.1), NoPrivacy(), Blobs(), 60)
    images, labels = module.released_generator().sample(50, seed=0)
    assert images[labels == 0].mean().item() == pytest.approx(20 / 255, abs=0.06)
    assert images[labels == 1][..., 5:].mean().item() == pytest.approx(220 / 255, abs=0.12)


class Linear(VAEEncoder):
    """Encoder of the linear-Gaussian model: a linear mean, a free variance."""

    def __init__(self, dim: int, latent_dim: int) -> None:
        super().__init__()
        self.image_shape, self.num_classes, self.latent_dim = (1, 1, dim), 2, latent_dim
        self.mean, self.log_variance = nn.Linear(dim, latent_dim), nn.Parameter(torch.zeros(latent_dim))

    def features(self, images, one_hot):
        mean = self.mean(images.flatten(1))
        return torch.cat([mean, self.log_variance.expand_as(mean)], dim=1)


class LinearDecoder(VAEDecoder):
    """Decoder of the linear-Gaussian model; the test gives it a loss without a sigmoid."""

    def __init__(self, dim: int, latent_dim: int) -> None:
        super().__init__()
        self.image_shape, self.num_classes, self.latent_dim = (1, 1, dim), 2, latent_dim
        self.map = nn.Linear(latent_dim, dim)

    def logits(self, latent, labels):
        return self.map(latent)[:, None, None, :]


@pytest.mark.slow
def test_the_linear_gaussian_autoencoder_finds_the_principal_subspace():
    """Principal angles below 5 degrees (other_methods, 1.8), by the rows that a release would sum."""
    torch.manual_seed(0)
    scales = torch.tensor([5.0, 4.0, 3.0, 0.1, 0.1, 0.1, 0.1, 0.1])
    basis = torch.linalg.qr(torch.randn(8, 8)).Q
    points = torch.randn(400, 8) * scales @ basis.T

    class Plain(DPVAE):
        def record_loss(self, network, image, label, draws):
            mean, log_variance = network.encoder(image, label)
            latent = mean + (0.5 * log_variance).exp() * draws[0]
            error = (network.decoder.logits(latent, label) - image).square().sum() / 2
            return error + kl_to_standard_normal(mean, log_variance).sum()

    module = Plain(Linear(8, 3), LinearDecoder(8, 3), expected_batch_size=1)
    optimizer = torch.optim.Adam(module.autoencoder.parameters(), lr=0.02)
    for _ in range(600):
        batch = (points[:, None, None, :], torch.zeros(400, dtype=torch.int64), torch.randn(400, 1, 3))
        (chunk,) = per_record_rows(module.autoencoder, module.record_loss, batch, chunk_size=400)
        parts = chunk.values.mean((0, 1)).split(row_segments(module.autoencoder))
        for parameter, part in zip(module.autoencoder.parameters(), parts, strict=True):
            parameter.grad = part.view_as(parameter)
        optimizer.step()
    found = torch.linalg.qr(module.autoencoder.decoder.map.weight.detach()).Q
    cosines = torch.linalg.svdvals(found.T @ basis[:, :3])
    assert torch.rad2deg(torch.acos(cosines.clamp(max=1)).max()) < 5


def test_the_decoder_is_released_and_nothing_of_the_encoder(tmp_path):
    own = callbacks_for(Gaussian(), **PRIVACY)
    folder = RunFolder(path=tmp_path, privatizer=own[0], evaluation=None, config={}, title="tiny")
    module = tiny_vae(ema_decay=0.9)
    callbacks = [folder, *own, SampleGrid(path=tmp_path / "samples.png", per_class=2)]
    trainer_for(tmp_path, callbacks, 5).fit(module, datamodule=TinyData())
    assert (tmp_path / "samples.png").exists()
    decoder, claim = load_generator(tmp_path)
    assert claim["level"] == "PROVED"
    assert set(decoder.state_dict()) == set(module.average.network.state_dict())
    assert torch.equal(decoder.sample(4, seed=1)[0], module.released_generator().sample(4, seed=1)[0])
    assert not torch.equal(decoder.sample(4, seed=1)[0], module.autoencoder.decoder.sample(4, seed=1)[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"draws_per_record": 0}, "draws_per_record > 0"),
        ({"kl_weight": -1.0}, "kl_weight >= 0"),
        ({"kl_weight": float("nan")}, "kl_weight >= 0"),
        ({"pixel_std": 0.0}, "pixel_std > 0"),
        ({"ema_decay": 1.0}, "ema_decay < 1"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigurationError, match=words):
        tiny_vae(**options)


def test_data_that_do_not_fit_are_refused(tmp_path):
    module = DPVAE(ConvEncoder((1, 8, 8)), ConvDecoder((1, 8, 8)), expected_batch_size=5)
    with pytest.raises(ConfigurationError, match="the data are"):
        train(tmp_path, module)


def test_batch_norm_in_either_network_is_refused(tmp_path):
    module = tiny_vae()
    module.autoencoder.encoder.extra = nn.BatchNorm1d(3)
    with pytest.raises(ConfigurationError, match="Batch normalisation"):
        train(tmp_path, module)


@pytest.mark.parametrize("betas", [(2.0, 3.0), (0.9, 1.0), (-0.1, 0.9), (0.9, float("nan"))])
def test_betas_that_adam_does_not_take_are_refused(betas):
    with pytest.raises(ConfigurationError, match=r"model.betas to be two numbers in \[0, 1\)"):
        tiny_vae(betas=betas)

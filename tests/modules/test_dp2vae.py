import copy
import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from dp_accounting import NeighboringRelation

from callbacks import RunFolder
from datamodules import MNIST, EmbeddedDigits
from lightning_dp.accounting.coverage import DEFAULT_NOT_COVERED
from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.modules import dp2vae
from lightning_dp.modules.dp2vae import DP2VAE
from lightning_dp.networks.vae import CosineDecoder, CosineEncoder
from tests.conftest import TinyData, callbacks_for, trainer_for
from tests.contracts.records import clean_sum, moves

SHAPE = (1, 8, 8)
# Given noise: calibrating it takes seconds.
PRIVACY = {"neighboring_relation": "add_or_remove_one", "target_epsilon": None, "noise_multiplier": 8.0}


class OtherData(TinyData):
    """Records of another collection."""

    origin = "another collection"


def tiny(source, **options) -> DP2VAE:
    torch.manual_seed(0)
    shared = {"num_classes": 2, "latent_dim": 3, "num_coefficients": 10, "width": 6}
    defaults = {"expected_batch_size": 10, "learning_rate": 0.02, "chunk_size": 4, "pretraining_steps": 3}
    if source == "public":
        defaults["public_data"] = OtherData(data_seed=5)
    return DP2VAE(CosineEncoder(SHAPE, **shared), CosineDecoder(SHAPE, **shared), source, **{**defaults, **options})


def train(tmp_path, module, data=None, max_steps=4, callbacks=()):
    own = callbacks_for(Gaussian(), **PRIVACY)
    trainer_for(tmp_path, [*callbacks, *own], max_steps).fit(module, datamodule=data or TinyData())
    return own


def flat(network) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in network.parameters()])


@pytest.mark.parametrize(("source", "level"), [("public", "PROVED"), ("random", "PROVED"), ("dp", "PROVED")])
def test_sources_with_a_proof(tmp_path, source, level):
    module = tiny(source)
    encoder, decoder = flat(module.autoencoder.encoder), flat(module.autoencoder.decoder)
    claim = train(tmp_path, module)[1].claim()
    assert claim.level == level
    assert claim.num_releases == 4
    assert not torch.equal(decoder, flat(module.autoencoder.decoder))
    assert torch.equal(encoder, flat(module.autoencoder.encoder)) is (source == "random")


def test_an_encoder_trained_on_the_records_without_noise_leaves_no_epsilon(tmp_path):
    """The published method: the claim is CONDITIONAL, and nothing that is written states an epsilon."""
    own = callbacks_for(Gaussian(), **PRIVACY)
    folder = RunFolder(path=tmp_path, privatizer=own[0], evaluation=None, config={}, title="tiny")
    trainer_for(tmp_path, [folder, *own], 4).fit(tiny("private_nondp"), datamodule=TinyData())
    claim = own[1].claim()
    assert claim.level == "CONDITIONAL"
    assert claim.epsilon is None
    assert own[1].epsilon is None
    assert "a record moves the latents of all others" in claim.statement()
    card = json.loads((tmp_path / "run_card.json").read_text())
    assert card["claim"]["epsilon"] is None
    assert card["epsilon_curve"] == []


@pytest.mark.parametrize("source", ["private_nondp", "random"])
def test_a_record_outside_of_the_batch_moves_the_sum_through_such_an_encoder(source):
    """Why: the encoder differs between neighbours, and with it every latent (other_methods, 1.8)."""
    mechanism, sums = Gaussian(max_grad_norm=1.0), []
    for changes in (False, True):
        module, data = tiny(source, pretraining_steps=40, pretraining_learning_rate=0.1), TinyData()
        data.setup()
        if changes:
            data.train_images[0] = 255 - data.train_images[0]
        module.trainer = SimpleNamespace(datamodule=data, ckpt_path=None)
        module.describe_data(data)
        module.setup("fit")
        sums.append(clean_sum(module, data, torch.arange(1, 40), mechanism))
    moved = (sums[0] - sums[1]).norm().item()
    assert moved == 0 if source == "random" else moved > 0.2


@pytest.mark.parametrize("source", ["random", "dp"])
@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
def test_one_record_moves_the_sum_no_further_than_the_event_says(source, relation):
    module, mechanism = tiny(source), Gaussian(max_grad_norm=0.5)
    found = moves(module, TinyData, torch.tensor([0, 3, 5, 18, 19, 30]), mechanism, relation=relation)
    bound = mechanism.l2_sensitivity(module.contribution_spec(), NeighboringRelation[relation.upper()])
    assert 0 < max(found) <= bound * (1 + 1e-9)


def test_a_public_encoder_does_not_see_the_records(tmp_path):
    encoders = []
    for data_seed in (0, 1):
        module = tiny("public")
        train(tmp_path, module, TinyData(data_seed=data_seed), max_steps=1)
        encoders.append(flat(module.autoencoder.encoder))
    assert torch.equal(*encoders)


def test_the_decoder_starts_where_it_was_before_the_encoder_was_trained():
    module, data = tiny("private_nondp"), TinyData()
    data.setup()
    before = copy.deepcopy(module.autoencoder.state_dict())
    module.trainer = SimpleNamespace(datamodule=data, ckpt_path=None)
    module.describe_data(data)
    module.setup("fit")
    after = module.autoencoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("decoder."))
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("encoder."))
    assert not any(p.requires_grad for p in module.autoencoder.encoder.parameters())


def test_later_releases_of_a_dp_encoder_train_the_decoder_alone(tmp_path):
    seen = []

    class Spy(DP2VAE):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            seen.append((flat(self.autoencoder.encoder), flat(self.autoencoder.decoder)))

    module = tiny("dp", encoder_share=0.5)
    module.__class__ = Spy
    train(tmp_path, module, max_steps=4)
    encoders, decoders = zip(*seen, strict=True)
    assert not torch.equal(encoders[0], encoders[1])
    assert torch.equal(encoders[1], encoders[2])
    assert torch.equal(encoders[1], encoders[3])
    assert all(not torch.equal(left, right) for left, right in pairwise(decoders))


def test_the_divergence_contributes_nothing_to_a_frozen_encoders_rows():
    module, data, ids = tiny("random"), TinyData(), torch.arange(5)
    reference = clean_sum(module, data, ids, Gaussian(max_grad_norm=1e6))
    module.kl_weight = 100.0
    assert torch.equal(reference, clean_sum(module, data, ids, Gaussian(max_grad_norm=1e6)))


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("public", {"public_data": None}, "records of a public encoder"),
        ("random", {"public_data": TinyData()}, "with no other"),
        ("dp", {"encoder_share": 0.0}, "encoder_share"),
        ("random", {"pretraining_steps": -1}, "pretraining_steps >= 0"),
    ],
)
def test_bad_options_are_refused(source, options, words):
    with pytest.raises(ConfigurationError, match=words):
        tiny(source, **options)


def test_public_data_of_another_shape_are_refused(tmp_path):
    class Small(OtherData):
        train_images = torch.zeros(4, 1, 6, 6, dtype=torch.uint8)
        train_labels = torch.zeros(4, dtype=torch.int64)

        def setup(self, stage=None):
            pass

    with pytest.raises(ConfigurationError, match="Expected public data"):
        train(tmp_path, tiny("public", public_data=Small()))


@pytest.mark.parametrize(
    ("public", "private"),
    [(TinyData(data_seed=5), TinyData()), (EmbeddedDigits(num_train=100), MNIST()), (MNIST(), EmbeddedDigits())],
    ids=["same name", "part of the private data", "the private data are part of it"],
)
def test_private_records_are_no_public_data(public, private):
    """The broken version trains the encoder on the private records without noise, and states PROVED."""
    module = tiny("public", public_data=public)
    module.autoencoder.decoder.image_shape, module.autoencoder.decoder.num_classes = (
        private.image_shape,
        private.num_classes,
    )
    with pytest.raises(ConfigurationError, match="as the private data do"):
        module.describe_data(private)


class PartlyPrivate(OtherData):
    """One record of the private data among others, under another label."""

    def read(self):
        splits, private = super().read(), TinyData().read()
        images = splits.train_images.clone()
        images[7] = private.train_images[31]
        return replace(splits, train_images=images)


@pytest.mark.parametrize("public", [OtherData(), PartlyPrivate(data_seed=5)], ids=["all of them", "one of them"])
def test_private_records_under_another_name_are_no_public_data(tmp_path, monkeypatch, public):
    """The broken twin compares names alone, trains the encoder on private records, and states PROVED."""
    with pytest.raises(ConfigurationError, match="hold too, so no encoder") as refused:
        train(tmp_path, tiny("public", public_data=public))
    assert "31" not in str(refused.value)
    monkeypatch.setattr(DP2VAE, "_refuse_private_images", lambda self, public: None)
    assert train(tmp_path, tiny("public", public_data=public))[1].claim().level == "PROVED"


@pytest.mark.parametrize("source", ["public", "random"])
def test_the_claim_says_what_it_tells_that_the_run_was_not_refused(tmp_path, source):
    """Equal images end a run without a release, which no noise hides: the claim is about records without any."""
    claim = train(tmp_path, tiny(source))[1].claim()
    beyond = [text for text in claim.not_covered if text not in DEFAULT_NOT_COVERED]
    assert beyond == ([dp2vae._NOT_PUBLIC] if source == "public" else [])


def test_the_ledger_says_where_the_encoder_comes_from(tmp_path):
    _, accountant = train(tmp_path, tiny("public"))
    assert accountant.ledger.header["plan"]["encoder_source"] == "public"
    assert accountant.ledger.header["plan"]["public_data"] == "another collection"

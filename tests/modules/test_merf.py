import math

import pytest
import torch
from dp_accounting import NeighboringRelation

from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.no_privacy import NoPrivacy
from lightning_dp.modules.mean_embedding import MeanEmbedding
from lightning_dp.modules.merf import DPMERF, discrepancy
from lightning_dp.networks.basis import LowFrequencyDCT
from lightning_dp.networks.dct import DCTGenerator
from tests.conftest import Blobs, TinyData, callbacks_for, trainer_for

RELATIONS = ["add_or_remove_one", "replace_one"]


def tiny_embedding(kind=MeanEmbedding, **options) -> MeanEmbedding:
    defaults = {"basis": None, "num_frequencies": 50, "length_scales": (2.0,), "count_weight": 0.1}
    return kind((1, 8, 8), 2, **{**defaults, "chunk_size": 7, "public_seed": 0, **options})


def tiny_module(**options) -> DPMERF:
    torch.manual_seed(0)
    generator = DCTGenerator((1, 8, 8), num_classes=2, latent_dim=3, num_coefficients=10, width=4)
    defaults = {"num_frequencies": 40, "length_scales": (4.0, 1.0), "train_steps": 3, "images_per_class": 5}
    return DPMERF(generator, LowFrequencyDCT((1, 8, 8), 20), **{**defaults, **options})


def table(embedding: MeanEmbedding, images, labels) -> torch.Tensor:
    total = torch.zeros(embedding.release_shape, dtype=torch.float64)
    for chunk in embedding.rows(images, labels):
        total[chunk.queries] += chunk.values.sum(0)
    return total


def declared(embedding: MeanEmbedding, relation: str) -> float:
    return Gaussian().l2_sensitivity(embedding.contribution_spec(), NeighboringRelation[relation.upper()])


def ramps() -> torch.Tensor:
    """One pixel from black to white, so that a frequency meets every phase."""
    images = torch.zeros(256, 1, 8, 8, dtype=torch.uint8)
    images[:, 0, 3, 3] = torch.arange(256).to(torch.uint8)
    return images


def worst_moves(embedding: MeanEmbedding) -> dict[str, float]:
    images = torch.cat([ramps(), torch.randint(0, 256, (200, 1, 8, 8), dtype=torch.uint8)])
    rows = embedding.encoded(images)
    alone, same = rows.norm(dim=1).max().item(), torch.cdist(rows, rows).max().item()
    return {"add_or_remove_one": alone, "replace_one": max(same, math.hypot(alone, alone))}


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("options", [{}, {"length_scales": (0.05, 0.2)}, {"basis": LowFrequencyDCT((1, 8, 8), 12)}])
def test_no_pair_of_records_moves_the_sum_further_than_declared(options, relation):
    embedding = tiny_embedding(**options)
    assert worst_moves(embedding)[relation] <= declared(embedding, relation)


@pytest.mark.parametrize("relation", RELATIONS)
def test_one_frequency_attains_the_sensitivity(relation):
    """Two images half a turn apart have opposite features; the count, which is equal, is all that is missing."""
    embedding = tiny_embedding(num_frequencies=1, length_scales=(0.001,), count_weight=0.01)
    bound = declared(embedding, relation)
    assert bound == {"add_or_remove_one": 1.0, "replace_one": 2.0}[relation]
    assert 0.99 * bound < worst_moves(embedding)[relation] <= bound


class Shifted(MeanEmbedding):
    """Broken: features sqrt(2 / J) cos(w x + b), whose norm reaches sqrt 2."""

    def encoded(self, images):
        rows = super().encoded(images)
        return torch.cat(
            [rows[:, : 1 + self.num_frequencies] * math.sqrt(2), 0 * rows[:, 1 + self.num_frequencies :]], 1
        )


class Twice(MeanEmbedding):
    """Broken: two bandwidths for the price of one."""

    def encoded(self, images):
        return super().encoded(images) * math.sqrt(2)


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("broken", [Shifted, Twice])
def test_broken_features_are_caught(broken, relation):
    embedding = tiny_embedding(broken, num_frequencies=1, length_scales=(0.001,), count_weight=0.01)
    assert worst_moves(embedding)[relation] > 1.2 * declared(embedding, relation)


def test_sums_are_exact_so_neither_chunks_nor_order_nor_other_records_change_a_bit():
    data = TinyData()
    data.setup()
    images, labels = data.train_images, data.train_labels
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for basis in (None, LowFrequencyDCT((1, 8, 8), 12)):
        whole = table(tiny_embedding(basis=basis, chunk_size=40), images, labels)
        for size in (1, 7, 1000):
            embedding = tiny_embedding(basis=basis, chunk_size=size)
            assert torch.equal(table(embedding, images[order], labels[order]), whole)
        rows = embedding.encoded(images)
        assert torch.equal(rows, torch.cat([embedding.encoded(image[None]) for image in images]))
        assert torch.equal(rows * 2.0**30, (rows * 2.0**30).round())


@pytest.mark.parametrize("basis", [None, LowFrequencyDCT((1, 8, 8), 64)])
def test_features_of_records_and_of_generated_images_agree_and_make_the_kernel(basis):
    data = TinyData()
    data.setup()
    embedding = tiny_embedding(basis=basis, num_frequencies=20_000, length_scales=(9.0,))
    images = data.train_images[:8]
    rows, features = embedding.encoded(images), embedding.features(images.float() / 255)
    torch.testing.assert_close(rows[:, 1:] / embedding.weights[1], features.double(), atol=2e-5, rtol=0)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(8), atol=1e-5, rtol=0)
    points = images.flatten(1).double() / 255
    kernel = (-torch.cdist(points, points).square() / 18).exp()
    torch.testing.assert_close((features @ features.T).double(), kernel, atol=0.02, rtol=0)


def test_class_means_follow_from_sums():
    data, embedding = TinyData(), tiny_embedding()
    data.setup()
    means = embedding.class_means(table(embedding, data.train_images, data.train_labels))
    features = embedding.features(data.train_images.float() / 255)[data.train_labels == 1]
    torch.testing.assert_close(means[1], features.mean(0).double(), atol=1e-4, rtol=0)


def test_the_discrepancy_is_least_at_the_truth_and_has_no_bias():
    stream = torch.Generator().manual_seed(0)
    angles = torch.randn(1, 4000, generator=stream)
    features = torch.stack([angles.cos(), angles.sin()], dim=2)
    target = features.mean(1)
    constant = target.square().sum()
    batches = torch.stack([discrepancy(part, target) for part in features.split(4, dim=1)])
    assert batches.mean() + constant == pytest.approx(0.0, abs=0.02)
    elsewhere = torch.stack([(angles + 1).cos(), (angles + 1).sin()], dim=2)
    assert discrepancy(elsewhere, target) + constant > 0.1


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("releases", [1, 3])
def test_it_releases_and_claims_what_was_asked(tmp_path, relation, releases):
    module = tiny_module()
    before = module.generator.means.detach().clone()
    own = callbacks_for(Gaussian(), neighboring_relation=relation, target_epsilon=2.0)
    trainer_for(tmp_path, own, releases).fit(module, datamodule=TinyData())
    claim = own[1].claim()
    assert (claim.level, claim.num_releases) == ("PROVED", releases)
    assert 1.99 < claim.epsilon <= 2.0
    assert module.num_averaged == releases
    assert not torch.equal(before, module.generator.means)


def test_without_noise_it_learns_the_classes(tmp_path):
    module = tiny_module(train_steps=250, learning_rate=0.03, num_frequencies=200)
    trainer_for(tmp_path, callbacks_for(NoPrivacy()), 1).fit(module, datamodule=Blobs())
    images, labels = module.released_generator().sample(50, seed=0)
    assert images[labels == 0].mean().item() == pytest.approx(20 / 255, abs=0.1)
    assert images[labels == 1][..., 5:].mean().item() == pytest.approx(220 / 255, abs=0.15)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length_scales": ()}, "at least one"),
        ({"length_scales": (0.0,)}, "length_scales > 0"),
        ({"count_weight": 1.0}, "count_weight < 1"),
        ({"images_per_class": 1}, "images_per_class >= 2"),
        ({"train_steps": 0}, "train_steps > 0"),
        ({"num_frequencies": 1}, "one frequency for each"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigurationError, match=words):
        tiny_module(**options)


@pytest.mark.parametrize("law", ["rounded_gaussian", "discrete_gaussian"])
def test_its_sums_meet_exact_noise_where_it_is_asked_for(tmp_path, law):
    own = callbacks_for(Gaussian(noise=law), neighboring_relation="add_or_remove_one", target_epsilon=2.0)
    trainer_for(tmp_path, own, 2).fit(tiny_module(), datamodule=TinyData())
    assert [event.kind for event, _ in own[1].ledger.counts()] == [law]
    claim = own[1].claim()
    assert claim.level == "PROVED"
    assert not any("floating-point sampler" in text for text in claim.not_covered)

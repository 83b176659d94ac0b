import math

import pytest
import torch
from dp_accounting import NeighboringRelation

from callbacks import RunFolder
from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.record_gradients import rows_of
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.no_privacy import NoPrivacy
from lightning_dp.mechanisms.topagg import TopAgg
from lightning_dp.modules.class_moments import ClassMoments, Placement
from lightning_dp.modules.moments import MomentsModule
from lightning_dp.modules.moments_rounds import MomentsRounds, codebook, denoised, spectral_edge
from lightning_dp.modules.published import load_generator
from lightning_dp.modules.release import _DOOR, Released, rows_where_needed
from lightning_dp.networks.class_gaussian import ClassGaussianGenerator
from tests.conftest import TinyData, callbacks_for, trainer_for

RELATIONS = ["add_or_remove_one", "replace_one"]


def tiny_generator(**options) -> ClassGaussianGenerator:
    return ClassGaussianGenerator((1, 8, 8), **{"num_classes": 2, "num_coefficients": 6, **options})


PLAIN = {"emphasis": 0.25, "block_weights": (0.15, 0.35, 0.92), "chunk_size": 512}


def tiny_statistics(num_components=1, kind=ClassMoments, slant=0.0, **options) -> ClassMoments:
    return kind(tiny_generator(num_components=num_components, slant=slant), **{**PLAIN, **options})


def tiny_placement(num_components=1, clip=2.0, dim=6) -> Placement:
    centres = torch.randn(2, num_components, dim, generator=torch.Generator().manual_seed(5)).double()
    centres[..., 0] += 4
    return Placement(centres=centres, in_use=torch.ones(2, num_components, dtype=torch.bool), clip=clip)


def tiny_module(num_components=1, **options) -> MomentsModule:
    return MomentsModule(tiny_generator(num_components=num_components), **{"clip": 2.0, "centre": 1.0, **options})


def declared(statistics: ClassMoments, relation: str) -> float:
    return Gaussian().l2_sensitivity(statistics.contribution_spec(), NeighboringRelation[relation.upper()])


def table(statistics: ClassMoments, images, labels, placement=None) -> torch.Tensor:
    """The sum that would be released without noise, before any clipping by the mechanism."""
    total = torch.zeros(statistics.release_shape, dtype=torch.float64)
    placement = placement or tiny_placement(statistics.num_components, dim=statistics.dim)
    for chunk in statistics.rows(images, labels, placement):
        for rows in rows_of(chunk):
            total[rows.queries] += rows.values.sum(0)
    return total


def directions_to_try(dim: int) -> torch.Tensor:
    """Unit vectors that point anywhere, along axes, against each other, and shorter ones."""
    stream = torch.Generator().manual_seed(0)
    random = torch.nn.functional.normalize(torch.randn(300, dim, generator=stream), dim=1).double()
    axes = torch.eye(dim, dtype=torch.float64)
    full = torch.cat([random, -random[:50], axes, -axes])
    return torch.cat([full, full * torch.rand(len(full), 1, generator=stream), torch.zeros(1, dim)])


def worst_moves(statistics: ClassMoments) -> dict[str, float]:
    """Search pairs of records, in the same and in different cells, for the largest change of the sum."""
    found = directions_to_try(statistics.dim)
    for _ in range(60):  # climb: push pairs of one cell apart
        rows = statistics.encoded(found)
        distances = torch.cdist(rows, rows)
        first, second = divmod(int(distances.argmax()), len(rows))
        steps = torch.randn(40, statistics.dim, generator=torch.Generator().manual_seed(1)).double() * 0.1
        near = torch.cat([found[first] + steps, found[second] + steps])
        found = torch.cat([found, near / near.norm(dim=1, keepdim=True).clamp(min=1)])[-800:]
        if len(found) == 800:
            break
    found = torch.cat([directions_to_try(statistics.dim), found])
    rows = statistics.encoded(found)
    norms = rows.norm(dim=1)
    same_cell, other_cell = torch.cdist(rows, rows).max().item(), math.hypot(norms.max(), norms.max())
    return {"add_or_remove_one": norms.max().item(), "replace_one": max(same_cell, other_cell)}


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("weights", [(0.15, 0.35, 0.92), (0.25, 0.6, 0.76), (1.0, 1.0, 1.0)], ids=str)
def test_no_pair_of_records_moves_the_sum_further_than_declared(weights, relation):
    statistics = tiny_statistics(block_weights=weights)
    bound = declared(statistics, relation)
    assert bound == pytest.approx({"add_or_remove_one": 1.0, "replace_one": math.sqrt(2)}[relation])
    assert bound * 0.999 < worst_moves(statistics)[relation] <= bound


class Heavy(ClassMoments):
    """Broken: blocks that are not bounded together."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.weights = (0.15, 0.6, 0.92)


class Doubled(ClassMoments):
    """Broken: every pair counted twice in the norm."""

    def encoded(self, directions):
        rows = super().encoded(directions)
        first, second = self._pairs
        rows[:, 1 + self.dim :][:, first != second] *= math.sqrt(2)
        return rows


class Long(ClassMoments):
    """Broken: coefficients that are not clipped."""

    def encoded(self, directions):
        return super().encoded(directions * 1.5)


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("broken", [Heavy, Doubled, Long])
def test_broken_rows_are_caught(broken, relation):
    statistics = tiny_statistics(kind=broken)
    assert worst_moves(statistics)[relation] > declared(statistics, relation) * 1.005


def test_weights_that_let_rows_oppose_each_other_are_caught_and_refused():
    """With a heavy mean and hardly a count, records of one cell can be more than sqrt 2 apart."""
    statistics = tiny_statistics()
    statistics.weights = (0.05, 0.95, 0.3)
    assert worst_moves(statistics)["replace_one"] > 1.2 * declared(statistics, "replace_one")
    with pytest.raises(ConfigurationError, match="never oppose"):
        tiny_statistics(block_weights=(0.05, 0.95, 0.3))


class SlantsBeside(ClassMoments):
    """Broken: slants are no part of what is clipped."""

    def directions(self, images, labels, placement):
        cells, directions = super().directions(images, labels, placement)
        directions[:, -1] = self._basis.in_steps(images, 1.0)[:, -1]
        return cells, directions


def whole_image_moves(statistics: ClassMoments, relation: str) -> float:
    """Whole images, cells and all: extreme ones change places with each other."""
    data = TinyData()
    data.setup()
    images, labels = data.train_images.clone(), data.train_labels
    images[0], images[1], images[2, :, :, :4], images[2, :, :, 4:] = 0, 255, 255, 0
    reference = table(statistics, images, labels)
    found = []
    for record in range(6):
        if relation == "add_or_remove_one":
            kept = torch.arange(40) != record
            found.append(table(statistics, images[kept], labels[kept]))
        for other in (0, 1, 2, 5):
            changed, moved = images.clone(), labels.clone()
            changed[record] = images[other]
            moved[record] = other % 2
            if relation == "replace_one":
                found.append(table(statistics, changed, moved))
    return max(torch.linalg.vector_norm(other - reference).item() for other in found)


@pytest.mark.parametrize("slant", [0.0, 30.0])
@pytest.mark.parametrize("num_components", [1, 3])
@pytest.mark.parametrize("relation", RELATIONS)
def test_one_record_moves_the_encoded_sum_no_further_than_the_event_says(relation, num_components, slant):
    statistics = tiny_statistics(num_components, slant=slant, chunk_size=7)
    bound = declared(statistics, relation)
    assert 0.9 * bound < whole_image_moves(statistics, relation) <= bound


@pytest.mark.parametrize("relation", RELATIONS)
def test_slants_that_are_not_clipped_with_the_rest_are_caught(relation):
    statistics = tiny_statistics(3, SlantsBeside, slant=30.0)
    assert whole_image_moves(statistics, relation) > 1.5 * declared(statistics, relation)


def test_the_mechanism_does_not_scale_rows_that_fill_the_bound():
    statistics = tiny_statistics()
    rows = statistics.encoded(directions_to_try(6))[:, None]
    assert torch.equal(Gaussian().encode(rows, statistics.contribution_spec(), None), rows)


@pytest.mark.parametrize("slant", [0.0, 2.0])
def test_sums_are_exact_so_neither_chunks_nor_order_nor_other_records_change_a_bit(slant):
    data = TinyData()
    data.setup()
    images, labels = data.train_images, data.train_labels
    whole = table(tiny_statistics(3, slant=slant, chunk_size=40), images, labels)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for size in (1, 3, 17, 1000):
        statistics = tiny_statistics(3, slant=slant, chunk_size=size)
        assert torch.equal(table(statistics, images, labels), whole)
        assert torch.equal(table(statistics, images[order], labels[order]), whole)
    placement = tiny_placement(3, dim=statistics.dim)
    cells, directions = statistics.directions(images, labels, placement)
    alone = [statistics.directions(images[i : i + 1], labels[i : i + 1], placement) for i in range(40)]
    assert torch.equal(cells, torch.cat([cell for cell, _ in alone]))
    assert torch.equal(directions, torch.cat([u for _, u in alone]))
    assert on_grid(statistics.encoded(directions))
    assert not on_grid(directions)  # the same check sees rows that are not rounded


@pytest.mark.parametrize("num_coefficients", [6, 47])
def test_sums_without_rows_are_those_of_the_rows_to_the_last_bit(num_coefficients):
    """47 coefficients are no whole number of blocks; two in five records are silent."""
    generator = tiny_generator(num_coefficients=num_coefficients)
    statistics = ClassMoments(generator, **{**PLAIN, "chunk_size": 7})
    data, summed = TinyData(), torch.zeros(statistics.release_shape, dtype=torch.float64)
    data.setup()
    placement = Placement(torch.zeros(2, 1, num_coefficients), torch.ones(2, 1, dtype=torch.bool), clip=2.0)
    rows = torch.zeros_like(summed)
    for chunk in statistics.rows(data.train_images, data.train_labels, placement):
        weights = (chunk.ids % 5 < 3).double()
        formed = torch.cat([some.values[:, 0] for some in chunk.row_chunks()])
        rows[chunk.place] += weights @ formed
        chunk.add_weighted_sum(weights, summed[chunk.place])
        norms = formed.norm(dim=1)
        assert (norms <= chunk.norm_bounds).all()
        assert (chunk.norm_bounds <= norms * (1 + 1e-6)).all()
    assert torch.equal(summed, rows)
    assert summed.abs().sum() > 1


@pytest.mark.parametrize("mechanism", [Gaussian(), NoPrivacy()])
def test_the_door_sums_to_the_same_bits_with_rows_and_without(mechanism, monkeypatch):
    data, statistics = TinyData(), tiny_statistics(3)
    data.setup()
    spec, totals = statistics.contribution_spec(), []
    for forms_rows in (False, True):
        if forms_rows:
            monkeypatch.setattr(type(mechanism), "row_scaling", lambda self, norms, spec: None)
        rows = statistics.rows(data.train_images, data.train_labels, tiny_placement(3))
        total = torch.zeros(statistics.release_shape, dtype=torch.float64)
        for chunk in rows_where_needed(rows, mechanism, spec, total):
            assert forms_rows
            total[chunk.queries] += mechanism.encode(chunk.values, spec, None).sum(0)
        totals.append(total)
    assert torch.equal(*totals)
    assert totals[0].abs().sum() > 1


def on_grid(values) -> bool:
    return torch.equal(values * 2.0**30, (values * 2.0**30).round())


def test_without_noise_the_moments_are_those_of_the_coefficients():
    statistics, placement, data = tiny_statistics(), tiny_placement(clip=100.0), TinyData()
    data.setup()
    sums = table(statistics, data.train_images, data.train_labels, placement)
    found = statistics.moments(sums, 0.0, placement)
    coefficients = tiny_generator().basis(data.train_images.double() / 255)
    for label in range(2):
        mine = coefficients[data.train_labels == label]
        assert found.counts[label] == pytest.approx(20, rel=1e-6)
        torch.testing.assert_close(found.means[label], mine.mean(0), atol=1e-4, rtol=0)
        scaled = (mine * statistics.scale).T.cov(correction=0)
        torch.testing.assert_close(found.covariances[label], scaled, atol=2e-3, rtol=0)


def test_the_stated_noise_of_the_moments_is_that_of_the_moments():
    statistics, placement = tiny_statistics(), tiny_placement()
    clean = torch.zeros(statistics.release_shape).double()
    clean[:, 0] = 5000 * statistics.weights[0]
    stream = torch.Generator().manual_seed(0)
    noisy = (clean + 2 * torch.randn(clean.shape, generator=stream) for _ in range(2000))
    draws = [statistics.moments(sums, 2.0, placement) for sums in noisy]
    means, covariances = (torch.stack([getattr(d, name) for d in draws]) for name in ("means", "covariances"))
    torch.testing.assert_close(means[:, 0].std(0), draws[0].mean_noise[0], rtol=0.1, atol=0)
    diagonal = covariances.diagonal(dim1=2, dim2=3).std(0).mean().item()
    assert diagonal == pytest.approx(draws[0].covariance_noise[0].item(), rel=0.1)
    assert covariances[:, :, 0, 1:].std(0).mean().item() == pytest.approx(diagonal / math.sqrt(2), rel=0.1)


def test_noise_alone_leaves_no_directions_and_signal_does():
    stream = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 200, 200, generator=stream).double()
    noise = (noise + noise.mT) / 2  # std 1/sqrt 2 off the diagonal, 1 on it
    edge = spectral_edge(torch.ones(1).double(), 200)
    assert torch.linalg.eigvalsh(noise).max() == pytest.approx(edge.item(), rel=0.05)
    assert torch.linalg.eigvalsh(denoised(noise, 1.05 * edge)).max() < 4  # single variances, no direction
    spike = torch.zeros(200).double()
    spike[:4] = 0.5
    found = denoised(noise + 100 * torch.outer(spike, spike), edge)[0]
    values, vectors = torch.linalg.eigh(found)
    assert values.min() >= -1e-9
    assert (vectors[:, -1] @ spike).abs() > 0.9


@pytest.mark.parametrize("relation", RELATIONS)
def test_it_releases_once_and_claims_what_was_asked(tmp_path, relation):
    own = callbacks_for(Gaussian(), neighboring_relation=relation, target_epsilon=1.0)
    folder = RunFolder(path=tmp_path, privatizer=own[0], evaluation=None, config={}, title="tiny")
    module = tiny_module()
    trainer_for(tmp_path, [folder, *own], 1).fit(module, datamodule=TinyData())
    claim = own[1].claim()
    assert (claim.level, claim.num_releases, claim.relation) == ("PROVED", 1, relation)
    assert 0.99 < claim.epsilon <= 1.0
    generator, _ = load_generator(tmp_path)
    assert torch.equal(generator.sample(6, seed=0)[0], module.released_generator().sample(6, seed=0)[0])
    assert torch.isfinite(generator.sample(6, seed=0)[0]).all()


def test_without_privacy_it_is_the_gaussian_of_each_class(tmp_path):
    module, data = tiny_module(clip=100.0), TinyData()
    trainer_for(tmp_path, callbacks_for(NoPrivacy()), 1).fit(module, datamodule=data)
    coefficients = module.generator.basis(data.train_images.float() / 255)[data.train_labels == 1]
    torch.testing.assert_close(module.generator.means[1, 0].detach(), coefficients.mean(0), atol=1e-4, rtol=0)
    factor = module.generator.factors[1, 0].detach()
    torch.testing.assert_close(factor @ factor.T, coefficients.T.cov(correction=0), atol=5e-3, rtol=0)


def test_rounds_after_the_search_are_averaged(tmp_path):
    """Equal releases, averaged, are as good as one of their joint share of the budget."""
    module, data = tiny_module(num_components=3, search_rounds=2), TinyData()
    own = callbacks_for(Gaussian(), neighboring_relation="add_or_remove_one", target_epsilon=1.0)
    trainer_for(tmp_path, own, 7).fit(module, datamodule=data)
    rounds, claim = module.rounds, own[1].claim()
    assert (claim.level, claim.num_releases) == ("PROVED", 7)
    assert 0.99 < claim.epsilon <= 1.0
    assert (rounds.num_done, rounds.num_averaged) == (7, 4)
    clean = table(rounds.statistics, data.train_images, data.train_labels, rounds.placement)
    single = Gaussian().noise_std(own[0].plan)
    assert (rounds.average - clean).std().item() == pytest.approx(single / 2, rel=0.3)
    assert torch.isfinite(module.generator.sample(10, seed=0)[0]).all()


def test_two_blobs_in_a_class_get_a_component_each(tmp_path):
    class Blobs(TinyData):
        def read(self):
            splits = super().read()
            splits.train_images[:] = torch.randint(0, 20, splits.train_images.shape, dtype=torch.uint8)
            splits.train_images[::4, :, :, :4] += 200  # half of class 0, whose records are the even ones
            splits.train_images[2::4, :, :, 4:] += 200
            return splits

    module = tiny_module(num_components=2, clip=100.0, cell_clip=100.0)
    trainer_for(tmp_path, callbacks_for(NoPrivacy()), 3).fit(module, datamodule=Blobs())
    images, _ = module.generator.sample(40, seed=0, labels=torch.zeros(40, dtype=torch.int64))
    bright = torch.stack([images[..., :4].mean((1, 2, 3)), images[..., 4:].mean((1, 2, 3))], dim=1)
    assert ((bright.amax(1) > 0.6) & (bright.amin(1) < 0.2)).all()
    assert 10 < (bright[:, 0] > 0.5).sum() < 30


def test_noisy_centres_stay_finite_and_far_ones_are_held():
    """Sums of squared distances stay whole numbers, wherever noise has thrown a centre."""
    statistics, data = tiny_statistics(2), TinyData()
    data.setup()
    placement = tiny_placement(2)
    placement.centres[0, 0], placement.centres[1, 1] = math.nan, 1e30
    cells, directions = statistics.directions(data.train_images, data.train_labels, placement)
    assert torch.isfinite(directions).all()
    assert directions.norm(dim=1).max() <= 1 + 1e-12
    assert not (cells == 3).any()


def test_unused_cells_take_no_records():
    statistics, data, placement = tiny_statistics(2), TinyData(), tiny_placement(2)
    data.setup()
    placement.in_use[0, 1] = placement.in_use[1, 0] = False
    cells, _ = statistics.directions(data.train_images, data.train_labels, placement)
    assert cells.unique().tolist() == [0, 3]


def test_the_codebook_is_public_and_spreads():
    means, covariances = (
        torch.zeros(2, 3).double(),
        torch.eye(3).double().expand(2, 3, 3) * torch.tensor([9.0, 1, 0.01]),
    )
    found = codebook(means, covariances, 2, torch.Generator().manual_seed(1))
    assert torch.equal(found, codebook(means, covariances, 2, torch.Generator().manual_seed(1)))
    assert (found[:, 0, 0] - found[:, 1, 0]).abs().min() > 3  # split along the widest direction


def test_the_rounds_serve_another_method_without_a_trainer():
    """What a warm start needs: rows out, a release in, parameters out."""
    generator, data = tiny_generator(), TinyData()
    data.setup()
    rounds = MomentsRounds(generator, clip=100.0, centre=1.0)
    clean = table(rounds.statistics, data.train_images, data.train_labels, rounds.placement)
    generator.load_state_dict(rounds.absorb(Released(clean, 0, _DOOR, 0.0), num_rounds=1))
    images, labels = generator.sample(500, seed=0)
    for label in range(2):
        real = data.train_images[data.train_labels == label].float().mean() / 255
        assert images[labels == label].mean() == pytest.approx(real.item(), abs=0.03)


def test_mechanisms_without_a_proof_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="no proof for statistic"):
        trainer_for(tmp_path, callbacks_for(TopAgg(top_k=4)), 1).fit(tiny_module(), datamodule=TinyData())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip": 0.0}, "clip > 0"),
        ({"centre": math.nan}, "finite centre"),
        ({"block_weights": (0.1, 0.0, 0.5)}, "block_weights > 0"),
        ({"block_weights": (0.5, 0.5)}, "three finite"),
        ({"chunk_size": 0}, "chunk_size >= 1"),
        ({"emphasis": 2.0}, "emphasis <= 1"),
        ({"search_rounds": -1}, "search_rounds >= 0"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigurationError, match=words):
        tiny_module(**options)


def test_data_that_do_not_fit_are_refused(tmp_path):
    module = MomentsModule(ClassGaussianGenerator((1, 8, 8), num_classes=3, num_coefficients=6))
    with pytest.raises(ConfigurationError, match="the data are"):
        trainer_for(tmp_path, callbacks_for(Gaussian()), 1).fit(module, datamodule=TinyData())


@pytest.mark.parametrize("law", ["rounded_gaussian", "discrete_gaussian"])
def test_its_sums_meet_exact_noise_where_it_is_asked_for(tmp_path, law):
    own = callbacks_for(Gaussian(noise=law), neighboring_relation="add_or_remove_one", target_epsilon=2.0)
    trainer_for(tmp_path, own, 2).fit(tiny_module(), datamodule=TinyData())
    assert [event.kind for event, _ in own[1].ledger.counts()] == [law]
    claim = own[1].claim()
    assert claim.level == "PROVED"
    assert not any("floating-point sampler" in text for text in claim.not_covered)

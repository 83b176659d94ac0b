import math

import pytest
import torch
from dp_accounting import NeighboringRelation
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_dp.accounting import Sampling, calibrate_noise_multiplier, compute_epsilon, max_releases, paper_epsilon
from lightning_dp.accounting.events import RoundedGaussianRelease
from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.base import ContributionSpec, ReleasePlan
from lightning_dp.mechanisms.gnmax import GNMax, _row_bits, public_normals, public_projections
from lightning_dp.mechanisms.noise import NoiseSource
from tests.contracts.mechanism import MechanismContract, context

REPLACE = NeighboringRelation.REPLACE_ONE
ZERO_OUT = NeighboringRelation.REPLACE_SPECIAL
FULL = Sampling(scheme="full")


class TestGNMaxPaper(MechanismContract):
    def make(self):
        return GNMax(max_value=0.5)


class TestGNMaxOddBins(MechanismContract):
    def make(self):
        return GNMax(
            num_projections=3, num_bins=7, max_value=2.0, threshold=0.0, threshold_noise_ratio=0.5, noise="gaussian"
        )


class TestGNMaxTestOnTheNoisyCounts(MechanismContract):
    def make(self):
        return GNMax(num_projections=4, num_bins=2, threshold_noise_ratio=None)


def test_exact_noise_needs_a_whole_ratio():
    with pytest.raises(ConfigurationError, match="needs a whole"):
        GNMax(threshold_noise_ratio=2.5)
    GNMax(threshold_noise_ratio=2.5, noise="gaussian")


class TestGNMaxFloatingPoint(MechanismContract):
    def make(self):
        return GNMax(max_value=0.5, noise="gaussian")


class TestGNMaxDiscreteOnTheNoisyCounts(MechanismContract):
    def make(self):
        return GNMax(num_projections=4, num_bins=2, threshold_noise_ratio=None, noise="discrete_gaussian")


def teachers(num_teachers: int = 10, q: int = 1, d: int = 8) -> ContributionSpec:
    return ContributionSpec.teachers(num_teachers=num_teachers, vectors_per_row=q, vector_dim=d)


def encode(mechanism, rows, **kwargs):
    rows = torch.as_tensor(rows)
    return mechanism.encode(rows, teachers(q=rows.shape[1], d=rows.shape[2]), context(len(rows), **kwargs))


def projections(d: int, m: int, q: int, number: int = 1) -> torch.Tensor:
    return public_projections(d, m, public_seed=3, release_number=number, vectors=range(q))


def released(mechanism, rows, std=1e-9):
    """The release with hardly any noise: a thought experiment for known answers."""
    rows = torch.as_tensor(rows)
    spec = teachers(num_teachers=rows.shape[0], q=rows.shape[1], d=rows.shape[2])
    noise_multiplier = std / mechanism.l2_sensitivity(spec, REPLACE)
    plan = ReleasePlan(spec=spec, relation=REPLACE, noise_multiplier=noise_multiplier)
    total = mechanism.encode(rows, spec, context(len(rows))).sum(0, dtype=torch.int32)
    return mechanism.release(total, plan, NoiseSource(), release_number=1, public_seed=3)


def test_ten_bins_of_the_paper():
    """Centres +-{1, 3, 5, 7, 9} 1e-5, no bin at zero (teacher_gans 7.3, known answer 11)."""
    expected = torch.tensor([-9, -7, -5, -3, -1, 1, 3, 5, 7, 9]) * 1e-5
    torch.testing.assert_close(GNMax().bin_centres(), expected.double())


def test_values_fall_into_the_bin_whose_centre_is_nearest_and_beyond_the_ends_into_the_last():
    mechanism = GNMax(num_projections=6, max_value=0.3)
    rows = torch.randn(400, 2, 8, dtype=torch.float64) * 0.2
    values = torch.einsum("nqd,qdm->nqm", rows, projections(8, 6, 2)).clamp(-0.3, 0.3)
    votes = encode(mechanism, rows).unflatten(-1, (6, 10))
    assert (votes.sum(-1) == 1).all()
    assert values.abs().max() == 0.3  # some are beyond the ends
    chosen = mechanism.bin_centres()[votes.argmax(-1)]
    assert (values - chosen).abs().max() <= 0.03 + 1e-12


def test_projections_are_public_fresh_and_unbiased():
    assert torch.equal(projections(8, 3, 4), projections(8, 3, 4))
    assert torch.equal(
        projections(8, 3, 4)[2:], public_projections(8, 3, public_seed=3, release_number=1, vectors=range(2, 4))
    )
    assert (projections(8, 3, 4)[0] - projections(8, 3, 4)[1]).abs().max() > 0.1
    assert (projections(8, 3, 4) - projections(8, 3, 4, number=2)).abs().min() > 0
    many = projections(5, 4, 20_000)
    mean = torch.einsum("qdm,qem->de", many, many) / len(many)
    torch.testing.assert_close(mean, torch.eye(5, dtype=torch.float64), atol=5 / 20_000**0.5, rtol=0)


@pytest.mark.parametrize("dim", [5, 784, 12_288])
def test_projections_are_summed_exactly(dim):
    """Against Python's integers: a sum that rounds would depend on the number of rows, and tip votes with them."""
    rows = torch.randn(4, 1, dim, dtype=torch.float64)
    rows[0] *= 1e6  # every entry at the limit of its range
    bits = _row_bits(dim)
    assert bits >= 10
    normals = public_normals(dim, 2, public_seed=3, release_number=1, vectors=range(1))
    limit = 2 ** (9 + bits)
    whole = [[max(-limit, min(limit, round(v * 2**bits))) for v in row] for row in rows[:, 0].tolist()]
    columns = [[int(v) for v in column] for column in normals[0].T.tolist()]
    sums = [[sum(v * w for v, w in zip(row, column, strict=True)) for column in columns] for row in whole]
    assert max(abs(v) for row in whole for v in row) * dim * 8 * 2**15 < 2**53
    values = torch.tensor(sums, dtype=torch.float64) * 2.0 ** -(bits + 15) / math.sqrt(2)
    expected = ((values + 1) * 5).floor().clamp(0, 9)
    votes = encode(GNMax(num_projections=2, max_value=1.0), rows).unflatten(-1, (2, 10))
    assert torch.equal(votes.argmax(-1)[:, 0].double(), expected)
    exact = torch.einsum("nd,dm->nm", torch.tensor(whole, dtype=torch.float64), normals[0])
    assert exact.long().tolist() == sums


def test_encoding_meets_the_projections_that_decoding_uses():
    """A chunk that starts at a later image is projected by the matrices of these images."""
    mechanism, rows = GNMax(max_value=1.0), torch.randn(3, 4, 8)
    whole = encode(mechanism, rows)
    later = context(3)
    object.__setattr__(later, "first_vector", 2)
    assert torch.equal(whole[:, 2:], mechanism.encode(rows[:, 2:], teachers(q=4), later))


def test_unanimous_teachers_without_noise_answer_the_bin_centres_of_their_projections():
    row = torch.randn(1, 3, 8, dtype=torch.float64) * 0.1
    mechanism = GNMax(num_projections=5, max_value=0.4)
    values = torch.einsum("nqd,qdm->qm", row, projections(8, 5, 3)).clamp(-0.4, 0.4)
    centres = mechanism.bin_centres()
    answers = centres[(values[..., None] - centres).abs().argmin(-1)]
    expected = torch.einsum("qm,qdm->qd", answers, projections(8, 5, 3))
    torch.testing.assert_close(released(mechanism, row.expand(7, 3, 8)), expected.float())


@pytest.mark.parametrize("ratio", [3.0, None])
def test_coordinates_without_agreement_are_not_answered(ratio):
    row = torch.randn(1, 1, 8, dtype=torch.float64)
    agreed = GNMax(threshold=1.0, threshold_noise_ratio=ratio)
    assert released(agreed, torch.cat([row, -row])).abs().max() == 0
    answered = released(GNMax(threshold=0.4, threshold_noise_ratio=ratio), torch.cat([row, -row]))
    assert answered.abs().max() > 0


@pytest.mark.parametrize(("share", "passes"), [(0.1, 0.2969), (0.5, 0.5), (1.0, 0.7475)])
def test_chance_that_a_coordinate_is_answered(share, passes):
    """1 - Phi((threshold - share) T / s1): teacher_gans 1.5 gives 0.30, 0.5 and 0.75 at s1 = 3000, T = 4000."""
    mechanism, spec = GNMax(), teachers(num_teachers=4000, q=15, d=784)
    plan = ReleasePlan(spec=spec, relation=REPLACE, noise_multiplier=1000 / mechanism.l2_sensitivity(spec, REPLACE))
    counts = torch.full((2000, 10, 10), int(4000 * (1 - share) / 9), dtype=torch.int32)
    counts[..., 4] = int(4000 * share)
    seen = []
    original = GNMax.decode
    try:
        GNMax.decode = lambda self, noisy, *rest: seen.append(noisy) or noisy
        mechanism.release(counts.flatten(1), plan, NoiseSource(insecure_seed=1), release_number=1, public_seed=0)
    finally:
        GNMax.decode = original
    largest = seen[0][:, 100:] * 3
    assert stats.norm.sf((0.5 - share) * 4000 / 3000) == pytest.approx(passes, abs=1e-4)
    assert (largest >= 2000).double().mean().item() == pytest.approx(passes, abs=5 * 0.5 / largest.numel() ** 0.5)
    # Two noises, in the ratio of the paper: the counts have 1000, their maximum 3000.
    assert seen[0][:, :100].sub(counts.flatten(1)).std().item() == pytest.approx(1000, rel=0.01)
    assert largest.sub(counts.amax(-1)).std().item() == pytest.approx(3000, rel=0.03)


def test_zero_and_non_finite_rows_abstain():
    rows = torch.randn(4, 2, 8)
    rows[1, 0] = 0
    rows[2, 1, 3] = math.nan
    rows[3, 0, 5] = -math.inf
    counted = encode(GNMax(), rows).sum(-1)
    assert counted.tolist() == [[10, 10], [0, 10], [10, 0], [0, 10]]
    assert encode(GNMax(), torch.tensor([[[1.7e308, -1.7e308] * 4]], dtype=torch.float64)).sum() == 10


class TestPrice:
    """The published settings, charged without looking at the votes (teacher_gans 2.2 and 7.3.11)."""

    def event(self, *, num_teachers, images, counts_std, test_std):
        mechanism = GNMax(threshold_noise_ratio=test_std / counts_std)
        spec = teachers(num_teachers=num_teachers, q=images, d=784)
        noise_multiplier = counts_std / math.sqrt(images * 10 * (2 + (counts_std / test_std) ** 2))
        plan = ReleasePlan(spec=spec, relation=REPLACE, noise_multiplier=noise_multiplier)
        event = mechanism.step_event(plan)
        assert type(event) is RoundedGaussianRelease
        assert event.noise_std == pytest.approx(counts_std)
        per_query = 1 / test_std**2 + 2 / counts_std**2
        assert event.mu**2 == pytest.approx(images * 10 * per_query)
        return event

    @pytest.mark.parametrize(
        ("epsilon", "setting", "official", "exact", "per_step"),
        [
            (1.0, {"num_teachers": 4000, "images": 15, "counts_std": 1000, "test_std": 3000}, 131, 226, 1.583e-4),
            (10.0, {"num_teachers": 2000, "images": 30, "counts_std": 100, "test_std": 600}, 50, 65, 3.04e-2),
        ],
    )
    def test_releases_within_the_budget(self, epsilon, setting, official, exact, per_step):
        event = self.event(**setting)
        assert event.mu**2 / 2 == pytest.approx(per_step, rel=1e-3)
        for count, within in ((official, True), (official + 1, False)):
            assert (paper_epsilon({(event, FULL): count}, delta=1e-5) <= epsilon) is within
        allowed = max_releases(
            event=event, sampling=FULL, target_epsilon=epsilon, target_delta=1e-5, relation="replace_one"
        )
        assert allowed == exact

    def test_noise_is_calibrated_for_any_length(self):
        mechanism, spec = GNMax(), teachers(num_teachers=4000, q=15, d=784)

        def event(noise_multiplier):
            return mechanism.step_event(ReleasePlan(spec=spec, relation=REPLACE, noise_multiplier=noise_multiplier))

        noise = calibrate_noise_multiplier(
            target_epsilon=1.0,
            target_delta=1e-5,
            num_releases=226,
            make_event=event,
            sampling=FULL,
            relation="replace_one",
        )
        assert 990 < event(noise).noise_std <= 1000  # 226 releases of the paper's noise do not quite spend it
        spent = compute_epsilon({(event(noise), FULL): 226}, delta=1e-5, relation="replace_one")
        assert spent.epsilon == pytest.approx(1.0, rel=1e-4)
        assert spent.accountant == "gaussian"

    def test_testing_the_noisy_counts_saves_the_share_of_the_test(self):
        spec = teachers(q=15)
        with_test, without = GNMax(), GNMax(threshold_noise_ratio=None)
        saved = 1 - (without.l2_sensitivity(spec, REPLACE) / with_test.l2_sensitivity(spec, REPLACE)) ** 2
        assert saved == pytest.approx(1 / (1 + 2 * 3.0**2))


class TestClassWiseSensitivity:
    """An independent teacher per (shard, label) that votes only on the images of its own label: by brute force."""

    @settings(max_examples=60, deadline=None)
    @given(data=st.data(), single=st.booleans(), relation=st.sampled_from([REPLACE, ZERO_OUT]))
    def test_no_neighbour_moves_counts_and_maxima_further_than_claimed(self, data, single, relation):
        num_classes, per_class, d, shards = 3, 2, 5, 3
        draw = lambda high: data.draw(st.integers(0, high))  # noqa: E731
        mechanism = GNMax(num_projections=2, num_bins=3, max_value=1.0, threshold_noise_ratio=1.0)
        labels = [[draw(num_classes - 1) for _ in range(1 if single else 3)] for _ in range(shards)]
        seeds = [[draw(10**6) for _ in row] for row in labels]
        spec = ContributionSpec.class_wise_teachers(
            num_teachers=shards,
            num_classes=num_classes,
            images_per_class=per_class,
            vector_dim=d,
            single_record=single,
        )
        before = self.measured(mechanism, labels, seeds, num_classes, per_class, d, spec)
        t = draw(shards - 1)
        r = draw(len(labels[t]) - 1)
        labels[t][r] = None if relation is ZERO_OUT else draw(num_classes - 1)
        seeds[t][r] = draw(10**6)
        after = self.measured(mechanism, labels, seeds, num_classes, per_class, d, spec)
        assert (before - after).norm().item() <= mechanism.l2_sensitivity(spec, relation) + 1e-9

    @staticmethod
    def measured(mechanism, labels, seeds, num_classes, per_class, d, spec):
        total = torch.zeros(num_classes, per_class, mechanism.encoded_dim(spec), dtype=torch.float64)
        for shard, (shard_labels, shard_seeds) in enumerate(zip(labels, seeds, strict=True)):
            for label in range(num_classes):
                mine = [s for s, y in zip(shard_seeds, shard_labels, strict=True) if y == label]
                if mine:
                    generator = torch.Generator().manual_seed(hash((shard, label, *mine)) % 2**31)
                    rows = torch.randn(1, per_class, d, generator=generator)
                    total[label] += mechanism.encode(rows, spec, context(1))[0].double()
        return mechanism.measure(total.flatten(0, 1), spec)

    def test_alternatives_of_each_relation(self):
        """q m (2 + 1/r^2) for a changed row, q m (1 + 1/r^2) for one that appears; squares add over rows."""
        make, common = ContributionSpec.class_wise_teachers, {"num_classes": 3, "images_per_class": 2, "vector_dim": 5}
        mechanism = GNMax(num_projections=4, threshold_noise_ratio=0.5, noise="gaussian")  # 1 / r^2 = 4
        shared = make(num_teachers=3, single_record=False, **common)
        single = make(num_teachers=3, single_record=True, **common)
        assert mechanism.l2_sensitivity(shared, REPLACE) ** 2 == pytest.approx(2 * 8 * 6)
        assert mechanism.l2_sensitivity(shared, ZERO_OUT) ** 2 == pytest.approx(8 * 6)
        assert mechanism.l2_sensitivity(single, REPLACE) ** 2 == pytest.approx(2 * 8 * 5)
        assert mechanism.l2_sensitivity(single, ZERO_OUT) ** 2 == pytest.approx(8 * 5)

    def test_the_worst_case_is_reached_and_a_forgotten_maximum_is_caught(self):
        """One vote moved into the leading bin of another: sqrt(2 + 1/r^2), above the sqrt 2 of the counts alone."""
        mechanism, spec = GNMax(num_projections=1, num_bins=3, threshold_noise_ratio=0.5, noise="gaussian"), teachers()
        votes = torch.eye(3, dtype=torch.float64)
        others = 5 * votes[0]
        moved = mechanism.measure(others + votes[0], spec) - mechanism.measure(others + votes[1], spec)
        assert moved.norm().item() == pytest.approx(mechanism.l2_sensitivity(spec, REPLACE))
        counts_only = GNMax(num_projections=1, num_bins=3, threshold_noise_ratio=None)
        assert moved.norm().item() > 1.5 * counts_only.l2_sensitivity(spec, REPLACE)


def test_the_votes_of_a_run_spend_what_was_planned_through_the_module(run_tiny):
    _, privatizer, accountant, _ = run_tiny(mechanism=GNMax(num_projections=3, max_value=1.0, threshold=0.1))
    assert len(accountant.ledger) == 5
    (event,) = {event for event, _ in accountant.ledger.counts()}
    assert event == privatizer.mechanism.step_event(privatizer.plan)
    assert accountant.claim().epsilon == pytest.approx(5.0, rel=1e-3)


def test_records_are_refused_in_words():
    with pytest.raises(ConfigurationError, match="no proof for record"):
        GNMax().check(ContributionSpec.records(expected_batch_size=4, vector_dim=7))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_projections": 0}, "num_projections >= 1"),
        ({"num_bins": 1}, "num_bins >= 2"),
        ({"max_value": 0.0}, "max_value > 0"),
        ({"max_value": math.nan}, "max_value > 0"),
        ({"threshold": 1.5}, "threshold <= 1"),
        ({"threshold": -0.1}, "threshold <= 1"),
        ({"threshold_noise_ratio": 0.0}, "threshold_noise_ratio > 0"),
        ({"threshold_noise_ratio": math.inf}, "threshold_noise_ratio > 0"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigurationError, match=words):
        GNMax(**options)


def test_unanswered_coordinates_are_not_refunded():
    """The price takes no count and no threshold: whether a coordinate is answered changes nothing."""
    events = set()
    for threshold in (0.0, 0.5, 1.0):
        mechanism = GNMax(threshold=threshold)
        plan = ReleasePlan(spec=teachers(), relation=NeighboringRelation.REPLACE_ONE, noise_multiplier=3.0)
        events.add(mechanism.step_event(plan))
    assert len(events) == 1

import itertools
import math

import numpy as np
import pytest
import torch
from dp_accounting import NeighboringRelation
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.events import RoundedGaussianRelease, RoundedTernaryRelease, Sampling, TernaryRelease
from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.base import ContributionSpec, ReleasePlan
from lightning_dp.mechanisms.noise import NoiseSource
from lightning_dp.mechanisms.topagg import TopAgg, keyed_uniform, public_rotation
from tests.contracts.mechanism import MechanismContract, context

REPLACE = NeighboringRelation.REPLACE_ONE
ZERO_OUT = NeighboringRelation.REPLACE_SPECIAL


def teachers(num_teachers: int = 10, q: int = 1, d: int = 8) -> ContributionSpec:
    return ContributionSpec.teachers(num_teachers=num_teachers, vectors_per_row=q, vector_dim=d)


class TestTopAggSigns(MechanismContract):
    def make(self):
        return TopAgg(top_k=5, output="votes")


class TestTopAggStochastic(MechanismContract):
    def make(self):
        return TopAgg(top_k=5, votes="stochastic", max_value=0.5, output="votes")


class TestTopAggRotatedDense(MechanismContract):
    def make(self):
        return TopAgg(top_k=16, rotate=True, output="votes")


class TestTopAggFloatingPoint(MechanismContract):
    def make(self):
        return TopAgg(top_k=5, output="votes", noise="gaussian")


class TestTopAggDiscreteGaussian(MechanismContract):
    def make(self):
        return TopAgg(top_k=5, output="votes", noise="discrete_gaussian")


def encode(mechanism, rows, **kwargs):
    rows = torch.as_tensor(rows, dtype=torch.float32)
    spec = teachers(q=rows.shape[1], d=rows.shape[2])
    return mechanism.encode(rows, spec, context(len(rows), **kwargs))


def test_votes_are_ternary_with_exactly_k_nonzero_entries():
    votes = encode(TopAgg(top_k=3), torch.randn(50, 4, 8))
    assert set(votes.unique().tolist()) <= {-1, 0, 1}
    assert (votes.ne(0).sum(-1) == 3).all()
    assert votes.dtype == torch.int8


def test_brute_force_sensitivity_of_a_vote_is_twice_the_root_of_k():
    """d = 8, k = 3: 3.4641 = 2 sqrt(3), over all pairs of supports and signs."""
    d, k = 8, 3
    rows = []
    for support in itertools.combinations(range(d), k):
        for signs in itertools.product((-1, 1), repeat=k):
            row = torch.zeros(d)
            row[list(support)] = torch.tensor(signs, dtype=torch.float32)
            rows.append(row)
    votes = encode(TopAgg(top_k=k), torch.stack(rows)[:, None]).flatten(1).double()
    worst = torch.cdist(votes, votes).max().item()
    assert worst == pytest.approx(2 * math.sqrt(3), abs=1e-9)
    assert TopAgg(top_k=k).l2_sensitivity(teachers(d=d), REPLACE) == pytest.approx(worst)


def test_sensitivity_over_a_batch_has_the_factor_of_its_size():
    mechanism = TopAgg(top_k=200)
    spec = teachers(num_teachers=4000, q=15, d=784)
    assert mechanism.l2_sensitivity(spec, REPLACE) == pytest.approx(2 * math.sqrt(200 * 15))
    # DataLens MNIST at epsilon 1: noise std 5000 is RDP(alpha) = 1.6e-5 alpha per image, 2.4e-4 per step.
    plan = ReleasePlan(spec=spec, relation=REPLACE, noise_multiplier=5000 / (2 * math.sqrt(3000)))
    event = mechanism.step_event(plan)
    assert event.noise_std == pytest.approx(5000)
    assert event.mu**2 / 2 == pytest.approx(2.4e-4)


def test_zero_and_non_finite_rows_abstain():
    rows = torch.zeros(3, 1, 8)
    rows[1, 0, 2] = math.nan
    rows[2, 0, 3] = math.inf
    for votes in ("sign", "stochastic"):
        assert encode(TopAgg(top_k=4, votes=votes), rows).abs().sum() == 0


def test_expected_stochastic_vote_is_the_clipped_scaled_value():
    values = torch.tensor([0.0, 0.1, -0.25, 0.5, -2.0, 1.0, 0.3, -0.7])
    num = 40_000
    for cap, scale in ((1.0, 1.0), (None, 2.0)):
        mechanism = TopAgg(top_k=8, votes="stochastic", max_value=cap)
        votes = encode(mechanism, values.expand(num, 1, 8))
        expected = (values / scale).clamp(-1, 1)
        torch.testing.assert_close(votes.double().mean(0)[0].float(), expected, atol=5 / num**0.5, rtol=0)
        if cap is not None:
            assert (votes[:, 0, 4] == -1).all()  # beyond the cap: deterministic
            assert (votes[:, 0, 5] == 1).all()


def test_signs_ignore_positive_scaling_of_a_teacher():
    rows = torch.randn(20, 2, 8)
    scales = torch.rand(20, 1, 1) * 100 + 1e-3
    assert torch.equal(encode(TopAgg(top_k=3), rows), encode(TopAgg(top_k=3), rows * scales))
    stochastic = TopAgg(top_k=3, votes="stochastic")
    assert torch.equal(encode(stochastic, rows), encode(stochastic, rows * 2.0**7))


def noiseless(mechanism, rows):
    """The released direction without noise: a thought experiment for known answers, never a release."""
    rows = torch.as_tensor(rows, dtype=torch.float32)
    spec = teachers(num_teachers=rows.shape[0], q=rows.shape[1], d=rows.shape[2])
    plan = ReleasePlan(spec=spec, relation=REPLACE, noise_multiplier=1.0)
    total = mechanism.encode(rows, spec, context(len(rows))).sum(0, dtype=torch.int32).double()
    return mechanism.decode(total, plan, 1, 3)


def test_one_teacher_without_noise_gives_its_signs():
    rows = torch.randn(1, 2, 8)
    torch.testing.assert_close(noiseless(TopAgg(top_k=8), rows), rows[0].sign().double())


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.99])
def test_unanimous_teachers_pass_every_threshold_on_their_common_top_k(threshold):
    row = torch.tensor([3.0, -2.0, 1.0, 0.5, -0.1, 0.05, 0.01, 0.0])
    released = noiseless(TopAgg(top_k=3, threshold=threshold), row.expand(7, 1, 8))
    assert released[0].tolist() == [1, -1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("num_teachers", "beta", "std", "kept"), [(4000, 0.7, 5000, 0.5755), (4000, 0.2, 800, 0.3173)])
def test_share_of_coordinates_without_votes_that_pass_the_threshold(num_teachers, beta, std, kept):
    """2 Phi(-beta T / std): teacher_gans, known answer 7. Noise must cover coordinates without a single vote."""
    mechanism = TopAgg(top_k=200, threshold=beta)
    spec = teachers(num_teachers=num_teachers, q=15, d=784)
    plan = ReleasePlan(spec=spec, relation=REPLACE, noise_multiplier=std / mechanism.l2_sensitivity(spec, REPLACE))
    total = torch.zeros(128, 784, dtype=torch.int32)
    released = mechanism.release(total, plan, NoiseSource(insecure_seed=1), release_number=1, public_seed=0)
    assert 2 * stats.norm.cdf(-beta * num_teachers / std) == pytest.approx(kept, abs=5e-5)
    assert released.abs().mean().item() == pytest.approx(kept, abs=5 * 0.5 / total.numel() ** 0.5)


def test_rotation_is_orthonormal_public_and_fresh_per_release():
    first, again, second = public_rotation(16, 3, 1), public_rotation(16, 3, 1), public_rotation(16, 3, 2)
    torch.testing.assert_close(first @ first.T, torch.eye(16, dtype=torch.float64))
    assert torch.equal(first, again)
    assert (first - second).abs().max() > 0.1


def test_rotated_votes_point_along_the_gradient_on_average():
    direction = torch.tensor([[[1.0, -2.0, 0.5, 0.0]]])
    mechanism = TopAgg(top_k=4, rotate=True, output="votes")
    spec = teachers(num_teachers=1, d=4)
    plan = ReleasePlan(spec=spec, relation=REPLACE, noise_multiplier=1.0)
    total = torch.zeros(1, 4, dtype=torch.float64)
    for number in range(1, 801):
        basis = mechanism.public_basis(spec, release_number=number, public_seed=3)
        rotated = (direction.double() @ basis).float()
        votes = mechanism.encode(rotated, spec, context(1, release_number=number))
        total += mechanism.decode(votes.sum(0, dtype=torch.int32).double(), plan, number, 3)
    cosine = torch.nn.functional.cosine_similarity(total, direction[0].double())
    assert cosine.item() > 0.995


class TestCoins:
    def test_do_not_depend_on_chunks_or_neighbours(self):
        shape = torch.Size((6, 2, 4))
        ids = torch.tensor([5, 9, 0, 2_000_000, 7, 1])
        whole = keyed_uniform(shape, seed=11, row_ids=ids, first_vector=3)
        alone = keyed_uniform(torch.Size((1, 2, 4)), seed=11, row_ids=ids[3:4], first_vector=3)
        assert torch.equal(whole[3:4], alone)
        later = keyed_uniform(torch.Size((6, 1, 4)), seed=11, row_ids=ids, first_vector=4)
        assert torch.equal(whole[:, 1:], later)

    def test_are_uniform_and_uncorrelated(self):
        coins = keyed_uniform(torch.Size((400, 5, 50)), seed=4, row_ids=torch.arange(400), first_vector=0)
        assert stats.kstest(coins.flatten().double().numpy(), "uniform").pvalue > 1e-4
        flat = coins.flatten(1).double()
        off_diagonal = torch.corrcoef(flat[:50]) - torch.eye(50, dtype=torch.float64)
        assert off_diagonal.abs().max() < 6 / flat.shape[1] ** 0.5
        other = keyed_uniform(torch.Size((400, 5, 50)), seed=5, row_ids=torch.arange(400), first_vector=0)
        assert abs(np.corrcoef(coins.flatten(), other.flatten())[0, 1]) < 5 / coins.numel() ** 0.5

    def test_counter_overflow_is_refused(self):
        with pytest.raises(ValueError, match="at most"):
            keyed_uniform(torch.Size((1, 4097, 4)), seed=0, row_ids=torch.arange(1), first_vector=0)


class TestTernaryCharge:
    def plan(self, mechanism, relation=REPLACE):
        spec = teachers(num_teachers=4000, q=15, d=784)
        std = 5000 / mechanism.l2_sensitivity(spec, relation)
        return ReleasePlan(spec=spec, relation=relation, noise_multiplier=std)

    def test_event_counts_the_coordinates_that_a_neighbour_moves(self):
        mechanism = TopAgg(top_k=200, threshold=0.7, charge="ternary", noise="gaussian")
        event = mechanism.step_event(self.plan(mechanism))
        assert type(event) is TernaryRelease
        assert event.threshold == pytest.approx(2800)
        assert event.max_abs_vote == 4000
        assert set(event.changes) == {(3000, 0), (0, 6000)}

    def test_gaussian_charge_is_the_default(self):
        mechanism = TopAgg(top_k=200, threshold=0.7)
        assert type(mechanism.step_event(self.plan(mechanism))) is RoundedGaussianRelease

    def test_noise_is_drawn_in_whole_votes_unless_told_otherwise(self):
        """At the price of the Gaussian, to the last bit."""
        plan = self.plan(TopAgg(top_k=200))
        exact, floating = (TopAgg(top_k=200, **chosen).step_event(plan) for chosen in ({}, {"noise": "gaussian"}))
        assert (exact.is_exact, floating.is_exact) == (True, False)
        assert (exact.noise_std, exact.l2_sensitivity) == (floating.noise_std, floating.l2_sensitivity)
        epsilons = [
            compute_epsilon({(event, Sampling(scheme="full")): 100}, delta=1e-5, relation=REPLACE).epsilon
            for event in (exact, floating)
        ]
        assert epsilons[0] == epsilons[1]

    def test_only_the_ternary_vector_leaves(self):
        mechanism = TopAgg(top_k=200, threshold=0.7, charge="ternary")
        total = torch.randint(-4000, 4000, (15, 784), dtype=torch.int32)
        released = mechanism.release(total, self.plan(mechanism), NoiseSource(), release_number=1, public_seed=0)
        assert set(released.unique().tolist()) <= {-1.0, 0.0, 1.0}

    @pytest.mark.parametrize("threshold", [0.0, 0.7, 0.70001])
    def test_rounded_noise_moves_the_threshold_by_half_a_vote(self, threshold):
        """What is charged is the channel that is released: its symbols' shares over votes without a teacher."""
        mechanism = TopAgg(top_k=2, threshold=threshold, charge="ternary", noise="rounded_gaussian")
        spec = teachers(num_teachers=20, q=1, d=100)
        plan = ReleasePlan(spec=spec, relation=REPLACE, noise_multiplier=10.0)
        event = mechanism.step_event(plan)
        assert isinstance(event, RoundedTernaryRelease)
        assert event.is_exact
        assert event.threshold == math.floor(threshold * 20) + 0.5
        total = torch.zeros(2000, 100, dtype=torch.int32)
        released = mechanism.release(total, plan, NoiseSource(insecure_seed=1), release_number=1, public_seed=0)
        share = released.abs().double().mean().item()
        expected = 2 * stats.norm.sf(event.threshold / event.noise_std)
        assert abs(share - expected) < 5 * 0.5 / 200_000**0.5
        without_the_half = 2 * stats.norm.sf(threshold * 20 / event.noise_std)
        assert abs(share - without_the_half) > 5 * 0.5 / 200_000**0.5 or threshold == 0.70001

    def test_the_discrete_law_has_no_ternary_curve(self):
        with pytest.raises(ConfigurationError, match="use rounded_gaussian"):
            TopAgg(charge="ternary", noise="discrete_gaussian")

    def test_refused_where_more_would_leave(self):
        with pytest.raises(ConfigurationError, match="output=votes releases"):
            TopAgg(output="votes", charge="ternary")


class TestClassWiseSensitivity:
    """An independent teacher per (shard, label) that votes only on the images of its own label: by brute force."""

    @settings(max_examples=60, deadline=None)
    @given(data=st.data(), single=st.booleans(), relation=st.sampled_from([REPLACE, ZERO_OUT]))
    def test_no_neighbour_moves_the_votes_further_than_claimed(self, data, single, relation):
        num_classes, per_class, d, k, shards = 3, 2, 5, 2, 3
        sizes = [1 if single else 3] * shards
        draw = lambda high: data.draw(st.integers(0, high))  # noqa: E731
        labels = [[draw(num_classes - 1) for _ in range(size)] for size in sizes]
        seeds = [[draw(10**6) for _ in range(size)] for size in sizes]
        spec = ContributionSpec.class_wise_teachers(
            num_teachers=shards,
            num_classes=num_classes,
            images_per_class=per_class,
            vector_dim=d,
            single_record=single,
        )
        mechanism = TopAgg(top_k=k)
        before = self.total(mechanism, labels, seeds, num_classes, per_class, d, spec)
        t, r = draw(shards - 1), draw(sizes[0] - 1)
        labels[t][r] = None if relation is ZERO_OUT else draw(num_classes - 1)
        seeds[t][r] = draw(10**6)
        after = self.total(mechanism, labels, seeds, num_classes, per_class, d, spec)
        moved = torch.linalg.vector_norm((before - after).double()).item()
        assert moved <= mechanism.l2_sensitivity(spec, relation) + 1e-9

    @staticmethod
    def total(mechanism, labels, seeds, num_classes, per_class, d, spec):
        """Sum of votes where a teacher's gradient is an arbitrary function (a hash) of all its records."""
        total = torch.zeros(num_classes, per_class, d, dtype=torch.int32)
        for shard, (shard_labels, shard_seeds) in enumerate(zip(labels, seeds, strict=True)):
            for label in range(num_classes):
                mine = [s for s, y in zip(shard_seeds, shard_labels, strict=True) if y == label]
                if not mine:
                    continue
                generator = torch.Generator().manual_seed(hash((shard, label, *mine)) % 2**31)
                rows = torch.randn(1, per_class, d, generator=generator)
                total[label] += mechanism.encode(rows, spec, context(1))[0].int()
        return total

    def test_the_worst_case_is_reached(self):
        """A claim of half the square (one teacher only) would be broken by a record that changes its label."""
        k, per_class, d = 2, 2, 5
        mechanism = TopAgg(top_k=k)
        make = ContributionSpec.class_wise_teachers
        common = {"num_classes": 3, "images_per_class": per_class, "vector_dim": d}
        shared = make(num_teachers=3, single_record=False, **common)
        single = make(num_teachers=3, single_record=True, **common)
        row = torch.randn(1, per_class, d)
        vote = mechanism.encode(row, shared, context(1)).double()
        flipped_old, flipped_new = 2 * vote, 2 * vote  # both teachers flip every vote, on disjoint images
        moved = torch.linalg.vector_norm(torch.cat([flipped_old, flipped_new])).item()
        assert moved == pytest.approx(mechanism.l2_sensitivity(shared, REPLACE))
        assert moved == pytest.approx(math.sqrt(8 * k * per_class))
        assert moved > mechanism.l2_sensitivity(single, REPLACE)
        assert mechanism.l2_sensitivity(single, REPLACE) == pytest.approx(math.sqrt(4 * k * per_class))
        assert mechanism.l2_sensitivity(single, ZERO_OUT) == pytest.approx(math.sqrt(k * per_class))
        assert mechanism.l2_sensitivity(shared, ZERO_OUT) == pytest.approx(math.sqrt(4 * k * per_class))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 0}, "top_k >= 1"),
        ({"threshold": 1.0}, "threshold < 1"),
        ({"threshold": -0.1}, "threshold < 1"),
        ({"max_value": -1.0, "votes": "stochastic"}, "max_value > 0"),
        ({"max_value": math.nan, "votes": "stochastic"}, "max_value > 0"),
        ({"max_value": 1.0}, "no effect"),
        ({"threshold": 0.5, "output": "votes"}, "no effect"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigurationError, match=words):
        TopAgg(**options)


def test_more_votes_than_coordinates_are_refused():
    with pytest.raises(ConfigurationError, match="top_k <= 8"):
        TopAgg(top_k=9).check(teachers(d=8))

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.poisson import PoissonSampler
from tests.contracts.sampler import cross_z, masks, statistics

RECORDS, RATE, STEPS = 1000, 0.05, 400
LIMIT = 5.0  # of a standard normal: a false alarm in 1e6


class Shuffled:
    """The broken twin: passes over shuffled records in batches of fixed size, as every ordinary loader makes them."""

    def __init__(self, seed: int = 0) -> None:
        self._stream = np.random.default_rng(seed)
        self._batches: list[np.ndarray] = []

    def draw(self) -> torch.Tensor:
        if not self._batches:
            self._batches = np.split(self._stream.permutation(RECORDS), round(1 / RATE))
        return torch.from_numpy(self._batches.pop())


class FixedSize:
    """The broken twin: batches of fixed size, drawn anew at each step."""

    def __init__(self) -> None:
        self._stream = np.random.default_rng(0)

    def draw(self) -> torch.Tensor:
        return torch.from_numpy(self._stream.choice(RECORDS, round(RECORDS * RATE), replace=False))


class Capped(PoissonSampler):
    """The broken twin: cuts batches that would not fit."""

    def draw(self) -> torch.Tensor:
        return super().draw()[: round(RECORDS * RATE)]


class SkipsEmpty(PoissonSampler):
    """The broken twin: draws again until somebody joins."""

    def draw(self) -> torch.Tensor:
        while not len(found := super().draw()):
            pass
        return found


def sampler(seed: int | None = None) -> PoissonSampler:
    return PoissonSampler(RECORDS, RATE, insecure_seed=seed)


def test_a_poisson_sampler_passes_every_statistic():
    found = statistics(masks(sampler(), RECORDS, STEPS), RATE)
    assert all(abs(z) < LIMIT for z in found.values()), found


@pytest.mark.parametrize(
    ("twin", "caught_by"),
    [
        (Shuffled(), {"batch_variance", "record_variance", "repeat"}),
        (FixedSize(), {"batch_variance"}),
        (Capped(RECORDS, RATE), {"rate", "batch_variance"}),
        (PoissonSampler(RECORDS, 1.1 * RATE), {"rate"}),
    ],
    ids=["shuffled", "fixed size", "capped", "wrong rate"],
)
def test_imitations_are_caught(twin, caught_by):
    found = statistics(masks(twin, RECORDS, STEPS), RATE)
    assert {name for name, z in found.items() if abs(z) > LIMIT} >= caught_by, found


def test_two_samplers_share_no_coins():
    """What a resumed run, or another rank, would draw: a new stream."""
    first, second = masks(sampler(), RECORDS, STEPS), masks(sampler(), RECORDS, STEPS)
    assert abs(cross_z(first, second, RATE)) < LIMIT


def test_a_replayed_stream_is_caught():
    first, second = masks(sampler(seed=3), RECORDS, STEPS), masks(sampler(seed=3), RECORDS, STEPS)
    assert torch.equal(first, second)  # the debugging seed fixes the coins
    assert cross_z(first, second, RATE) > 100


def test_halves_of_one_stream_are_independent():
    first, second = masks(sampler(), RECORDS, STEPS).split(STEPS // 2)
    assert abs(cross_z(first, second, RATE)) < LIMIT


def test_empty_batches_come_as_often_as_they_should():
    rare = PoissonSampler(10, 0.1)
    empty = sum(len(rare.draw()) == 0 for _ in range(2000))
    expected = 0.9**10
    assert abs(empty / 2000 - expected) < 5 * math.sqrt(expected * (1 - expected) / 2000)


def test_skipping_empty_batches_is_caught():
    joins = masks(SkipsEmpty(10, 0.1), 10, 4000)
    assert abs(statistics(joins, 0.1)["rate"]) > LIMIT


def test_indices_are_distinct_rising_and_within_the_records():
    drawn = PoissonSampler(50, 0.5).draw()
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn, torch.unique(drawn))
    assert torch.equal(PoissonSampler(5, 1.0).draw(), torch.arange(5))


def test_global_seeds_do_not_reach_the_coins():
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        drawn.append(masks(sampler(), RECORDS, 5))
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("leak", [pickle.dumps, copy.deepcopy, copy.copy])
def test_the_stream_cannot_be_saved_or_copied(leak):
    with pytest.raises(TypeError, match="secret stream"):
        leak(sampler())


def test_the_secret_is_not_printed():
    assert repr(sampler(seed=1)) == f"PoissonSampler(num_records={RECORDS}, rate={RATE}, is_secret=False)"


@pytest.mark.parametrize(
    ("num_records", "rate", "words"),
    [(0, 0.5, "num_records >= 1"), (5, 0.0, "rate <= 1"), (5, 1.5, "at most the 5 records"), (5, math.nan, "rate=nan")],
)
def test_bad_settings_are_refused(num_records, rate, words):
    with pytest.raises(ConfigurationError, match=words):
        PoissonSampler(num_records, rate)

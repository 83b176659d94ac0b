"""Samplers that are charged as Poisson sampling and are none."""

import pytest
import torch

from lightning_dp.auditing.result import Verdict
from lightning_dp.auditing.sampling import audit_sampler
from lightning_dp.gradients.poisson import PoissonSampler

RECORDS, RATE = 1000, 0.05
BATCH = 50


class Shuffled:
    """Passes over the data in a random order, in batches of the expected size."""

    def __init__(self):
        self._left = []

    def draw(self):
        if not self._left:
            self._left = list(torch.randperm(RECORDS).split(BATCH))
        return self._left.pop()


class DropsTheLast(Shuffled):
    """The same with batches that do not divide the data: the last one is left out."""

    def draw(self):
        if not self._left:
            self._left = list(torch.randperm(RECORDS).split(60)[:-1])
        return self._left.pop()


class FixedSize:
    """A fresh random batch each time, always of the expected size."""

    def draw(self):
        return torch.randperm(RECORDS)[:BATCH]


class Capped(PoissonSampler):
    """Batches are cut to what fits the memory."""

    def draw(self):
        drawn = super().draw()
        return drawn[torch.randperm(len(drawn))[:BATCH]]


class TwiceTheRate(PoissonSampler):
    def __init__(self, num, rate):
        super().__init__(num, 2 * rate)


class SkipsEmpty(PoissonSampler):
    """An empty batch is drawn again instead of being released."""

    def draw(self):
        drawn = super().draw()
        return drawn if len(drawn) else self.draw()


class Stale(PoissonSampler):
    """The mask of the step before, half of the time (a prefetched batch that is used twice)."""

    def draw(self):
        self._turn = not getattr(self, "_turn", False)
        if self._turn:
            self._last = super().draw()
        return self._last


@pytest.mark.parametrize(
    "make",
    [
        Shuffled,
        DropsTheLast,
        FixedSize,
        lambda: Capped(RECORDS, RATE),
        lambda: TwiceTheRate(RECORDS, RATE),
        lambda: Stale(RECORDS, RATE),
        lambda: PoissonSampler(RECORDS, RATE, insecure_seed=1),
    ],
    ids=["Shuffled", "DropsTheLast", "FixedSize", "Capped", "TwiceTheRate", "Stale", "OneMaskOnTwoRanks"],
)
def test_a_wrong_sampler_is_found(make):
    assert audit_sampler(make, num_records=RECORDS, rate=RATE).verdict is Verdict.VIOLATED


def test_a_skipped_empty_batch_is_found():
    found = audit_sampler(lambda: SkipsEmpty(30, RATE), num_records=30, rate=RATE)
    assert found.verdict is Verdict.VIOLATED
    assert found.measured["z empty"] < -6
    assert audit_sampler(lambda: PoissonSampler(30, RATE), num_records=30, rate=RATE).verdict is not Verdict.VIOLATED


def test_one_stream_on_two_ranks_is_told_by_its_twin():
    found = audit_sampler(lambda: PoissonSampler(RECORDS, RATE, insecure_seed=1))
    assert found.measured["z two starts"] > 100
    assert abs(found.measured["z rate"]) < 6  # each of them by itself is fair

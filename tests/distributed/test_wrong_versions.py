"""What many a distributed program does instead, and what notices it here."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

from lightning_dp.errors import PeerError, PrivacyProtocolError
from lightning_dp.gradients.poisson import PoissonSampler
from lightning_dp.gradients.ranks import Ranks
from lightning_dp.mechanisms.noise import NoiseSource
from lightning_dp.modules.records import PoissonModule, RecordModule
from lightning_dp.modules.release import _DOOR, Released, ReleaseSession
from lightning_dp.networks.dct import DCTGenerator
from tests.contracts.sampler import cross_z, masks, statistics
from tests.distributed.group import Ending, endings, values
from tests.distributed.runs import Trace, my_ranks, run
from tests.distributed.test_runs import are_close, has_declared_variance, same_bits


def changed(name: str, changes: dict, *, is_private: bool = True, **options) -> list[Ending]:
    return endings(2, partial(run, name, is_private=is_private, changes=changes, **options))


def traces(found: list[Ending]) -> list[Trace]:
    assert not any(ending.is_error for ending in found), found[0].error or found[1].error
    return [ending.value for ending in found]


class TestNoise:
    def test_noise_of_each_process_is_refused(self):
        """Each draws its own: W models, each with noise of its own, whose average has too little."""
        found = changed("records", {(NoiseSource, "adopt_secret"): lambda self, secret: None}, seed=None)
        assert [type(ending.value) for ending in found] == [PrivacyProtocolError] * 2
        assert "separate ways before release 2" in str(found[0].value)

    def test_averaged_noise_is_seen_by_its_variance(self):
        """Each draws its own, the mean is added: the same everywhere, and 1/W of the declared variance."""

        def averaged(self, shape, *, std, release_number, leaf="noise"):
            stream = self.generator(release_number=release_number, leaf=f"{leaf}:{dist.get_rank()}")
            drawn = torch.from_numpy(stream.standard_normal(shape) * std)
            dist.all_reduce(drawn)
            return drawn / dist.get_world_size()

        right, wrong = (
            traces(changed("records", {}))[0],
            traces(changed("records", {(NoiseSource, "gaussian"): averaged})),
        )
        assert has_declared_variance(right, divisor=10)
        assert same_bits(*wrong)
        for trace in wrong:
            trace.stds = right.stds
            assert not has_declared_variance(trace, divisor=10)

    def test_noise_before_the_sum_is_seen_by_its_variance(self):
        """Each process adds the whole noise to its share: W times the declared variance."""
        plain = Ranks.sum

        def noisy(self, total):
            stream = torch.Generator().manual_seed(self.rank)
            std = 8.0  # of the whole release, once more
            return plain(self, total + std * torch.randn(total.shape, dtype=total.dtype, generator=stream))

        found = traces(changed("records", {(Ranks, "sum"): noisy}))
        alone = traces(endings(1, partial(run, "records", is_private=True)))[0]
        for trace in found:
            trace.totals = alone.totals[:1]  # the parameters part after the first release
            trace.released, trace.stds = trace.released[:1], alone.stds[:1]
            assert not has_declared_variance(trace, divisor=10)


class TestSums:
    def test_an_averaged_gradient_is_another_run(self):
        """What plain DDP does to a gradient that is a sum."""
        plain = Ranks.sum
        (alone,) = values(1, partial(run, "records", is_private=False))
        for trace in traces(changed("records", {(Ranks, "sum"): lambda s, t: plain(s, t) / s.size}, is_private=False)):
            assert not are_close(trace, alone)

    def test_a_sum_that_one_process_keeps_to_itself_is_refused(self):
        found = changed("records", {(Ranks, "sum"): lambda self, total: total})
        assert {type(ending.value) for ending in found} == {PrivacyProtocolError}

    def test_a_joint_row_from_every_process_is_another_run(self):
        """The gradient of a coupled batch, sent W times: W times the sensitivity that is charged."""
        (alone,) = values(1, partial(run, "joint", is_private=False))
        found = traces(endings(2, every_process_sends_the_joint_row))
        assert all(torch.allclose(t.totals[0], 2 * alone.totals[0]) for t in found)
        assert not any(are_close(trace, alone) for trace in found)


def every_process_sends_the_joint_row() -> Trace:
    """Each believes to be the first when it asks whether to compute the row."""
    gather = Ranks.gather

    def then_first(self, rows):
        found = gather(self, rows)
        self.rank = 0
        return found

    return run("joint", is_private=False, changes={(Ranks, "gather"): then_first}, steps=1)


class TestCoins:
    STEPS, RECORDS, RATE = 3000, 60, 0.1

    @staticmethod
    def joins(sampler: type[PoissonSampler], seed: int | None) -> torch.Tensor:
        ranks = my_ranks()
        mine = ranks.owned(TestCoins.RECORDS)
        coins = sampler(TestCoins.RECORDS, TestCoins.RATE, insecure_seed=seed, owned=mine)
        found = masks(coins, TestCoins.RECORDS, TestCoins.STEPS)
        others = torch.ones(TestCoins.RECORDS, dtype=torch.bool)
        others[list(mine)] = False
        assert found[:, others].sum() == 0, "a record joined where it does not live"
        return found[:, ~others]

    def test_processes_flip_coins_of_their_own(self):
        first, second = values(2, TestCoins.joins, PoissonSampler, None)
        assert abs(cross_z(first, second, self.RATE)) < 5
        for joins in (first, second):
            assert all(abs(z) < 5 for z in statistics(joins, self.RATE).values())

    def test_a_shared_mask_is_seen(self):
        """One key for all: the k-th record of every process joins or stays away together."""

        class Shared(PoissonSampler):
            def __init__(self, *args, **options):
                super().__init__(*args, **options)
                state = my_ranks().first(lambda: self._stream.bit_generator.state)
                self._stream.bit_generator.state = state

        first, second = values(2, TestCoins.joins, Shared, None)
        assert torch.equal(first, second)
        assert cross_z(first, second, self.RATE) > 100

    def test_fixed_coins_do_not_depend_on_the_number_of_processes(self):
        halves, (whole,) = values(2, TestCoins.joins, PoissonSampler, 5), values(1, TestCoins.alone, 5)
        assert torch.equal(whole[:, 0::2], halves[0])
        assert torch.equal(whole[:, 1::2], halves[1])

    @staticmethod
    def alone(seed: int) -> torch.Tensor:
        return masks(PoissonSampler(TestCoins.RECORDS, TestCoins.RATE, insecure_seed=seed), 60, TestCoins.STEPS)


def few_records(*, wrong: str) -> tuple[Trace, list[int]]:
    """A run in which processes often have an empty batch."""
    sizes: list[int] = []
    draw, release = PoissonModule.draw_records, ReleaseSession.release
    changes: dict = {(PoissonModule, "sampling"): property(lambda self: type_of_sampling(self))}

    def noted(self):
        drawn = draw(self)
        sizes.append(len(drawn))
        return drawn

    def without_a_step(self, network):
        if len(self.draw_records()) > 0:
            plain(self, network)

    def without_joining(self, chunks, shape, device):
        chunks = list(chunks)
        if chunks:
            return release(self, chunks, shape, device)
        self._may_still_release = False
        return Released(torch.zeros(shape), 1, _DOOR)

    plain = RecordModule.train_on_release
    changes[PoissonModule, "draw_records"] = noted
    if wrong == "no step":
        changes[RecordModule, "train_on_release"] = without_a_step
    if wrong == "no release":
        changes[ReleaseSession, "release"] = without_joining
    return run("records", is_private=True, changes=changes), sizes


def type_of_sampling(module):
    from lightning_dp.accounting.events import Sampling

    return Sampling(scheme="poisson", rate=1 / module.facts.num_records)


class TestEmptyBatches:
    def test_a_process_without_records_joins_and_the_run_is_that_of_one(self):
        ((alone, _),) = values(1, partial(few_records, wrong=""))
        found = values(2, partial(few_records, wrong=""))
        assert any(a == 0 < b for a, b in zip(found[0][1], found[1][1], strict=True))
        assert any(a == b == 0 for a, b in zip(found[0][1], found[1][1], strict=True))
        for trace, _ in found:
            assert same_bits(trace, found[0][0])
            assert are_close(trace, alone)
            assert sum(trace.counts.values()) == len(trace.noise) == 20  # empty batches are charged and noised too

    @pytest.mark.parametrize("wrong", ["no step", "no release"])
    def test_a_process_that_skips_its_empty_batch_ends_the_run(self, wrong):
        found = endings(2, partial(few_records, wrong=wrong))
        assert all(isinstance(ending.value, PrivacyProtocolError | PeerError) for ending in found), found
        assert any(isinstance(ending.value, PrivacyProtocolError) for ending in found)


def other_machine(*, is_healed: bool) -> Trace:
    """The second process computes as another machine would, which rounds in another way."""
    forward, changes = DCTGenerator.forward, {}

    def rounded_otherwise(self, latent, labels):
        return forward(self, latent, labels) * (1 + 1e-6 * dist.get_rank())

    changes[DCTGenerator, "forward"] = rounded_otherwise
    if not is_healed:
        changes[Ranks, "same"] = lambda self, tensors: None
    return run("energy teachers", is_private=True, changes=changes)


def test_replicas_stay_equal_on_machines_that_round_differently():
    assert same_bits(*values(2, partial(other_machine, is_healed=True)))
    assert not same_bits(*values(2, partial(other_machine, is_healed=False)))

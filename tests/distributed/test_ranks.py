"""What processes do together, by itself: sums, gathered rows, equal replicas, and no wait without end."""

import os
import signal
import time

import pytest
import torch

from callbacks.held_interrupt import HeldInterrupt
from lightning_dp.errors import PeerError, PrivacyProtocolError
from lightning_dp.gradients.ranks import ALONE, Ranks, checksum
from tests.distributed.group import endings, values
from tests.distributed.runs import my_ranks

SIZE = 3


def everything() -> dict:
    """What a process of a healthy group sees."""
    ranks = my_ranks()
    with ranks.together(1, "a release", seen=5):
        pass
    rows = torch.arange(2 * ranks.rank, dtype=torch.float32).reshape(ranks.rank, 2) + 10 * ranks.rank
    drifted = torch.tensor([1.0, 2.0]) * (1 + 1e-7 * ranks.rank)
    kept = torch.tensor([7], dtype=torch.int64)
    ranks.same([drifted])
    ranks.same([kept])
    part = torch.tensor(ranks.owned(8), dtype=torch.float64)[:, None].expand(-1, 2).contiguous()
    whole = torch.zeros(8, 2, dtype=torch.float64) if ranks.rank == 0 else None
    ranks.collect(part, whole)
    return {
        "owned": list(ranks.owned(8)),
        "integers": ranks.sum(torch.tensor([2**30, ranks.rank], dtype=torch.int32) // 4),
        "doubles": ranks.sum(torch.tensor([0.1 * (ranks.rank + 1), 1e-300], dtype=torch.float64)),
        "gathered": ranks.gather(rows),
        "first": ranks.first(lambda: ("told by", ranks.rank)),
        "drifted": drifted,
        "kept": kept,
        "whole": whole,
    }


@pytest.fixture(scope="module")
def healthy():
    return values(SIZE, everything)


class TestTogether:
    def test_each_has_one_owner(self, healthy):
        assert sorted(one for seen in healthy for one in seen["owned"]) == list(range(8))

    def test_sums_are_the_same_bits_everywhere(self, healthy):
        for seen in healthy:
            assert seen["integers"].tolist() == [3 * 2**28, 0]
            assert torch.equal(seen["doubles"], healthy[0]["doubles"])
            assert torch.allclose(seen["doubles"], torch.tensor([0.6, 3e-300], dtype=torch.float64), atol=0)

    def test_rows_of_unequal_processes_come_together(self, healthy):
        expected = torch.tensor([[10.0, 11], [20, 21], [22, 23]])  # none of the first process
        assert all(torch.equal(seen["gathered"], expected) for seen in healthy)

    def test_the_first_one_is_asked(self, healthy):
        assert all(seen["first"] == ("told by", 0) for seen in healthy)

    def test_replicas_that_drifted_take_the_value_of_the_first(self, healthy):
        assert all(torch.equal(seen["drifted"], torch.tensor([1.0, 2.0])) for seen in healthy)
        assert all(seen["kept"].item() == 7 for seen in healthy)

    def test_stacks_are_collected_in_their_order(self, healthy):
        assert torch.equal(healthy[0]["whole"][:, 0], torch.arange(8, dtype=torch.float64))
        assert healthy[1]["whole"] is None


def test_alone_nothing_happens():
    total = torch.ones(3)
    assert ALONE.sum(total) is total
    assert ALONE.gather(total) is total
    assert list(ALONE.owned(4)) == [0, 1, 2, 3]
    with pytest.raises(ZeroDivisionError), ALONE.together(1, "x"):
        _ = 1 / 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_a_checksum_sees_any_bit_and_any_swap(dtype):
    values_ = (torch.arange(5000) % 2).to(dtype)
    swapped, changed = values_.clone(), values_.clone()
    swapped[[10, 11]] = swapped[[11, 10]]
    changed[-1] = 1 - changed[-1].to(torch.int64)
    found = {checksum([tensor]) for tensor in (values_, swapped, changed, values_[:-1], values_.flip(0))}
    assert len(found) == 5
    assert checksum([values_]) == checksum([values_.clone()])


def test_a_checksum_does_not_let_rounding_errors_cancel():
    """A plain sum of bits would miss two neighbours that each moved by one unit, one up, one down."""
    before = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    after = before.clone()
    bits = after.view(torch.int32)
    bits[3] += 1
    bits[4] -= 1
    assert int(bits.sum()) == int(before.view(torch.int32).sum())
    assert checksum([after]) != checksum([before])


# No wait without end ----------------------------------------------------------------------------------------------


def one_raises() -> float:
    ranks = my_ranks()
    start = time.monotonic()
    with ranks.together(1, "a release"):
        if ranks.rank == 1:
            raise OSError("disk full")
    return time.monotonic() - start


def test_if_one_fails_none_goes_on():
    found = endings(SIZE, one_raises)
    assert [type(ending.value) for ending in found] == [PeerError, OSError, PeerError]
    assert "Process 1 of 3 failed before release 1; nothing was released" in str(found[0].value)


def one_dies() -> None:
    ranks = my_ranks()
    ranks.sum(torch.ones(1))
    if ranks.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    with ranks.together(1, "a release"):
        pass


def test_if_one_is_killed_the_others_end():
    found = endings(SIZE, one_dies, killed=(2,))
    assert [type(ending.value) for ending in found[:2]] == [PeerError, PeerError]
    assert found[2].error == "killed"


def one_goes_another_way(what: str) -> None:
    ranks = my_ranks()
    odd = ranks.rank == 1
    number, subject, seen = (2 if odd and what == "number" else 1), "x", (9 if odd and what == "seen" else 8)
    with ranks.together(number, "y" if odd and what == "subject" else subject, seen):
        pass


@pytest.mark.parametrize("what", ["number", "subject", "seen"])
def test_processes_that_differ_release_nothing(what):
    found = endings(2, one_goes_another_way, what)
    assert [type(ending.value) for ending in found] == [PrivacyProtocolError] * 2
    assert "separate ways" in str(found[0].value)


def first_fails() -> str:
    ranks: Ranks = my_ranks()
    return ranks.first(lambda: [][0])


def test_if_the_first_cannot_answer_the_others_hear_why():
    found = endings(2, first_fails)
    assert isinstance(found[0].value, IndexError)
    assert isinstance(found[1].value, PeerError)
    assert "index out of range" in str(found[1].value)


def when_all_stop(asks: int, at: int) -> tuple[int, int]:
    """Make releases until all must stop; one process was asked to, by a signal, before one of its own."""
    ranks = my_ranks()
    held = HeldInterrupt(ranks)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs behind it without one
    held.hold()
    for number in range(10):
        if ranks.rank == asks and number == at:
            os.kill(os.getpid(), signal.SIGINT)
        with ranks.together(number, "a release"):
            pass
        if ranks.must_stop:
            break
    before = signal.getsignal(signal.SIGINT)
    held.let_go()
    return number, before is signal.default_int_handler


def test_whoever_is_asked_to_stop_all_stop_after_the_same_release():
    # Stopping for one's own wish alone would leave the others waiting. A second Ctrl-C ends the one who was asked.
    assert values(SIZE, when_all_stop, 1, 3) == [(3, False), (3, True), (3, False)]


def test_alone_an_interrupt_is_what_it_was():
    held, before = HeldInterrupt(ALONE), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        held.hold()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        held.let_go()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not ALONE.must_stop

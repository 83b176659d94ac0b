"""Processes that were started with different settings are told apart before anything is released."""

from dataclasses import replace

import pytest

from lightning_dp.errors import ConfigurationError, PeerError
from tests.distributed.group import endings
from tests.distributed.runs import CASES, my_ranks, run


def another_partition() -> None:
    """Process 1 gives records to other teachers: some then have two, one on each process."""
    case, rank = CASES["trained teachers"], my_ranks().rank

    def make():
        module = case.make()
        module.partition_key = rank
        return module

    CASES["trained teachers"] = replace(case, make=make)
    run("trained teachers", is_private=True, steps=2)


def known_coins() -> None:
    """Process 1 flips known coins for its records, and the claim, which process 0 makes, would be PROVED."""
    run("records", is_private=True, steps=2, seed=None if my_ranks().rank == 0 else 3)


@pytest.mark.parametrize(
    ("function", "named"), [(another_partition, "plan.partition_key"), (known_coins, "unverified")]
)
def test_a_process_with_other_settings_is_refused(function, named):
    first, second = endings(2, function)
    assert isinstance(second.value, ConfigurationError), second.error
    assert named in str(second.value)
    assert isinstance(first.value, PeerError), first.error
    assert "nothing was released" in str(first.value)

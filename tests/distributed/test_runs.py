"""A run on many processes is the run on one: the same sums, noise, ledger and parameters, for every kind of rows.

One test trains all cases in one group of processes: starting a group, and a run of one process beside it, is dear.
"""

from functools import partial

import pytest
import torch
from scipy import stats

from tests.distributed.group import values
from tests.distributed.runs import CASES, Trace, all_cases, run

# Float sums of a chunk of teachers or records round in their own order: a few units of the last place, over 20 steps.
TOLERANCE = 2e-5
SIZES = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.mark.parametrize("size", SIZES)
def test_without_noise_sums_parameters_and_ledger_are_those_of_one_process(size):
    train = partial(all_cases, is_private=False)
    (alone,), found = values(1, train), values(size, train)
    for name, case in CASES.items():
        expected = alone[name]
        assert len(expected.totals) == sum(expected.counts.values()) >= case.steps, name
        for trace in (traces[name] for traces in found):
            assert have_equal_sums(trace, expected, exact=case.exact), name
            assert are_close(trace, expected), name
            assert same_bits(trace, found[0][name]), name
            assert trace.counts == expected.counts, name
            assert trace.has_stopped, name


@pytest.mark.parametrize("size", SIZES)
def test_noise_is_drawn_once_and_the_same_everywhere(size):
    """Keyed by secret, release and leaf: also the same as on one process with that secret."""
    train = partial(all_cases, is_private=True, most_steps=4)
    (alone,), found = values(1, train), values(size, train)
    for name in CASES:
        expected = alone[name]
        for trace in (traces[name] for traces in found):
            assert len(trace.noise) == len(trace.totals) == len(expected.noise), name
            assert are_equal(trace.noise, expected.noise), name
            assert trace.stds == expected.stds, name
            assert are_equal(trace.released, found[0][name].released), name
            assert same_bits(trace, found[0][name]), name
    for name in ("records", "two optimizers", "autoencoder"):  # where a release is the noisy sum over 10 records
        assert has_declared_variance(found[0][name], divisor=10), name


def have_equal_sums(found: Trace, expected: Trace, *, exact: bool) -> bool:
    if exact:
        return are_equal(found.totals, expected.totals)
    pairs = list(zip(found.totals, expected.totals, strict=True))
    assert all(total.dtype == reference.dtype for total, reference in pairs)
    scales = [reference.double().abs().max().item() for _, reference in pairs]
    moved = [(total.double() - reference.double()).abs().max().item() for total, reference in pairs]
    return all(distance <= TOLERANCE * scale for distance, scale in zip(moved, scales, strict=True))


def are_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def same_bits(found: Trace, expected: Trace) -> bool:
    assert found.state.keys() == expected.state.keys()
    return all(torch.equal(found.state[name], expected.state[name]) for name in expected.state)


def are_close(found: Trace, expected: Trace) -> bool:
    return all(
        torch.allclose(found.state[name].double(), value.double(), rtol=TOLERANCE, atol=TOLERANCE)
        for name, value in expected.state.items()
    )


def has_declared_variance(trace: Trace, *, divisor: float) -> bool:
    """Chi-square at 99.99 %, on what the noise did to the value that left."""
    parts = zip(trace.released, trace.totals, trace.stds, strict=True)
    noise = torch.cat([(divisor * value.double() - total).flatten() / std for value, total, std in parts])
    low, high = stats.chi2.interval(0.9999, len(noise))
    return bool(low <= noise.square().sum().item() <= high)


def test_fresh_secrets_are_shared_by_a_run_and_by_no_other():
    first, second = (values(2, partial(run, "records", is_private=True, seed=None, steps=2)) for _ in range(2))
    assert are_equal(first[0].noise, first[1].noise)
    assert not torch.equal(first[0].noise[0], second[0].noise[0])
    assert not torch.equal(first[0].noise[0], first[0].noise[1])

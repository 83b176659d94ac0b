"""A run on many processes is the run on one: the same sums, noise, ledger and parameters, for every kind of rows."""

from functools import partial

import pytest
import torch
from scipy import stats

from tests.distributed.group import values
from tests.distributed.runs import CASES, Trace, all_cases, run

# Float sums of a chunk of teachers or records round in their own order: a few units of the last place, over 20 steps.
TOLERANCE = 2e-5
FOUR = pytest.param(4, marks=pytest.mark.slow)

_kept: dict[tuple[int, bool], list[dict[str, Trace]]] = {}


def group(size: int, *, is_private: bool) -> list[dict[str, Trace]]:
    """Return the traces of all cases on every process; each group of processes runs once."""
    if (size, is_private) not in _kept:
        _kept[size, is_private] = values(
            size, partial(all_cases, is_private=is_private, most_steps=4 if is_private else 20)
        )
    return _kept[size, is_private]


@pytest.mark.parametrize("size", [2, FOUR])
@pytest.mark.parametrize("name", CASES)
class TestWithoutNoise:
    def test_sums_are_those_of_one_process(self, name, size):
        (alone,) = group(1, is_private=False)
        for traces in group(size, is_private=False):
            check_sums(traces[name], alone[name], exact=CASES[name].exact)

    def test_parameters_are_those_of_one_process_and_the_same_bits_on_all(self, name, size):
        (alone,), found = group(1, is_private=False), group(size, is_private=False)
        for traces in found:
            assert same_bits(traces[name], found[0][name])
            assert are_close(traces[name], alone[name])

    def test_the_ledger_is_the_same_and_all_stop_together(self, name, size):
        (alone,) = group(1, is_private=False)
        for traces in group(size, is_private=False):
            assert traces[name].counts == alone[name].counts
            assert sum(alone[name].counts.values()) == len(alone[name].totals)
            assert traces[name].has_stopped


@pytest.mark.parametrize("size", [2, FOUR])
@pytest.mark.parametrize("name", CASES)
class TestWithNoise:
    def test_noise_is_drawn_once_and_is_the_same_everywhere(self, name, size):
        """Keyed by secret, release and leaf: also the same as on one process with that secret."""
        (alone,) = group(1, is_private=True)
        for traces in group(size, is_private=True):
            assert len(traces[name].noise) == len(traces[name].totals) == len(alone[name].noise)
            for drawn, expected in zip(traces[name].noise, alone[name].noise, strict=True):
                assert torch.equal(drawn, expected)

    def test_released_values_and_parameters_are_the_same_bits_everywhere(self, name, size):
        found = group(size, is_private=True)
        for traces in found:
            assert same_bits(traces[name], found[0][name])
            pairs = zip(traces[name].released, found[0][name].released, strict=True)
            assert all(torch.equal(value, other) for value, other in pairs)

    def test_the_declared_noise_is_what_reaches_the_released_value(self, name, size):
        (alone,) = group(1, is_private=True)
        for traces in group(size, is_private=True):
            assert traces[name].stds == alone[name].stds
        if name in ("records", "two optimizers", "autoencoder"):  # where a release is the noisy sum over 10 records
            assert has_declared_variance(group(size, is_private=True)[0][name], divisor=10)


def check_sums(found: Trace, expected: Trace, *, exact: bool) -> None:
    for total, reference in zip(found.totals, expected.totals, strict=True):
        assert total.dtype == reference.dtype
        if exact:
            assert torch.equal(total, reference)
        else:
            scale = reference.double().abs().max().item()
            assert (total.double() - reference.double()).abs().max().item() <= TOLERANCE * scale


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
    for drawn, other in zip(first[0].noise, first[1].noise, strict=True):
        assert torch.equal(drawn, other)
    assert not torch.equal(first[0].noise[0], second[0].noise[0])
    assert not torch.equal(first[0].noise[0], first[0].noise[1])

import pytest
import torch
from scipy import stats

from lightning_dp.mechanisms.keyed import keyed_normal, keyed_uniform, seed_for_moved

DRAWS = [keyed_uniform, keyed_normal]


def draw(function, ids, seed=1, num_vectors=3, dim=50, first_vector=0):
    shape = torch.Size((len(ids), num_vectors, dim))
    return function(shape, seed=seed, row_ids=torch.as_tensor(ids), first_vector=first_vector)


def test_laws():
    uniform, normal = (draw(function, range(500)).flatten() for function in DRAWS)
    assert stats.kstest(uniform, "uniform").pvalue > 1e-6
    assert stats.kstest(normal, "norm").pvalue > 1e-6
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert torch.isfinite(normal).all()


@pytest.mark.parametrize("function", DRAWS)
def test_a_rows_numbers_do_not_depend_on_the_other_rows(function):
    whole = draw(function, range(10))
    assert torch.equal(draw(function, [7, 2]), whole[[7, 2]])
    assert torch.equal(draw(function, range(10), num_vectors=1, first_vector=2), whole[:, 2:])


@pytest.mark.parametrize("function", DRAWS)
def test_seeds_rows_vectors_and_coordinates_differ(function):
    first, second = draw(function, range(200)).flatten(), draw(function, range(200), seed=2).flatten()
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 5 / len(first) ** 0.5
    assert first.unique().numel() > 0.99 * len(first)


def test_counters_that_would_overlap_are_refused():
    with pytest.raises(ValueError, match="2\\^20"):
        draw(keyed_uniform, [0], dim=2**20 + 1)


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1, 2**62 + 12345])
def test_rows_that_moved_up_keep_their_draws_under_the_moved_seed(kind, seed):
    shape, ids = torch.Size((6, 3, 5)), torch.arange(6)
    before = kind(shape, seed=seed, row_ids=ids + 1, first_vector=2)
    assert torch.equal(before, kind(shape, seed=seed_for_moved(seed, 1), row_ids=ids, first_vector=2))
    assert not torch.equal(before, kind(shape, seed=seed, row_ids=ids, first_vector=2))

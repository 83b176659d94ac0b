import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_dp.errors import PrivacyProtocolError
from lightning_dp.mechanisms.grid import cut_to_grid, step_below, whole_steps

BOUNDS = st.floats(1e-6, 1e6)


@given(bound=BOUNDS)
def test_a_step_is_a_power_of_two_about_a_millionth_of_the_bound(bound):
    step = step_below(bound)
    assert math.frexp(step)[0] == 0.5
    assert 2**20 <= bound / step < 2**21


@given(bound=BOUNDS, seed=st.integers(0, 2**31), dim=st.integers(1, 300), over=st.sampled_from([0.0, 1e-16, 1e-9]))
def test_cut_rows_stay_within_the_bound_in_whole_numbers(bound, seed, dim, over):
    rows = torch.randn(20, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows *= bound * (1 + over) / rows.norm(dim=-1, keepdim=True)
    step = step_below(bound)
    cut = cut_to_grid(rows.clone(), step=step, bound=bound)
    whole = whole_steps(cut, step)
    assert torch.equal(whole.double() * step, cut)
    for row in whole.tolist():  # in Python's integers, without any rounding
        assert sum(k * k for k in row) * step**2 <= bound**2
    kept = whole.ne(0).any(dim=-1)
    assert ((rows - cut).abs() < step)[kept].all()
    assert (cut.abs() <= rows.abs()).all()


def test_rounding_to_the_nearest_step_would_leave_the_bound():
    """The broken twin: without a margin, rows on the bound are rounded out of it."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 1000, generator=generator, dtype=torch.float64)
    rows /= rows.norm(dim=-1, keepdim=True)
    step = step_below(1.0)
    assert (rows / step).round().mul(step).norm(dim=-1).max() > 1.0
    assert cut_to_grid(rows, step=step, bound=1.0).norm(dim=-1).max() <= 1.0


def test_a_row_beyond_the_bound_sends_zeros():
    rows = torch.tensor([[3.0, 4.0], [3.0, 4.00001], [1e300, 0.0]], dtype=torch.float64)
    cut = cut_to_grid(rows, step=2.0**-18, bound=5.0)
    assert cut.tolist() == [[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]]


def test_sums_are_the_same_to_the_last_bit_in_any_order():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5000, 40, generator=generator, dtype=torch.float64)
    rows /= rows.norm(dim=-1, keepdim=True)
    order = torch.randperm(5000, generator=generator)
    assert not torch.equal(rows.sum(0), rows[order].sum(0))  # what floating point does to plain rows
    cut = cut_to_grid(rows, step=step_below(1.0), bound=1.0)
    parts = sum(part.sum(0) for part in cut[order].split(17))
    assert torch.equal(cut.sum(0), parts)


@pytest.mark.parametrize("bad", [0.3, math.nan, math.inf, 2.0**53])
def test_sums_beside_the_grid_or_too_large_are_refused(bad):
    with pytest.raises(PrivacyProtocolError, match="beside the grid"):
        whole_steps(torch.tensor([1.0, bad], dtype=torch.float64), 1.0)

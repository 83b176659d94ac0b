"""Norms of rows, whatever their length and precision."""

import pytest
import torch

from lightning_dp.gradients import parts
from lightning_dp.gradients.parts import Rows, product


@pytest.mark.parametrize("length", [49, 50, 51, 120])
def test_long_lines_are_measured_in_pieces(monkeypatch, length):
    """In one piece, a line of a few million entries in single precision would have no proved norm."""
    monkeypatch.setattr(parts, "_LONGEST_LINE", 50)
    values = torch.randn(3, 2, length, generator=torch.Generator().manual_seed(0))
    exact = values.double().square().sum((1, 2))
    left, right = values.new_ones(3, 1, 2), torch.randn(3, 1, length, generator=torch.Generator().manual_seed(1))
    made = product(left, lambda few: right[few], length, as_rows=True)
    for rows, wanted in ((Rows(values), exact), (made, 2 * right.double().square().sum((1, 2)))):
        torch.testing.assert_close(rows.squared_norms, wanted, rtol=1e-5, atol=0)
        assert (rows.squared_bounds >= wanted).all()
        assert (rows.squared_bounds <= (1 + 60 * 2.0**-22) * wanted).all()


def test_rows_of_fewer_bits_are_measured_in_single_precision():
    """In their own, the bound on the norm of a bias of 512 numbers would be twice the norm."""
    values = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    rows, exact = Rows(values), values.double().square().sum(1)
    assert (rows.squared_bounds >= exact).all()
    assert (rows.squared_bounds <= 1.001 * exact).all()
    places = torch.randn(4, 3, 40, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    made = product(places, lambda few: places[few], 40, as_rows=True)
    exact = made.rows().double().square().sum(1)
    assert ((made.squared_bounds >= exact) & (made.squared_bounds <= 1.001 * exact)).all()

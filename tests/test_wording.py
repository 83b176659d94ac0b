"""A number and its noun agree."""

from lightning_dp.wording import counted


def test_one_and_many():
    assert [counted(number, "run") for number in (0, 1, 2)] == ["0 runs", "1 run", "2 runs"]

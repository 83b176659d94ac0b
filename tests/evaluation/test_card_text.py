from hypothesis import given
from hypothesis import strategies as st

from lightning_dp.evaluation.card_text import ceil_text, number_text, seconds_text


@given(st.floats(0, 1e6))
def test_printed_epsilon_is_never_below_the_spent_one(epsilon):
    assert epsilon <= float(ceil_text(epsilon)) <= epsilon + 1.001e-4


def test_the_property_catches_plain_rounding():
    assert float(f"{1.00004:.4f}") < 1.00004 <= float(ceil_text(1.00004))


def test_spelling():
    assert [ceil_text(x) for x in (0.99991, 10.0, "inf", float("inf"))] == ["1.0000", "10.0000", "inf", "inf"]
    assert [number_text(x) for x in (0.876543, 60000, 1e-5, True, "x")] == ["0.8765", "60,000", "1e-05", "True", "x"]
    assert [seconds_text(x) for x in (8.26, 754, 7300, "?")] == ["8.3 s", "12 min 34 s", "2 h 1 min", "?"]

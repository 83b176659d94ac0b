"""Lines of a figure can be told apart, however many methods it shows."""

from types import SimpleNamespace

from lightning_dp.benchmark.figures import _look


def test_no_two_methods_look_alike():
    titles = [f"method {number}" for number in range(14)]
    rows = [
        SimpleNamespace(label=title, first=SimpleNamespace(card=SimpleNamespace(title=title), mechanism="Gaussian"))
        for title in titles
    ]
    looks = [_look(row, titles, titles, ["Gaussian"]) for row in rows]
    assert len({tuple(sorted(look.items())) for look in looks}) == len(titles)

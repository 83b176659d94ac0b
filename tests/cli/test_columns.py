"""On eighty columns words stay whole; only where they cannot be, they are folded."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from lightning_dp.cli.columns import broken_name, whole_words

HEADER = ("method", "mechanism", "accuracy, logistic", "FID")
ROWS = [[Text(cell) for cell in ("DataLens", "VonMisesFisher", "0.625 ± 0.019", "1426.2 ± 6.9")]]


def shown(width):
    console = Console(file=io.StringIO(), width=width)
    console.print(whole_words(HEADER, ROWS, title="Title", width=width))
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [45, 50, 60, 80, 200])
def test_words_stay_whole(width):
    lines = shown(width)
    words = {word for line in lines for word in line.split()}
    for cell in [*HEADER, *(cell.plain for cell in ROWS[0])]:
        assert set(cell.split()) <= words
    assert max(map(len, lines)) <= width


def test_a_wide_terminal_has_a_line_for_a_row():
    assert sum("0.625 ± 0.019" in line and "1426.2 ± 6.9" in line for line in shown(80)) == 1


def test_where_words_cannot_fit_nothing_is_lost():
    text = "".join(shown(30)).replace(" ", "")
    assert max(map(len, shown(30))) <= 30
    assert "DataLens"[:4] in text


@pytest.mark.parametrize(
    ("name", "width", "lines"),
    [
        ("TeacherEnsembleGAN", 15, ["TeacherEnsemble", "GAN"]),
        ("TeacherEnsembleGAN", 30, ["TeacherEnsembleGAN"]),
        ("VonMisesFisher", 7, ["Von", "Mises", "Fisher"]),
        ("DP2VAE", 4, ["DP2", "VAE"]),
        ("GNMax", 2, ["GNMax"]),
    ],
)
def test_names_are_cut_where_words_meet(name, width, lines):
    assert broken_name(name, width).split("\n") == lines

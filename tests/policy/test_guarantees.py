"""Every promise in the documents names tests that exist."""

import ast
import re
from functools import cache

import pytest

from lightning_dp.cli.audit_table import END, START
from tests.policy.sources import ROOT

DOCUMENTS = ("docs/guarantees.md", "SECURITY.md")
REFERENCE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def promises(text: str) -> list[str]:
    """Return the points of all lists, each on one line; tables and code are no promises."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    points = re.findall(r"^\* .*(?:\n(?:  .*|))*", text, flags=re.MULTILINE)
    return [" ".join(point.split()) for point in points]


@cache
def names_in(path: str) -> frozenset[str]:
    """Return the tests of a file and their classes."""
    if not (ROOT / path).is_file():
        return frozenset()
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    found = (node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef))
    return frozenset(name for name in found if name.lower().startswith("test"))


def missing(text: str) -> list[str]:
    """Return references to tests that do not exist."""
    return [f"{path}::{name}" for path, name in REFERENCE.findall(text) if name not in names_in(path)]


def unbacked(text: str) -> list[str]:
    """Return promises without a test."""
    return [point for point in promises(text) if not REFERENCE.search(point)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_promise_names_a_test_that_exists(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert len(promises(text)) >= 8
    assert unbacked(text) == []
    assert missing(text) == []


def test_every_answer_to_a_complaint_names_a_test_that_exists():
    text = (ROOT / "docs/complaints.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+ \|.*$", text, flags=re.MULTILINE)
    assert len(rows) == 25
    assert [row for row in rows if not REFERENCE.search(row)] == []
    assert missing(text) == []


def test_the_table_has_its_place():
    text = (ROOT / "docs/guarantees.md").read_text(encoding="utf-8")
    assert text.count(START) == text.count(END) == 1
    assert text.index(START) < text.index(END)


def test_a_promise_without_a_test_is_seen():
    text = "* Kept. [`tests/policy/test_guarantees.py::test_the_table_has_its_place`]\n* Broken,\n  over two lines.\n"
    assert unbacked(text) == ["* Broken, over two lines."]
    assert missing(text) == []
    assert missing("`tests/policy/test_guarantees.py::test_of_nothing`, `tests/nowhere.py::test_it`") == [
        "tests/policy/test_guarantees.py::test_of_nothing",
        "tests/nowhere.py::test_it",
    ]

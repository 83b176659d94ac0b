"""The repository says nothing about the machine it was written on, and leaves no empty notes."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from lightning_dp.cli import USAGE
from tests.policy.sources import ROOT

TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".json", ".cfg", ".ini", ".sh", ""}
GENERATED = {".git", ".venv", "data", "runs", "wandb", "dist", "build", "__pycache__"}

# Pieces, so that this file does not match itself.
_HOMES = "|".join(("wo" + "rk", "ro" + "ot", "ho" + "me", "Us" + "ers"))
ABSOLUTE = re.compile(rf"(?<![\w.$~}}/-])/(?:{_HOMES})/[\w.]")
EMPTY_NOTE = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b[\s:.()\-]*$")


def texts() -> list[Path]:
    """Return the text files that are, or would be, in the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.splitlines()]
    else:  # a source archive
        paths = [path for path in ROOT.rglob("*") if not GENERATED & set(path.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file() and path.suffix in TEXT]


def lines_matching(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}"
        for path in texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]


def test_no_absolute_path_of_a_machine():
    assert lines_matching(ABSOLUTE) == []


def test_no_note_without_words():
    assert lines_matching(EMPTY_NOTE) == []


@pytest.mark.parametrize(
    ("pattern", "line", "expected"),
    [
        (ABSOLUTE, "path = '/" + "work/main/x'", True),
        (ABSOLUTE, "see /" + "home/user/file", True),
        (ABSOLUTE, "RUN/release, a/" + "work/b, ~/" + "home/x", False),
        (ABSOLUTE, "/usr/share/datasets", False),
        (EMPTY_NOTE, "x = 1  # TO" + "DO", True),
        (EMPTY_NOTE, "x = 1  # TO" + "DO: shard teachers over ranks", False),
    ],
)
def test_the_patterns(pattern, line, expected):
    assert bool(pattern.search(line)) is expected


def test_text_files_were_found():
    names = {str(path.relative_to(ROOT)) for path in texts()}
    assert {"pyproject.toml", "lightning_dp/cli/__init__.py", "tests/policy/test_texts.py"} <= names


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_mappings(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


DOCUMENTS = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_the_documents_exist(document):
    """Sub-commands are those of the program, configurations and make targets are there."""
    text = document.read_text()
    known = set(re.findall(r"^  lightning-dp (\w+)", USAGE, flags=re.MULTILINE))
    assert set(re.findall(r"^\s*lightning-dp ([a-z]+)", text, flags=re.MULTILINE)) <= known
    for name in re.findall(r"configs/\w+/\w+\.yaml", text):
        assert (ROOT / name).exists(), name
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^\s*make ([\w-]+)", text, flags=re.MULTILINE)) <= targets

"""Every command of the documents can be typed as it stands there: its flags exist, and its configurations too."""

import re
import shlex
from pathlib import Path

import pytest

from lightning_dp.cli import audit, commands, comparison, dataset, judging, main, matrix, parsing, select
from lightning_dp.cli.fit import FitCLI

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "SECURITY.md", "docs/distributed.md", "docs/results/README.md", "docs/tutorial.md")
BLOCK = re.compile(r"```bash\n(.*?)```", re.S)
OF_READERS = ("mine.", "mine ", "mine.yaml")  # what a reader of the tutorial has written; a test of its own runs it


class Parsed(Exception):
    """Whatever comes after the parsing of a command is not of interest."""


def documented() -> list[str]:
    """Return the commands, without those that leave something out."""
    lines = [
        line[line.index("lightning-dp ") :]
        for name in DOCUMENTS
        for block in BLOCK.findall((ROOT / name).read_text(encoding="utf-8"))
        for line in block.splitlines()
        if "lightning-dp " in line.partition("#")[0]
    ]
    whole = [" ".join(shlex.quote(word) for word in shlex.split(line, comments=True)[1:]) for line in lines]
    return sorted({line for line in whole if "..." not in line and not any(word in line + " " for word in OF_READERS)})


@pytest.fixture(autouse=True)
def only_parsed(monkeypatch):
    """Let every command end where it has understood its arguments."""

    def parse(*arguments):
        parsing.parse(*arguments)
        raise Parsed

    def stop(self):
        raise Parsed

    for module in (audit, commands, comparison, dataset, judging, matrix, select):
        monkeypatch.setattr(module, "parse", parse)
    monkeypatch.setattr(FitCLI, "instantiate_classes", stop)
    monkeypatch.setattr("sys.argv", ["lightning-dp"])
    monkeypatch.chdir(ROOT)


def test_there_are_many():
    assert len(documented()) > 20
    assert {line.split()[0] for line in documented()} >= {"fit", "sample", "evaluate", "account", "audit", "benchmark"}


@pytest.mark.filterwarnings("ignore")  # `main` silences what jsonargparse deprecates
@pytest.mark.parametrize("line", documented())
def test_a_command_is_understood(line):
    assert all(Path(word).exists() for word in shlex.split(line) if word.startswith("configs/"))
    with pytest.raises(Parsed):
        main(shlex.split(line))


def test_a_flag_that_is_gone_is_seen(capsys):
    assert main(["sample", "RUN", "--number", "3"]) == 2
    assert "Unknown flag --number" in capsys.readouterr().err

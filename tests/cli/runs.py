"""The command line in process: a tiny run, and what a command printed."""

import csv
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_dp.cli import main

TINY = Path(__file__).parent / "tiny.yaml"


@dataclass(frozen=True)
class Outcome:
    """What a command left on the terminal."""

    code: int
    out: str
    err: str
    logged: tuple[str, ...] = ()

    def error(self) -> str:
        """Return the one line of a user's mistake, checked to be exactly that."""
        lines = self.err.splitlines()
        assert self.code == 2, self
        assert len(lines) == 1, self
        assert lines[0].startswith("lightning-dp: error: "), self
        assert "Traceback" not in self.err
        assert self.out == ""
        assert self.logged == (), self.logged
        return lines[0]


@pytest.fixture
def cli(capsys, caplog):
    """Run a command and return its outcome."""

    def run(*arguments: Any) -> Outcome:
        capsys.readouterr()
        caplog.clear()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        logged = tuple(r.getMessage() for r in caplog.records if r.levelno >= logging.INFO)
        return Outcome(code, captured.out, captured.err, logged)

    return run


@pytest.fixture
def fit(cli, tmp_path):
    """Fit the tiny configuration with flags over it; the run folder is `tmp_path/run` unless a flag says otherwise."""

    def run(*flags: Any) -> Outcome:
        where = () if "--run_dir" in flags else ("--run_dir", tmp_path / "run")
        return cli("fit", "--config", TINY, *where, *flags)

    return run


def changed(path: str, value: Any) -> dict[str, Any]:
    """Return the tiny configuration with one entry changed, or removed where `value` is `...`."""
    config: dict[str, Any] = yaml.safe_load(TINY.read_text())
    *outer, last = path.split("/")
    inner = config
    for key in outer:
        inner = inner.setdefault(key, {})
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return config


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Return the rows of all attempts' CSV files, empty cells left out."""
    rows = []
    for path in sorted((run_dir / "metrics").glob("*/metrics.csv")):
        with path.open() as file:
            rows += [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return rows

"""Configurations that were damaged at random: one line and exit code 2, or a run that does what the file says."""

import copy
import math
import random
from typing import Any

import pytest
import yaml

from lightning_dp.cli import fit as fit_command
from lightning_dp.cli import main
from tests.cli.runs import TINY

# Nothing that would take memory by the gigabyte: sizes of networks are the user's own.
VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "1e999", "TopAgg", "../x", "\u03b5", "null", "[1", "${x}", "1_000"),
    *(0, -1, 1, 3, 1000, 0.0, 1.5, -2.5, 1e-300, math.nan, math.inf, -math.inf),
    *([], [1, 2], ["a"], {}, {"a": 1}, {"class_path": "Nobody"}, {"class_path": "TopAgg", "init_args": {"top_k": -1}}),
)


class Planned(BaseException):
    """A command came to the point where training would begin."""

    def __init__(self, resolved):
        self.resolved = resolved


@pytest.fixture
def outcome(tmp_path, monkeypatch, capsys):
    """Give `fit` a text; return (None, its one line) or (resolved configuration, None)."""
    path = tmp_path / "config.yaml"
    monkeypatch.chdir(tmp_path)

    def run(self):
        raise Planned(self.resolved())

    monkeypatch.setattr(fit_command.FitCLI, "run", run)

    def tell(data: bytes, number: int):
        path.write_bytes(data)
        capsys.readouterr()
        flags = ["--run_dir", str(tmp_path / f"run{number}"), "--wandb", "disabled"]
        try:
            code = main(["fit", "--config", str(path), *flags])
        except Planned as planned:
            return planned.resolved, None
        captured = capsys.readouterr()
        assert code == 2, captured.err
        (line,) = captured.err.splitlines()
        assert line.startswith("lightning-dp: error: ")
        assert len(line) > len("lightning-dp: error: ") + 10
        assert "Traceback" not in line
        return None, line

    return tell


def places(node: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the paths of all keys."""
    if not isinstance(node, dict):
        return []
    return [found for key, value in node.items() for found in ((*path, key), *places(value, (*path, key)))]


def at(node: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        node = node[key]
    return node


def damaged(dice: random.Random) -> tuple[bytes, tuple[str, ...] | None, Any]:
    """Return a damaged file, and what it now says where; None where that cannot be told."""
    config = yaml.safe_load(TINY.read_text())
    path = dice.choice([path for path in places(config) if path != ("wandb",)])  # the test's own flag is laid over it
    inner, last = at(config, path[:-1]), path[-1]
    how = dice.choice(["value", "value", "value", "typo", "extra", "delete", "bytes", "cut", "twice"])
    if how == "value":
        inner[last] = copy.deepcopy(dice.choice(VALUES))
        return yaml.safe_dump(config).encode(), path, inner[last]
    if how == "typo":
        inner[last + dice.choice("sx_")] = inner.pop(last)
        return yaml.safe_dump(config).encode(), (*path[:-1], "?"), None
    if how == "extra":
        inner[dice.choice(["epsilon", "noise", "sed", "7"])] = dice.choice(VALUES)
        return yaml.safe_dump(config).encode(), (*path[:-1], "?"), None
    if how == "delete":
        del inner[last]
        return yaml.safe_dump(config).encode(), None, None
    text = bytearray(TINY.read_bytes())
    if how == "cut":
        return bytes(text[: dice.randrange(len(text))]), None, None
    if how == "twice":
        lines = TINY.read_text().splitlines(keepends=True)
        line = dice.randrange(len(lines))
        return "".join([*lines[: line + 1], *lines[line:]]).encode(), None, None
    for _ in range(dice.randint(1, 8)):
        text[dice.randrange(len(text))] = dice.randrange(256)
    return bytes(text), None, None


def says(resolved: Any, path: tuple[str, ...], value: Any) -> bool:
    """Tell whether a resolved configuration holds a value, up to the spelling of its type."""
    try:
        found = at(resolved, path)
    except (KeyError, TypeError):
        return False
    if isinstance(value, dict) or isinstance(found, dict):
        return isinstance(found, dict) and all(says(found, (key,), one) for key, one in dict(value or {}).items())
    if isinstance(value, str):
        return str(found).rpartition(".")[2] == value.rpartition(".")[2] or yaml.safe_load(value) == found
    return bool(found == value)


@pytest.mark.parametrize("number", [30, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_a_damaged_configuration_is_refused_in_one_line_or_obeyed(outcome, number):
    dice, refused, obeyed = random.Random(5), 0, 0
    for index in range(number):
        data, path, value = damaged(dice)
        try:
            resolved, line = outcome(data, index)
        except BaseException as error:
            shown = data.decode(errors="replace")
            raise AssertionError(
                f"case {index}, {path} = {value!r}: {type(error).__name__}: {error}\n{shown}"
            ) from error
        if line is not None:
            refused += 1
            continue
        obeyed += 1
        if path is not None:
            assert says(resolved, path, value), (index, path, value)
    assert refused > 0.4 * number
    assert obeyed > 0.02 * number

"""The shipped sweep file: every command that an agent would start from it is one that can run."""

import itertools
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from callbacks.evaluate_generator import flat_metrics
from lightning_dp.cli import plugins  # noqa: F401  (names in configurations)
from lightning_dp.cli.planning import plan_cli
from lightning_dp.evaluation.protocol import EvaluationResult

ROOT = Path(__file__).parents[2]
SWEEP = yaml.safe_load((ROOT / "configs" / "benchmark" / "wandb_sweep.yaml").read_text())


def agent_flags() -> list[list[str]]:
    """Return the flags of every run of the grid, as the agent writes them."""
    names = list(SWEEP["parameters"])
    rows = itertools.product(*(SWEEP["parameters"][name]["values"] for name in names))
    commands = [{"args": {name: {"value": value} for name, value in zip(names, row, strict=True)}} for row in rows]
    return [create_sweep_command_args(command)["args"] for command in commands]


@pytest.mark.filterwarnings("ignore")  # `main` silences what jsonargparse deprecates
@pytest.mark.parametrize("flags", [flags for flags in agent_flags() if "--seed_everything=2" in flags], ids=" ".join)
def test_every_run_of_the_sweep_is_planned_as_asked(flags, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-dp"])  # Lightning warns of a second command line
    command = SWEEP["command"]
    cli = plan_cli(ROOT / command[command.index("--config") + 1], *flags)
    asked = dict(flag.lstrip("-").split("=") for flag in flags)
    assert type(cli.privatizer.mechanism).__name__ == asked["mechanism"]
    assert cli.resolved()["privacy"]["target_epsilon"] == float(asked["privacy.target_epsilon"])
    assert cli.resolved()["seed_everything"] == 2


def test_the_sweep_maximises_a_number_that_runs_log():
    result = EvaluationResult.__new__(EvaluationResult)
    for field in EvaluationResult.__dataclass_fields__:
        object.__setattr__(result, field, {"cnn": 0.5} if field == "accuracy" else None)
    assert flat_metrics(result)[SWEEP["metric"]["name"]] == 0.5

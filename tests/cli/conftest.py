import pytest

from lightning_dp.cli import main
from tests.cli.runs import TINY, cli, fit

__all__ = ["cli", "fit"]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A run folder that tests may read but not change."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(["fit", "--config", str(TINY), "--run_dir", str(folder)]) == 0
    return folder

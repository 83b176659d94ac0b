"""The command from end to end on real runs: finished, refused, out of memory; on this machine, and on a Ray cluster."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from lightning_dp.benchmark.records import read_records
from tests.benchmark.made_up import write_grid
from tests.cli.runs import TINY, Outcome, read_json

TOO_MUCH = 10**13  # images to push with: hundreds of terabytes, which no system hands out


@pytest.fixture
def grid(tmp_path):
    """Two mechanisms of a method, one that it has no proof with, and a method that wants more memory than there is."""
    data = {"EmbeddedDigits": {"init_args": {"num_train": 200}}}
    greedy = {"model": {"init_args": {"pool_per_class": TOO_MUCH}}}
    methods = {
        "greedy": {"config": "base.yaml", "mechanisms": ["Gaussian"], "settings": greedy},
        "modest": {"config": "base.yaml", "mechanisms": ["Gaussian", "NoPrivacy", "AdaptiveGaussian"]},
    }
    base = yaml.safe_load(TINY.read_text())
    return write_grid(tmp_path, base=base, data=data, methods=methods, epsilons=[2], seeds=[1])


@pytest.fixture
def environment(tmp_path):
    """A home of its own, where Ray keeps the token of a cluster; its workers as urgent as other processes."""
    (tmp_path / "home").mkdir()
    return {**os.environ, "HOME": str(tmp_path / "home"), "RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0"}


@pytest.fixture
def cluster(environment):
    """The address of a Ray cluster of this machine, which another program has started."""
    pytest.importorskip("ray")
    begin = "import ray; print(ray.init(num_cpus=2, include_dashboard=False).address_info['gcs_address'], flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{begin}; input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as held:
        yield held.stdout.readline().strip()
        held.communicate("\n")


def check(cli, grid, out, *flags):
    """Run the comparison, look at all that it leaves, and run it again."""
    outcome = cli("benchmark", grid, "--out", out, *flags)
    assert outcome.code == 1
    records = {(record.method, record.mechanism): record for record in read_records(out)}
    statuses = {pair: record.status for pair, record in records.items()}
    assert statuses == {
        ("greedy", "Gaussian"): "failed",
        ("modest", "Gaussian"): "finished",
        ("modest", "NoPrivacy"): "finished",
        ("modest", "AdaptiveGaussian"): "refused",
    }
    failed, private = records["greedy", "Gaussian"], records["modest", "Gaussian"]
    assert "memory" in failed.reason.lower()
    assert "has no proof for teacher contributions" in records["modest", "AdaptiveGaussian"].reason
    card = read_json(out / private.card)
    assert (private.level, private.epsilon) == ("PROVED", card["claim"]["epsilon"])
    assert 1.99 < private.epsilon <= 2
    assert set(private.metrics) >= {"fid", "accuracy/logistic"}
    # It was stopped before its first release, so it is not on the bill.
    assert not list((out / "runs").glob("greedy-*/ledger.jsonl"))
    (spent,) = json.loads((out / "spending.json").read_text())
    assert (spent["num_runs"], spent["whole"]["num_releases"]) == (2, 2 * 5)
    assert spent["proved"]["epsilon"] == pytest.approx(private.epsilon)
    for text in ((out / "report.md").read_text(), (out / "report.html").read_text()):
        assert "has no proof for teacher contributions" in text
        assert "failed" in text
    before = (out / private.card).stat().st_mtime_ns
    again = cli("benchmark", grid, "--out", out, "--only", "modest", *flags)
    assert (again.code, (out / private.card).stat().st_mtime_ns) == (1, before)  # the failed cell is still on record


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_on_this_machine(cli, grid, tmp_path):
    check(cli, grid, tmp_path / "out", "--jobs", 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_on_a_ray_cluster_that_is_there(grid, cluster, environment, tmp_path):
    def cli(*arguments):
        command = [sys.executable, "-m", "lightning_dp", *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
        return Outcome(done.returncode, done.stdout, done.stderr)

    check(cli, grid, tmp_path / "out", "--backend", "ray", "--address", cluster)
    wrong = {**environment, "RAY_AUTH_TOKEN": "0" * 32}
    command = [sys.executable, "-m", "lightning_dp", "benchmark", grid, "--backend", "ray", "--address", cluster]
    refused = subprocess.run([*map(str, command)], env=wrong, capture_output=True, text=True)
    assert (refused.returncode, "RAY_AUTH_TOKEN" in refused.stderr) == (2, True), refused.stderr

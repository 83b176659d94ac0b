"""Budgets of data sets for tests: what a run asks of one, and how large one is that holds so much."""

import pytest

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.budget_request import DatasetBudgetSettings, RunRequest
from lightning_dp.accounting.dataset_budget import DatasetBudget
from lightning_dp.accounting.events import GaussianRelease, Sampling

FULL = Sampling(scheme="full")
POISSON = Sampling(scheme="poisson", rate=0.02)
DELTA = 1e-5
HEADER = {
    "relation": "replace_one",
    "unit": "record (through the one teacher that holds it)",
    "mechanism": "Gaussian",
    "target_delta": DELTA,
    "dataset": "digits",
    "fingerprint": "f1",
    "num_records": 200,
}


def gaussian(noise=10.0):
    return GaussianRelease(noise_std=noise, l2_sensitivity=1.0)


def request(run, count=5, event=None, sampling=FULL, **header):
    return RunRequest(run=run, name=run, header=HEADER | header, needed={(event or gaussian(), sampling): count})


def flags(folder, epsilon=3.0, **options):
    return DatasetBudgetSettings(folder=str(folder), epsilon=epsilon, **options)


def room_for(count, event=None):
    """An epsilon that holds exactly so many releases."""
    return compute_epsilon({(event or gaussian(), FULL): count}, delta=DELTA, relation="replace_one").epsilon * (
        1 + 1e-9
    )


@pytest.fixture
def budget(tmp_path):
    return DatasetBudget(tmp_path / "budget")


def reserve(budget, *requests, **options):
    return budget.reserve(flags(budget.folder, **options), list(requests))

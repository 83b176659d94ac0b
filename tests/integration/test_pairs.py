"""Every pair of a method and a mechanism that the matrix allows makes two releases; all others are refused in words."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from callbacks import GradientPrivatizer, PrivacyAccountant
from lightning_dp.benchmark.matrix import judge_pair
from lightning_dp.cli.audit import small_run
from lightning_dp.cli.audit_table import _one_of_each
from lightning_dp.cli.matrix import _mechanism_class, _own_mechanism, _variants
from lightning_dp.cli.messages import subclass_names
from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.base import Mechanism
from tests.conftest import trainer_for

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "experiment").glob("*.yaml"))
KNOWN = {path: _own_mechanism(path) for path in CONFIGS}
CHOSEN = _one_of_each(sorted(CONFIGS, key=lambda path: "_cpu" not in path.stem), None)  # the smaller networks
NUM_RELEASES = 2


def mechanisms_of(path: Path) -> dict[str, list[Mechanism]]:
    """Return every mechanism of ours, in the variants that the matrix tries; other tests make broken ones."""
    names = [
        name for name in subclass_names(Mechanism) if _mechanism_class(name).__module__.startswith("lightning_dp.")
    ]
    return {name: list(_variants(name, KNOWN[path], KNOWN.values())) for name in names}


def first_with_a_proof(run, variants, relation):
    for mechanism in variants:
        if relation in judge_pair("one", run.module, run.data, [mechanism]).levels:
            return mechanism
    raise AssertionError("the matrix allows a pair that none of its variants has a proof for")


def make_run(run, mechanism, relation, folder):
    """Train a copy of the method for two releases, and return accountant and published network."""
    # Much noise: small privacy loss distributions.
    privacy = replace(run.privacy, neighboring_relation=relation, noise_multiplier=8.0)
    accountant = PrivacyAccountant(privacy=privacy)
    privatizer = GradientPrivatizer(mechanism=copy.copy(mechanism), accountant=accountant)
    module = copy.deepcopy(run.module)
    trainer_for(folder, [privatizer, accountant], NUM_RELEASES).fit(module, datamodule=copy.copy(run.data))
    return accountant, module.released_model()


@pytest.mark.filterwarnings("ignore")  # of libraries, which the command line keeps quiet
@pytest.mark.parametrize("path", CHOSEN, ids=lambda path: path.stem)
def test_every_allowed_pair_makes_two_releases(path, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-dp"])  # Lightning warns of a second command line
    trained = "DiscriminatorTeachers" in path.read_text()
    run = small_run(path, *(("--model.teachers.network", "mlp") if trained else ()), steps=NUM_RELEASES)()
    allowed = 0
    for name, variants in mechanisms_of(path).items():
        pair = judge_pair(path.stem, run.module, run.data, variants)
        if not pair.runs:
            with pytest.raises(ConfigurationError, match=r"has no proof|Expected|needs"):
                make_run(run, variants[0], next(iter(pair.refusals)), tmp_path)
            continue
        allowed += 1
        relation = next(iter(pair.levels))
        accountant, network = make_run(run, first_with_a_proof(run, variants, relation), relation, tmp_path)
        claim = accountant.claim()
        assert (len(accountant.ledger), claim.level, claim.relation) == (NUM_RELEASES, pair.levels[relation], relation)
        assert (claim.epsilon is None) == (name == "NoPrivacy")
        assert all(torch.isfinite(value).all() for value in network.state_dict().values())
    assert allowed >= 2  # with noise, and without

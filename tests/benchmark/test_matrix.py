"""The matrix asks the code: who runs with whom, under which relation, at which level, and why not."""

from dp_accounting import NeighboringRelation

from lightning_dp.accounting.claim import ClaimLevel
from lightning_dp.benchmark.matrix import cell_text, judge_pair, merged_methods
from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.base import ContributionSpec
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.no_privacy import NoPrivacy
from lightning_dp.mechanisms.topagg import TopAgg
from tests.conftest import TinyData, tiny_gan


def judge(*mechanisms, name="tiny", **options):
    return judge_pair(name, tiny_gan(**options), TinyData(), mechanisms)


def test_a_pair_with_a_proof():
    pair = judge(Gaussian())
    assert pair.levels == {"replace_one": ClaimLevel.PROVED, "replace_special": ClaimLevel.PROVED}
    assert list(pair.refusals) == ["add_or_remove_one"]
    assert "add_or_remove_one has no proof" in pair.refusals["add_or_remove_one"]


def test_a_run_without_privacy():
    assert set(judge(NoPrivacy()).levels.values()) == {ClaimLevel.NONPRIVATE}


def test_a_pair_without_a_proof(monkeypatch):
    monkeypatch.setattr(Gaussian, "kinds", frozenset({"record"}))
    pair = judge(Gaussian())
    assert not pair.runs
    assert set(pair.refusals.values()) == {
        "--mechanism Gaussian has no proof for teacher contributions; it supports: record."
    }


def test_a_relation_without_a_proof_is_seen(monkeypatch):
    """The table follows the code, not a list of its own."""

    def alternatives(self, relation):
        if relation is not NeighboringRelation.REPLACE_SPECIAL:
            raise ConfigurationError("no\nproof")
        return self.changes[relation]

    monkeypatch.setattr(ContributionSpec, "alternatives", alternatives)
    pair = judge(Gaussian())
    assert list(pair.levels) == ["replace_special"]
    assert pair.refusals["replace_one"] == "no proof"


def test_the_first_options_that_run_decide():
    """Options of another configuration are tried before a pair is called impossible."""
    assert not judge(TopAgg(top_k=500)).runs
    assert judge(TopAgg(top_k=500), TopAgg(top_k=4)).runs


def test_cells_point_to_reasons():
    reasons = []
    assert cell_text(judge(Gaussian()), reasons) == "PROVED R Z; A refused [1]"
    assert cell_text(judge(NoPrivacy()), reasons) == "NONPRIVATE R Z; A refused [1]"
    assert cell_text(judge(TopAgg(top_k=500)), reasons) == "refused [2]"
    assert "top_k" in reasons[1]


def test_configurations_with_equal_answers_share_a_line():
    pairs = [judge(Gaussian(), name=name) for name in ("a", "b")] + [judge(TopAgg(top_k=500), name="c")]
    assert list(merged_methods(pairs)) == ["a, b", "c"]

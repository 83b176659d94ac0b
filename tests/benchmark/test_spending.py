"""The ledger of a whole comparison: all on one data set composed, nothing left out, two relations never one number."""

import pytest

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.claim import ClaimLevel
from lightning_dp.accounting.events import NonPrivateRelease, Sampling
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.benchmark.spending import read_ledgers, total_spending
from lightning_dp.errors import LedgerError
from tests.benchmark.made_up import DELTA, FULL, RELATION, gaussian, ledger_at


def put(folder, name, event, releases=3, **header):
    return ledger_at(folder / "runs" / name / "ledger.jsonl", event, releases, **header)


def spent(folder, delta=DELTA):
    return total_spending(read_ledgers(folder), delta=delta)


def test_all_runs_together_cost_what_their_union_costs(tmp_path):
    put(tmp_path, "a", gaussian(5.0), 3)
    put(tmp_path, "b", gaussian(5.0), 4, mechanism="TopAgg")
    put(tmp_path, "c", gaussian(9.0), 2)
    (found,) = spent(tmp_path)
    union = {(gaussian(5.0), FULL): 7, (gaussian(9.0), FULL): 2}
    whole = compute_epsilon(union, delta=DELTA, relation=RELATION).epsilon
    assert found.whole.epsilon == whole
    assert found.num_runs == found.num_proved == 3
    assert found.proved is None
    alone = compute_epsilon({(gaussian(5.0), FULL): 4}, delta=DELTA, relation=RELATION).epsilon
    assert whole > alone  # the broken twin: the worst single run
    assert found.whole.mechanism == "Gaussian, TopAgg"
    assert "all 3 runs together" in found.lines()[0]
    assert f"epsilon={whole:.2f}"[:11] in found.lines()[0]


def test_unfinished_runs_count(tmp_path):
    """A run without a card, killed after its first release."""
    put(tmp_path, "a", gaussian(5.0), 3)
    before = spent(tmp_path)[0].whole.epsilon
    put(tmp_path, "killed", gaussian(5.0), 1)
    assert spent(tmp_path)[0].whole.epsilon > before


def test_a_run_that_released_nothing_costs_nothing(tmp_path):
    put(tmp_path, "a", gaussian(5.0), 3)
    put(tmp_path, "b", gaussian(5.0), 0)
    assert spent(tmp_path)[0].num_runs == 1


def test_a_run_without_privacy_takes_the_epsilon_away(tmp_path):
    put(tmp_path, "a", gaussian(5.0), 3)
    put(tmp_path, "b", NonPrivateRelease(), 3, mechanism="NoPrivacy")
    (found,) = spent(tmp_path)
    assert found.whole.level is ClaimLevel.NONPRIVATE
    assert found.whole.epsilon is None
    assert found.proved.epsilon == compute_epsilon({(gaussian(5.0), FULL): 3}, delta=DELTA, relation=RELATION).epsilon
    first, second = found.lines()
    assert "epsilon=" not in first
    assert "the 1 PROVED run alone" in second


@pytest.mark.parametrize(
    ("header", "level"),
    [
        ({"unverified": ["that noise is secret"]}, ClaimLevel.UNVERIFIED),
        ({"conditional_on": ["an encoder"]}, ClaimLevel.CONDITIONAL),
    ],
)
def test_a_condition_of_one_is_a_condition_of_all(tmp_path, header, level):
    put(tmp_path, "a", gaussian(5.0), 3)
    put(tmp_path, "b", gaussian(5.0), 3, **header)
    (found,) = spent(tmp_path)
    assert found.whole.level is level
    assert found.whole.epsilon is None
    assert found.num_proved == 1
    assert found.whole.assumptions == tuple(next(iter(header.values())))


def test_assumed_sampling_is_no_proof(tmp_path):
    ledger = PrivacyLedger({"relation": RELATION, "unit": "record", "dataset": "digits"}, None)
    ledger.append(gaussian(5.0), Sampling(scheme="poisson", rate=0.1, executed=False))
    (found,) = total_spending([ledger], delta=DELTA)
    assert found.whole.level is ClaimLevel.UNVERIFIED
    assert found.num_proved == 0


def test_two_relations_are_two_numbers(tmp_path):
    put(tmp_path, "a", gaussian(5.0), 3)
    put(tmp_path, "b", gaussian(5.0), 3, relation="replace_special")
    assert [found.whole.relation for found in spent(tmp_path)] == ["replace_one", "replace_special"]
    assert [found.num_runs for found in spent(tmp_path)] == [1, 1]


def test_parts_of_a_data_set_share_records(tmp_path):
    """num_train=200 and the whole set have two fingerprints, and a record may be in both."""
    put(tmp_path, "a", gaussian(5.0), 3, num_records=200, fingerprint="x")
    put(tmp_path, "b", gaussian(5.0), 3)
    put(tmp_path, "c", gaussian(5.0), 3, dataset="fashion")
    assert [(found.dataset, found.num_runs) for found in spent(tmp_path)] == [("digits", 2), ("fashion", 1)]


def test_units_in_one_way_or_another(tmp_path):
    put(tmp_path, "a", gaussian(5.0), unit="record (through the one teacher that holds it)")
    assert spent(tmp_path)[0].whole.unit == "record (through the one teacher that holds it)"
    put(tmp_path, "b", gaussian(5.0))
    assert spent(tmp_path)[0].whole.unit == "record"


def test_delta_is_the_comparisons(tmp_path):
    put(tmp_path, "a", gaussian(5.0), 3)
    assert spent(tmp_path, delta=1e-6)[0].whole.epsilon > spent(tmp_path, delta=1e-5)[0].whole.epsilon
    assert any("1 / num_records" in text for text in spent(tmp_path, delta=1e-2)[0].whole.warnings)


def test_an_altered_ledger_stops_the_sum(tmp_path):
    put(tmp_path, "a", gaussian(5.0), 3)
    path = tmp_path / "runs" / "a" / "ledger.jsonl"
    path.write_text(path.read_text().replace('"noise_std":5.0', '"noise_std":9.0', 1))
    with pytest.raises(LedgerError, match="What the comparison spent cannot be told"):
        read_ledgers(tmp_path)


def test_nothing_spent(tmp_path):
    assert spent(tmp_path) == []

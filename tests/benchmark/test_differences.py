"""What tells cards apart, and nothing that a card may not say."""

import pytest

from lightning_dp.accounting.events import NonPrivateRelease
from lightning_dp.benchmark.differences import MISSING, card_lines
from tests.benchmark.made_up import evaluation, result


def lines(*cards, all_of_them=False):
    found = {f"{line.part}: {line.name}": line.values for line in card_lines(cards) if all_of_them or line.is_different}
    assert all(len(values) == len(cards) for values in found.values())
    return found


def test_equal_cards(tmp_path):
    card = result(tmp_path).card
    assert lines(card, card) == {}
    assert lines(card, card, all_of_them=True)["claim: epsilon"] == ("1.0000", "1.0000")


def test_epsilon_budget_quality_and_settings(tmp_path):
    one = result(tmp_path, epsilon=1.0, judged=evaluation(0.8)).card
    other = result(tmp_path, epsilon=2.0, seed=5, judged=evaluation(0.9), mechanism="TopAgg").card
    found = lines(one, other)
    assert found["claim: epsilon"] == ("1.0000", "2.0000")
    assert found["budget: target_epsilon"] == ("1", "2")
    assert found["claim: mechanism"] == ("Gaussian", "TopAgg")
    assert found["quality: accuracy/cnn"] == ("0.8", "0.9")
    assert found["config: seed_everything"] == ("1", "5")
    assert "claim: relation" not in found
    assert not [name for name in found if name.startswith("cost")]


@pytest.mark.parametrize("changes", [{"event": NonPrivateRelease()}, {"unverified": ["x"]}, {"conditional_on": ["x"]}])
def test_no_epsilon_without_a_proof(tmp_path, changes):
    """Neither spent nor asked: the configuration holds the target, the comparison leaves it out."""
    found = lines(result(tmp_path).card, result(tmp_path, epsilon=7.0, **changes).card)
    assert found["claim: epsilon"] == ("1.0000", MISSING)
    assert found["budget: target_epsilon"] == ("1", MISSING)
    assert not any("7" in values[1].replace("1e-07", "") for name, values in found.items() if "epsilon" in name)


def test_metrics_of_two_protocols_do_not_compare(tmp_path):
    found = lines(result(tmp_path).card, result(tmp_path, judged=evaluation(fid=3.0, protocol="ddddeeeeffff")).card)
    assert found["quality: metric protocol"] == ("aaaabbbbcccc", "ddddeeeeffff")
    assert "do not compare" in found["quality: note"][1]


def test_three_cards_and_what_one_lacks(tmp_path):
    cards = [result(tmp_path, judged=evaluation(value)).card for value in (0.7, 0.8)]
    judged = {"accuracy": {"test": 0.97}, "num_test": 10, "wall_time_s": 1.0}
    found = lines(*cards, result(tmp_path, judged=judged).card)
    assert found["quality: accuracy/cnn"] == ("0.7", "0.8", MISSING)
    assert found["quality: accuracy/test"] == (MISSING, MISSING, "0.97")
    assert found["quality: metric protocol"][2] == "accuracy of a released classifier"

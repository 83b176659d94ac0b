"""The budget of a data set: runs reserve before they release, and none crosses it."""

import math

import pytest

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.budget_request import DatasetBudgetSettings
from lightning_dp.accounting.budget_state import NOT_COVERED
from lightning_dp.accounting.claim import ClaimLevel
from lightning_dp.accounting.coverage import DEFAULT_NOT_COVERED
from lightning_dp.accounting.events import NonPrivateRelease, Sampling
from lightning_dp.accounting.filters import make_filter
from lightning_dp.errors import BudgetExceededError, ConfigurationError
from tests.accounting.budgets import DELTA, FULL, POISSON, budget, flags, gaussian, request, reserve, room_for

__all__ = ["budget"]


class TestAdmission:
    def test_runs_are_admitted_until_the_budget_is_full(self, budget):
        epsilon = room_for(12)
        reserve(budget, request("a"), epsilon=epsilon)
        reserve(budget, request("b"), epsilon=epsilon)
        with pytest.raises(BudgetExceededError, match=r"16\.7 % of it is left, and 41\.7 % is asked") as caught:
            reserve(budget, request("c"), epsilon=epsilon)
        assert "2 releases (now 5)" in str(caught.value)
        assert "\n" not in str(caught.value)
        reserve(budget, request("c", 2), epsilon=epsilon)  # what it said would fit
        assert budget.state().spent == pytest.approx(1.0)
        with pytest.raises(BudgetExceededError, match="Nothing of this kind would fit"):
            reserve(budget, request("d", 1), epsilon=epsilon)

    def test_the_noise_that_it_names_fits(self, budget):
        reserve(budget, request("a"), epsilon=room_for(7))
        with pytest.raises(BudgetExceededError, match=r"noise multiplier about ([\d.]+)") as caught:
            budget.reserve(DatasetBudgetSettings(folder=str(budget.folder)), [request("b")])
        noise = float(str(caught.value).rpartition("about ")[2].rstrip("."))
        assert noise == pytest.approx(10 * math.sqrt(5 / 2), rel=1e-3)
        budget.reserve(DatasetBudgetSettings(folder=str(budget.folder)), [request("b", event=gaussian(1.001 * noise))])

    def test_a_check_writes_nothing(self, budget):
        budget.check(flags(budget.folder), [request("a")])
        assert not budget.folder.exists()
        reserve(budget, request("a"), epsilon=room_for(5))
        before = budget._file.path.read_bytes()
        with pytest.raises(BudgetExceededError):
            budget.check(flags(budget.folder, None), [request("b")])
        assert budget._file.path.read_bytes() == before

    def test_a_run_reserves_once_and_only_what_it_lacks(self, budget):
        for _ in range(3):
            reserve(budget, request("a"))
        assert budget.state().counts == {(gaussian(), FULL): 5}
        reserve(budget, request("a", 8))
        assert budget.state().counts == {(gaussian(), FULL): 8}
        reserve(budget, request("a", 2))  # what was reserved once stays
        assert budget.state().counts == {(gaussian(), FULL): 8}

    def test_a_list_is_admitted_as_a_whole_or_not_at_all(self, budget):
        epsilon = room_for(12)
        with pytest.raises(BudgetExceededError):
            reserve(budget, request("a"), request("b"), request("c"), epsilon=epsilon)
        assert not budget._file.path.exists()
        reserve(budget, request("a"), request("b"), epsilon=epsilon)
        assert list(budget.state().runs) == ["a", "b"]

    def test_the_first_list_is_composed_by_an_accountant(self, budget):
        """One sampled run at the whole epsilon: PLD lets it through, the Renyi rule would not; then it is full."""
        run = request("a", 2000, gaussian(1.0), POISSON)
        epsilon = compute_epsilon(run.needed, delta=DELTA, relation="replace_one").epsilon
        reserve(budget, run, epsilon=epsilon)
        state = budget.state()
        assert state.terms.rule == "renyi"
        assert state.spent > 1
        assert state.claim().epsilon == epsilon
        assert state.claim(1e-6).epsilon == compute_epsilon(run.needed, delta=1e-6, relation="replace_one").epsilon
        with pytest.raises(BudgetExceededError, match="0 % of it is left"):
            reserve(budget, request("b", 1, gaussian(1000.0)), epsilon=epsilon)

    def test_many_sampled_runs_share_by_the_renyi_rule(self, budget):
        runs = [request(name, 500, gaussian(2.0), POISSON) for name in "abcd"]
        reserve(budget, runs[0], epsilon=4.0)
        for run in runs[1:]:
            reserve(budget, run, epsilon=4.0)
        state = budget.state()
        composed = state.composed().epsilon
        assert state.claim().epsilon == 4.0
        assert composed <= 4.0 * state.spent**0.5 + 0.2
        assert state.spent <= 1

    def test_a_sampled_run_is_refused_where_the_gaussian_rule_was_fixed(self, budget):
        reserve(budget, request("a"))
        with pytest.raises(ConfigurationError, match="renyi rule"):
            reserve(budget, request("b", 5, sampling=POISSON))
        assert list(budget.state().runs) == ["a"]

    def test_and_both_kinds_share_a_budget_that_was_opened_for_them(self, budget):
        reserve(budget, request("a"), rule="renyi")
        reserve(budget, request("b", 5, sampling=POISSON))
        assert budget.state().terms.rule == "renyi"


class TestStatement:
    def test_the_claim_is_the_budgets_and_the_list_is_composed_on_joined_events(self, budget):
        reserve(budget, request("a", 3))
        reserve(budget, request("b", 4, gaussian(20.0), target_delta=1e-3))  # its own delta plays no part
        state = budget.state()
        union = {(gaussian(), FULL): 3, (gaussian(20.0), FULL): 4}
        for delta in (1e-5, 1e-7, 1e-3):
            assert state.composed(delta).epsilon == compute_epsilon(union, delta=delta, relation="replace_one").epsilon
            assert state.claim(delta).epsilon >= state.composed(delta).epsilon
        assert state.claim().epsilon == 3.0
        assert state.claim().level is ClaimLevel.PROVED
        assert "(epsilon=3.000, delta=1e-05)-DP per record, replace-one" in state.claim().statement()
        # the broken twins: adding epsilons at unlike deltas, or the worst single run
        assert (
            state.composed().epsilon
            != compute_epsilon({(gaussian(), FULL): 3}, delta=DELTA, relation="replace_one").epsilon
        )

    def test_what_one_run_leaves_out_the_whole_leaves_out(self, budget):
        """Of its list, what is the usual of a single run is said in other words, or once."""
        own = "records that are public images as well"
        for run, header in {"a": {}, "b": {"not_covered": [*DEFAULT_NOT_COVERED, own]}}.items():
            reserve(budget, request(run, 1, **header))
        assert budget.state().claim().not_covered == (*NOT_COVERED, own)

    def test_one_list_is_claimed_as_composed(self, budget):
        reserve(budget, request("a", 3), request("b", 4))
        union = {(gaussian(), FULL): 7}
        expected = compute_epsilon(union, delta=DELTA, relation="replace_one").epsilon
        assert budget.state().claim().epsilon == expected

    @pytest.mark.parametrize(
        ("event", "sampling", "header", "level"),
        [
            (NonPrivateRelease(), FULL, {}, "NONPRIVATE"),
            (gaussian(), Sampling(scheme="poisson", rate=0.5, executed=False), {}, "UNVERIFIED"),
            (gaussian(), FULL, {"unverified": ["that noise is secret"]}, "UNVERIFIED"),
            (gaussian(), FULL, {"conditional_on": ["a public extractor"]}, "CONDITIONAL"),
        ],
    )
    def test_a_run_that_is_not_proved_needs_a_word_and_takes_the_epsilon(self, budget, event, sampling, header, level):
        reserve(budget, request("a"), rule="renyi", epsilon=9.0)
        run = request("b", 3, event, sampling, **header)
        with pytest.raises(ConfigurationError, match=rf"{level}.*allow_unproved"):
            reserve(budget, run, epsilon=9.0)
        assert budget.state().claim().level is ClaimLevel.PROVED
        reserve(budget, run, epsilon=9.0, allow_unproved=True)
        claim = budget.state().claim()
        assert (str(claim.level), claim.epsilon, budget.state().composed()) == (level, None, None)
        assert "epsilon=" not in claim.statement()

    def test_private_runs_beside_one_without_privacy_still_keep_their_budget(self, budget):
        reserve(budget, request("a", 3, NonPrivateRelease()), epsilon=room_for(5), allow_unproved=True, rule="gaussian")
        reserve(budget, request("b", 5), epsilon=room_for(5))
        with pytest.raises(BudgetExceededError):
            reserve(budget, request("c", 5), epsilon=room_for(5))


class TestTerms:
    @pytest.mark.parametrize(
        ("header", "match"),
        [
            ({"relation": "add_or_remove_one"}, "relation='replace_one'.*relation='add_or_remove_one'"),
            ({"fingerprint": "f2"}, "fingerprint='f1'.*fingerprint='f2'"),
            ({"dataset": "faces"}, "dataset='digits'.*dataset='faces'"),
            ({"unit": "teacher"}, "unit='record'.*unit='teacher'"),
        ],
    )
    def test_other_records_relations_and_units_are_refused(self, budget, header, match):
        reserve(budget, request("a"))
        with pytest.raises(ConfigurationError, match=match):
            reserve(budget, request("b", **header))

    def test_every_way_to_reach_a_record_is_one_unit(self, budget):
        reserve(budget, request("a"))
        reserve(budget, request("b", unit="record"))

    def test_the_first_run_fixes_the_terms(self, budget):
        with pytest.raises(ConfigurationError, match=r"--dataset_budget\.epsilon"):
            budget.reserve(DatasetBudgetSettings(folder=str(budget.folder)), [request("a")])
        reserve(budget, request("a"), delta=1e-6)
        for options in ({"epsilon": 4.0}, {"delta": 1e-5}, {"rule": "renyi"}):
            with pytest.raises(ConfigurationError, match="was fixed with"):
                budget.reserve(DatasetBudgetSettings(folder=str(budget.folder), **options), [request("b")])
        budget.reserve(DatasetBudgetSettings(folder=str(budget.folder)), [request("b")])

    @pytest.mark.parametrize(
        "options",
        [
            {"epsilon": 0.0},
            {"epsilon": math.inf},
            {"epsilon": math.nan},
            {"delta": 0.0},
            {"delta": 1.0},
            {"rule": "pld"},
        ],
    )
    def test_settings_are_checked(self, options):
        with pytest.raises(ConfigurationError):
            DatasetBudgetSettings(folder="x", **options)

    def test_settings_without_a_folder_would_be_ignored(self):
        for options in ({"epsilon": 1.0}, {"allow_unproved": True}, {"reservation": "x"}):
            with pytest.raises(ConfigurationError, match="needs the folder"):
                DatasetBudgetSettings(**options)


def test_the_limit_is_kept_to_the_last_bit():
    rule = make_filter("gaussian", epsilon=1.0, delta=DELTA)
    exact = {(gaussian(1 / math.sqrt(rule.limit)), FULL): 1}
    assert compute_epsilon(exact, delta=DELTA, relation="replace_one").epsilon <= 1.0

"""Whether one more release would cross a budget, and what is remembered between such questions."""

import math
import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_dp.accounting import accountants, composition
from lightning_dp.accounting.accountants import compute_epsilon, would_exceed
from lightning_dp.accounting.events import (
    GaussianRelease,
    NonPrivateRelease,
    Sampling,
    ZCDPRelease,
)
from lightning_dp.errors import ConfigurationError
from tests.accounting.test_accountants import DELTA, FULL, epsilon, gaussian, poisson
from tests.accounting.test_published_numbers import datalens


def ask(counts, extra, budget, *, relation="replace_one", **options):
    return would_exceed(counts, extra, budget_epsilon=budget, delta=DELTA, relation=relation, **options)


def test_would_exceed_stops_exactly_at_the_largest_allowed_count():
    one = (datalens(15), FULL)
    assert not ask({one: 148}, one, 1.0)
    assert ask({one: 149}, one, 1.0)
    assert ask({one: 86}, one, epsilon({one: 86}))
    assert not ask({one: 85}, one, epsilon({one: 86}))


def test_would_exceed_counts_other_events_too():
    one, other = (datalens(15), FULL), (gaussian(10.0), FULL)
    assert not ask({other: 1}, one, 1.0)
    assert ask({other: 8}, one, 1.0)
    assert ask({}, (NonPrivateRelease(), FULL), 1e9)
    assert ask({(NonPrivateRelease(), FULL): 1}, one, 1e9)
    assert not ask({}, (NonPrivateRelease(), FULL), math.inf)


@settings(max_examples=30, deadline=None)
@given(noise=st.floats(1, 100), count=st.integers(0, 200), budget=st.floats(0.05, 20))
def test_would_exceed_is_compute_epsilon_of_one_more(noise, count, budget):
    for event in (gaussian(noise), ZCDPRelease(rho=1 / noise)):
        after = epsilon({(event, FULL): count + 1})
        assume(abs(after - budget) > 1e-9)
        assert ask({(event, FULL): count}, (event, FULL), budget) == (after > budget)


def test_would_exceed_with_sampling_agrees_with_the_full_accountant_and_remembers(monkeypatch):
    one = (gaussian(1.1), poisson(0.01))
    allowed = 231
    budget = epsilon({one: allowed})
    assert not ask({one: allowed - 1}, one, budget, relation="add_or_remove_one")
    assert ask({one: allowed}, one, budget, relation="add_or_remove_one")
    calls = []
    monkeypatch.setattr(composition, "_pld", lambda *args, **kwargs: calls.append(args))
    composition.compose.cache_clear()
    answers = [ask({one: n}, one, budget, relation="add_or_remove_one") for n in range(allowed - 20, allowed + 20)]
    assert answers == [False] * 20 + [True] * 20
    assert not calls


def test_would_exceed_trusts_a_plan_that_keeps_the_budget_and_no_other(monkeypatch):
    one, other = (gaussian(1.1), poisson(0.01)), (gaussian(1.3), poisson(0.01))
    budget = epsilon({one: 231})

    def searched(*args):
        raise AssertionError("the plan answers")

    with monkeypatch.context() as patched:
        patched.setattr(accountants, "_allowed_count", searched)
        assert not ask({one: 230}, one, budget, relation="add_or_remove_one", planned={one: 231})
    assert ask({one: 231}, one, budget, relation="add_or_remove_one", planned={one: 232})  # planned beyond the budget
    assert ask({one: 231}, one, budget, relation="add_or_remove_one", planned={one: 231})  # not in the plan
    assert ask({one: 231}, other, budget, relation="add_or_remove_one", planned={one: 231})


def test_would_exceed_under_the_chosen_accountant():
    one = (datalens(15), FULL)
    limit = {"gaussian": 149, "rdp": 127, "pld": 149}
    for accountant, allowed in limit.items():
        assert not ask({one: allowed - 1}, one, 1.0, accountant=accountant)
        assert ask({one: allowed}, one, 1.0, accountant=accountant)


@pytest.mark.parametrize("budget", [-1.0, math.nan])
def test_would_exceed_refuses_a_senseless_budget(budget):
    with pytest.raises(ConfigurationError, match="budget_epsilon >= 0"):
        ask({}, (gaussian(1.0), FULL), budget)


def test_closed_form_is_asked_once_whatever_the_count(monkeypatch):
    calls = []
    real = composition.dp_accounting.get_epsilon_gaussian
    monkeypatch.setattr(
        composition.dp_accounting, "get_epsilon_gaussian", lambda *args: calls.append(args) or real(*args)
    )
    epsilon({(gaussian(123.456), FULL): 10**6})
    assert len(calls) == 1


class TestWhatIsRemembered:
    """Answers that are remembered are those that would be computed."""

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("rate", [1.0, 0.1])
    def test_any_order_of_questions_gets_the_same_answers(self, seed, rate):
        event = GaussianRelease(noise_std=20.0, l2_sensitivity=1.0)
        sampling = Sampling(scheme="full") if rate == 1 else Sampling(scheme="poisson", rate=rate)
        other = (GaussianRelease(noise_std=7.0, l2_sensitivity=1.0), Sampling(scheme="full"))
        questions = [
            (count, first, delta) for count in (0, 1, 5, 60, 130, 200) for first in (0, 2) for delta in (1e-5, 1e-7)
        ]
        options = {"relation": "add_or_remove_one", "accountant": "auto"}
        for count, first, delta in random.Random(seed).sample(questions, len(questions)):
            counts = {(event, sampling): count, other: first}
            after = {(event, sampling): count + 1, other: first}
            wanted = compute_epsilon(after, delta=delta, **options).epsilon > 2.0
            assert would_exceed(counts, (event, sampling), budget_epsilon=2.0, delta=delta, **options) == wanted

"""A claim shows an epsilon only when it is proved, says what it rests on, and survives JSON."""

import json
import math
import re
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.budget_state import NOT_COVERED as OF_A_BUDGET
from lightning_dp.accounting.claim import ClaimLevel, PrivacyClaim
from lightning_dp.accounting.claiming import claim_from_ledger, make_claim
from lightning_dp.accounting.coverage import DEFAULT_NOT_COVERED, default_not_covered, selection_not_covered
from lightning_dp.accounting.events import (
    GaussianRelease,
    NonPrivateRelease,
    RoundedGaussianRelease,
    Sampling,
    ZCDPRelease,
)
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.benchmark.spending import _NOT_COVERED as OF_A_COMPARISON
from lightning_dp.errors import ConfigurationError
from lightning_dp.modules import release

FULL = Sampling(scheme="full")
POISSON = Sampling(scheme="poisson", rate=0.01)
ASSUMED = Sampling(scheme="poisson", rate=0.01, executed=False)
STEP = GaussianRelease(noise_std=5000.0, l2_sensitivity=2 * math.sqrt(200 * 15))
COUNTS = {(STEP, FULL): 86}


def claim_of(counts=COUNTS, **changed):
    facts = {"delta": 1e-5, "relation": "replace_one", "unit": "record", "mechanism": "TopAgg", "num_records": 60000}
    return make_claim(counts, **(facts | changed))


def test_proved_claim():
    claim = claim_of()
    assert claim.level is ClaimLevel.PROVED
    assert claim.epsilon == pytest.approx(0.738125, abs=1e-5)
    assert claim.statement() == (
        "(epsilon=0.739, delta=1e-05)-DP per record, replace-one, exact Gaussian accountant, "
        "86 releases of TopAgg: PROVED"
    )
    assert (claim.warnings, claim.assumptions) == ((), ())
    assert claim.not_covered == DEFAULT_NOT_COVERED
    assert claim.sampler == "all records in every release"


def test_default_scope_names_what_is_not_covered():
    text = " ".join(DEFAULT_NOT_COVERED)
    for part in (
        "hyper-parameters",
        "labels",
        "number of records",
        "floating-point",
        "time and memory",
        "other runs",
        "held-out",
    ):
        assert part in text


def test_every_claim_names_what_is_left_to_the_word_of_an_author():
    """Every class of the door that calls itself a promise, and weights, which no door sees."""
    promises = re.findall(r'^class (\w+):\n    """A promise:', Path(release.__file__).read_text(), re.MULTILINE)
    assert {"PublicRows", "PublicSamples"} <= set(promises)
    exact = (RoundedGaussianRelease(noise_std=5000.0, l2_sensitivity=100.0), FULL)
    of_runs = (DEFAULT_NOT_COVERED, default_not_covered({exact: 1}), OF_A_BUDGET, OF_A_COMPARISON)
    for texts in (*of_runs, *(selection_not_covered(COUNTS, is_random=random) for random in (True, False))):
        for name in (*promises, "initial weights", "Released.map"):
            assert any(name in text for text in texts), name


def test_the_gap_of_floating_point_is_closed_only_if_all_noise_was_drawn_exactly():
    exact = (RoundedGaussianRelease(noise_std=5000.0, l2_sensitivity=100.0), FULL)
    gap = "the gap between real-valued noise and the floating-point sampler"
    for counts, is_open in (
        ({exact: 3}, False),
        ({exact: 3, (STEP, FULL): 1}, True),
        ({(STEP, FULL): 1}, True),
        ({}, True),
    ):
        claim = claim_of(counts)
        assert (gap in claim.not_covered) == is_open
        assert any("last bits of a row" in text for text in claim.not_covered) != is_open
        assert len(claim.not_covered) == len(DEFAULT_NOT_COVERED)
    # A plan that ends in floating-point noise is not exact before it gets there.
    assert gap in claim_of({exact: 3}, planned={exact: 3, (STEP, FULL): 1}).not_covered
    assert PrivacyClaim.from_dict(json.loads(json.dumps(claim_of({exact: 3}).to_dict()))) == claim_of({exact: 3})


@pytest.mark.parametrize(
    ("counts", "changed", "level", "part"),
    [
        ({(NonPrivateRelease(), FULL): 3}, {}, ClaimLevel.NONPRIVATE, "No differential privacy"),
        ({(NonPrivateRelease(), FULL): 1, (STEP, FULL): 9}, {}, ClaimLevel.NONPRIVATE, "No differential privacy"),
        ({(STEP, ASSUMED): 86}, {}, ClaimLevel.UNVERIFIED, "assumed, not executed"),
        (COUNTS, {"unverified": ["the seed was fixed"]}, ClaimLevel.UNVERIFIED, "the seed was fixed"),
        (COUNTS, {"conditional_on": ["the encoder"]}, ClaimLevel.CONDITIONAL, "conditional on: the encoder"),
        # the worst level wins
        ({(STEP, ASSUMED): 1}, {"conditional_on": ["the encoder"]}, ClaimLevel.UNVERIFIED, "the encoder"),
        (
            {(NonPrivateRelease(), FULL): 1, (STEP, ASSUMED): 1},
            {"conditional_on": ["x"], "unverified": ["y"]},
            ClaimLevel.NONPRIVATE,
            "No differential privacy",
        ),
    ],
)
def test_other_levels_show_no_epsilon(counts, changed, level, part):
    claim = claim_of(counts, **changed)
    assert claim.level is level
    assert claim.epsilon is None
    statement = claim.statement()
    assert part in statement
    assert statement.endswith(f": {level}")
    assert not re.search(r"epsilon\s*[=<]", statement)
    text = json.dumps(claim.to_dict())
    would_be = compute_epsilon(
        {key: n for key, n in counts.items() if key[0] == STEP}, delta=1e-5, relation="replace_one"
    )
    assert f"{would_be.epsilon:.3f}" not in text


def test_nothing_released():
    claim = claim_of({})
    assert (claim.epsilon, claim.num_releases, claim.sampler) == (0.0, 0, "none")
    assert "0 releases" in claim.statement()
    assert claim_of({(NonPrivateRelease(), FULL): 0}).level is ClaimLevel.PROVED


def test_samplers_and_accountants_are_named():
    assert "Poisson sampling at rate 0.01 (executed)" in claim_of({(STEP, POISSON): 9}).sampler
    mixed = claim_of({(STEP, ASSUMED): 1, (STEP, FULL): 1}).sampler
    assert "all records" in mixed
    assert "not executed" in mixed
    assert "RDP accountant" in claim_of({(ZCDPRelease(rho=0.1), FULL): 1}).statement()
    assert "PLD accountant" in claim_of({(GaussianRelease(noise_std=2, l2_sensitivity=1), POISSON): 100}).statement()
    assert "RDP accountant, 1 release of" in claim_of({(STEP, FULL): 1}, accountant="rdp").statement()


def test_accountants_notes_become_warnings():
    sampled = claim_of({(ZCDPRelease(rho=0.01), POISSON): 5}, extra_warnings=["first"])
    assert sampled.warnings[0] == "first"
    assert any("no gain from sampling" in warning for warning in sampled.warnings)


@pytest.mark.parametrize(("noise_std", "warned"), [(1.0, False), (0.1, True)])
def test_an_epsilon_that_promises_little_is_a_warning(noise_std, warned):
    claim = claim_of({(GaussianRelease(noise_std=noise_std, l2_sensitivity=1.0), FULL): 1})
    assert any("is a weak promise" in warning for warning in claim.warnings) == warned


@pytest.mark.parametrize(("num_records", "warned"), [(60_000, False), (100_000, False), (182_637, True)])
def test_delta_above_one_over_n_is_a_warning(num_records, warned):
    claim = claim_of(num_records=num_records)
    assert any("above 1 / num_records" in warning for warning in claim.warnings) == warned
    assert claim.level is ClaimLevel.PROVED


def test_claim_of_a_ledger():
    facts = {"relation": "replace_one", "unit": "user", "mechanism": "TopAgg", "target_delta": 1e-5}
    ledger = PrivacyLedger({**facts, "num_records": 10**6}, None)
    for _ in range(86):
        ledger.append(STEP, FULL)
    claim = claim_from_ledger(ledger)
    assert (claim.epsilon, claim.relation, claim.unit) == (claim_of().epsilon, "replace_one", "user")
    assert any("num_records=1000000" in warning for warning in claim.warnings)


@pytest.mark.parametrize("wrong", [{"delta": 0.0}, {"delta": math.nan}, {"relation": "swap"}, {"accountant": "gdp"}])
def test_invalid_facts_are_refused(wrong):
    with pytest.raises(ConfigurationError, match="Expected"):
        claim_of(**wrong)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 10**6), delta=st.floats(1e-12, 1e-2))
def test_the_shown_epsilon_never_promises_more(count, delta):
    claim = claim_of({(STEP, FULL): count}, delta=delta)
    shown = float(re.search(r"epsilon=([0-9.]+)", claim.statement())[1])
    assert claim.epsilon <= shown <= claim.epsilon + 0.001
    assert repr(delta) in claim.statement()
    assert "\n" not in claim.statement()


@pytest.mark.parametrize(
    "claim",
    [
        claim_of(),
        claim_of({(STEP, ASSUMED): 86}, extra_warnings=["w"]),
        claim_of(conditional_on=["the encoder"]),
        claim_of({(NonPrivateRelease(), FULL): 1}),
    ],
    ids=lambda claim: str(claim.level),
)
def test_claims_survive_json(claim):
    data = json.loads(json.dumps(claim.to_dict()))
    assert data["statement"] == claim.statement()
    assert PrivacyClaim.from_dict(data) == claim


@pytest.mark.parametrize(
    "change",
    [
        {"level": "PERFECT"},
        {"level": "CONDITIONAL"},
        {"epsilon": None},
        {"epsilon": math.inf},
        {"epsilon": math.nan},
        {"epsilon": -1.0},
        {"epsilon": "1"},
        {"delta": 2.0},
        {"relation": "swap"},
        {"epsilon": 0.5},
        {"statement": "(epsilon=0.001, delta=1e-05)-DP: PROVED"},
        {"extra": 1},
    ],
)
def test_altered_claims_are_refused(change):
    with pytest.raises(ConfigurationError, match="Expected"):
        PrivacyClaim.from_dict(claim_of().to_dict() | change)


def test_incomplete_claims_are_refused():
    data = claim_of().to_dict()
    del data["unit"]
    for bad in (data, {}, None):
        with pytest.raises(ConfigurationError, match="exactly the fields"):
            PrivacyClaim.from_dict(bad)


def test_an_epsilon_needs_a_proof():
    """The broken twin: a claim built by hand with a number and a lower level."""
    facts = claim_of().to_dict()
    del facts["statement"]
    for level in ("CONDITIONAL", "UNVERIFIED", "NONPRIVATE"):
        with pytest.raises(ConfigurationError, match="none with any other"):
            PrivacyClaim(**(facts | {"level": level}))


class TestPlans:
    """What is proved of a run whose length was not kept: the plan, and nothing beyond it."""

    plan = MappingProxyType({(STEP, FULL): 86})

    def test_a_stop_before_the_end_states_the_plan(self):
        claim = claim_of({(STEP, FULL): 40}, planned=self.plan)
        assert claim.epsilon == claim_of().epsilon > claim_of({(STEP, FULL): 40}).epsilon
        assert (claim.num_releases, claim.planned_releases) == (40, 86)
        assert "40 of 86 planned releases of TopAgg, all charged: PROVED" in claim.statement()
        assert any("stopped before its plan" in warning for warning in claim.warnings)
        assert PrivacyClaim.from_dict(claim.to_dict()) == claim

    def test_why_the_smaller_epsilon_would_be_wrong(self):
        """The broken twin: a run that stops at the first release that gives the record away.

        Sixty releases of y_t = x + noise, x in {0, 1}; the rule, of released values only, is to stop when the sum is
        large. The privacy loss at the stop exceeds the epsilon of the releases made more often than delta.
        """
        import numpy as np

        steps, std, delta = 60, 4.0, 1e-2
        draws = np.random.default_rng(0).normal(1.0, std, size=(40_000, steps))
        loss = np.cumsum((2 * draws - 1) / (2 * std**2), axis=1)  # log p(y | 1) / p(y | 0)
        release = (GaussianRelease(noise_std=std, l2_sensitivity=1.0), FULL)
        spent = np.array(
            [compute_epsilon({release: n}, delta=delta, relation="replace_one").epsilon for n in range(1, steps + 1)]
        )
        beyond = loss > spent
        stop = np.where(beyond.any(axis=1), beyond.argmax(axis=1), steps - 1)
        excess = 1 - np.exp(np.minimum(spent[stop] - loss[np.arange(len(loss)), stop], 0))
        at_plan = 1 - np.exp(np.minimum(spent[-1] - loss[np.arange(len(loss)), stop], 0))
        assert excess.mean() > 1.5 * delta  # sum of p (1 - e^(epsilon - loss))_+: what delta should have covered
        assert at_plan.mean() < delta

    @pytest.mark.parametrize(
        "counts",
        [
            {(STEP, FULL): 87},
            {(STEP, FULL): 40, (GaussianRelease(noise_std=9000.0, l2_sensitivity=STEP.l2_sensitivity), FULL): 1},
        ],
        ids=["longer", "other noise"],
    )
    def test_a_plan_that_was_not_kept_states_nothing(self, counts):
        claim = claim_of(counts, planned=self.plan)
        assert (claim.level, claim.epsilon) == (ClaimLevel.UNVERIFIED, None)
        assert "kept to the plan" in claim.statement()

    def test_a_whole_plan_is_claimed_as_before(self):
        claim = claim_of(planned=self.plan)
        assert (claim.epsilon, claim.warnings) == (claim_of().epsilon, ())
        assert claim.statement() == claim_of().statement()
        assert claim_of({}, planned=self.plan).epsilon == 0

    def test_a_ledger_carries_its_plan(self):
        from lightning_dp.accounting.claiming import ledger_level, spent_epsilon
        from lightning_dp.accounting.plan import claimed_counts, plan_header

        facts = {"relation": "replace_one", "unit": "record", "mechanism": "TopAgg", "target_delta": 1e-5}
        ledger = PrivacyLedger({**facts, "planned": plan_header({(STEP, FULL): 3})}, None)
        ledger.append(STEP, FULL)
        assert claim_from_ledger(ledger).epsilon == claim_of({(STEP, FULL): 3}).epsilon
        assert claimed_counts(ledger) == {(STEP, FULL): 3}
        assert spent_epsilon(ledger) == claim_of({(STEP, FULL): 1}).epsilon
        for _ in range(3):
            ledger.append(STEP, FULL)
        assert ledger_level(ledger) is ClaimLevel.UNVERIFIED
        assert spent_epsilon(ledger) is None
        assert claimed_counts(ledger) == {(STEP, FULL): 4}


def test_relations_say_what_they_compare():
    assert "one record becomes empty and contributes nothing" in claim_of(relation="replace_special").statement()
    assert claim_of(relation="replace_special").relation == "replace_special"


def test_claims_from_before_plans_are_read():
    data = claim_of().to_dict()
    del data["planned_releases"]
    assert PrivacyClaim.from_dict(data) == claim_of()

"""Known answers, properties and the edge cases in which dp-accounting is silently wrong."""

import math
from itertools import pairwise

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import compute_epsilon as convert_rdp
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dp.accounting import renyi
from lightning_dp.accounting.accountants import compute_epsilon, paper_epsilon, quick_epsilon_bound
from lightning_dp.accounting.events import (
    RELATION_NAMES,
    GaussianRelease,
    NonPrivateRelease,
    Sampling,
    TernaryRelease,
    ZCDPRelease,
    parse_relation,
)
from lightning_dp.errors import ConfigurationError

DELTA = 1e-5
FULL = Sampling(scheme="full")


def poisson(rate, **kwargs):
    return Sampling(scheme="poisson", rate=rate, **kwargs)


def gaussian(noise_std, l2_sensitivity=1.0):
    return GaussianRelease(noise_std=noise_std, l2_sensitivity=l2_sensitivity)


def topagg(k=200, noise_std=5000.0, beta=0.7, num_teachers=4000):
    changes = ((k, 0), (0, 2 * k))
    return TernaryRelease(
        noise_std=noise_std,
        l2_sensitivity=2 * math.sqrt(k),
        threshold=beta * num_teachers,
        max_abs_vote=num_teachers,
        changes=changes,
    )


def epsilon(counts, *, delta=DELTA, relation="add_or_remove_one", accountant="auto"):
    return compute_epsilon(counts, delta=delta, relation=relation, accountant=accountant).epsilon


# name, rate, noise multiplier, count, RDP, PLD, PLD under replace-one of the same norm bound
REFERENCE = [
    ("A", 0.01, 1.1, 10000, 5.632011, 5.192620, 9.422323),
    ("B", 1, 20, 1000, 8.079406, 7.511276, 17.856587),
    ("C", 256 / 60000, 1.0, 14062, 3.078673, 2.822621, 4.845575),
    ("D", 0.25, 4, 500, 7.211208, 6.678788, 15.115056),
    ("E", 0.001, 0.6, 50000, 5.137924, 4.380269, 5.794914),
    ("F", 1, 1, 1, 4.728507, 4.377178, 9.997256),
    ("G", 0.05, 2, 1000, 4.024352, 3.699742, 7.500295),
    ("H", 1, 176.7767, 1290, 0.808070, 0.738125, 1.582372),
]


@pytest.mark.parametrize(("name", "rate", "noise", "count", "rdp", "pld", "replace"), REFERENCE)
def test_reference_values(name, rate, noise, count, rdp, pld, replace):
    once, doubled = {(gaussian(noise), poisson(rate)): count}, {(gaussian(noise, 2.0), poisson(rate)): count}
    assert epsilon(once, accountant="rdp") == pytest.approx(rdp, abs=1e-3)
    assert epsilon(once, accountant="pld") == pytest.approx(pld, abs=1e-4)
    assert epsilon(once) == pytest.approx(pld, abs=1e-4)
    if count <= 1000:  # the same distribution as add-or-remove-one, built once more
        assert epsilon(once, relation="replace_special") == pytest.approx(pld, abs=1e-4)
    # the sensitivity is stated for the relation: 2C under replace-one
    assert epsilon(doubled, relation="replace_one", accountant="pld") == pytest.approx(replace, abs=1e-4)


@pytest.mark.parametrize(
    ("rate", "noise", "count", "rdp", "pld"),
    [
        (0.01, 1.0, 1000, 2.1014, 1.8282),
        (0.01, 4.0, 10000, 1.0355, 0.9470),
        (256 / 6e4, 1.1, 14062, 2.5966, 2.3817),
        (250 / 6e4, 1.3, 3600, 0.9422, 0.8530),
        (1, 4.0, 100, 14.132, 13.207),
        (0.01, 1.1, 1000, 1.7118, None),
    ],
)
def test_known_answers_of_the_mechanism_table(rate, noise, count, rdp, pld):
    counts = {(gaussian(noise), poisson(rate)): count}
    assert epsilon(counts, accountant="rdp") == pytest.approx(rdp, abs=1e-3)
    if pld is not None:
        assert epsilon(counts, accountant="pld") == pytest.approx(pld, abs=1e-3)


@pytest.mark.parametrize(("rho", "expected"), [(2.0, 10.7255), (0.5, 4.7285)])
@pytest.mark.parametrize("relation", RELATION_NAMES)
def test_zcdp(rho, expected, relation):
    result = compute_epsilon({(ZCDPRelease(rho=rho), FULL): 1}, delta=DELTA, relation=relation)
    assert (result.accountant, result.epsilon) == ("rdp", pytest.approx(expected, abs=1e-3))


@pytest.mark.parametrize(
    ("noise", "expected"),
    [(0.5, 9.997256), (0.8, 5.679587), (1, 4.377178), (2, 1.993091), (4, 0.926342), (8, 0.434416), (20, 0.160042)],
)
@pytest.mark.parametrize("relation", RELATION_NAMES)
def test_closed_form(noise, expected, relation):
    result = compute_epsilon({(gaussian(noise), FULL): 1}, delta=DELTA, relation=relation)
    assert (result.accountant, result.epsilon) == ("gaussian", pytest.approx(expected, abs=2e-6))


# --- DataLens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "noise", "expected"), [(0, 1.0, 0.9143), (1, 20.0, 0.9346), (1, 5.0, 1.2054), (2, 20.0, 0.9545)]
)
def test_small_releases_beside_a_run_are_cheap(extra, noise, expected):
    """A label histogram, or means and deviations, beside 10,000 sampled steps (accounting, section 1.7)."""
    counts = {(gaussian(4.125804), poisson(0.01)): 10_000, (gaussian(noise), FULL): extra}
    assert epsilon(counts) == pytest.approx(expected, abs=1e-4)


# --- properties -------------------------------------------------------------------------------------------------------

NOISE = st.floats(0.5, 1e3)
COUNT = st.integers(1, 2000)


@settings(max_examples=60, deadline=None)
@given(noise=NOISE, count=COUNT, more=st.integers(1, 500), relation=st.sampled_from(RELATION_NAMES))
def test_epsilon_grows_with_count_and_falls_with_noise(noise, count, more, relation):
    base = epsilon({(gaussian(noise), FULL): count}, relation=relation)
    assert base <= epsilon({(gaussian(noise), FULL): count + more}, relation=relation)
    assert base >= epsilon({(gaussian(noise * 1.1), FULL): count}, relation=relation)


@settings(max_examples=12, deadline=None)
@given(noise=st.floats(0.7, 10), rate=st.floats(0.001, 0.5), count=COUNT, more=st.integers(1, 500))
def test_sampled_epsilon_grows_with_count_and_falls_with_noise(noise, rate, count, more):
    base = quick_epsilon_bound({(gaussian(noise), poisson(rate)): count}, delta=DELTA, relation="replace_special")

    def other(event, number):
        return quick_epsilon_bound({(event, poisson(rate)): number}, delta=DELTA, relation="replace_special")

    assert base <= other(gaussian(noise), count + more)
    assert base >= other(gaussian(noise * 1.1), count) - 1e-9
    # sampling never makes a release worse
    assert base <= epsilon({(gaussian(noise), FULL): count}) * (1 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(
    noise=NOISE,
    scale=st.floats(1e-3, 1e3),
    parts=st.lists(st.integers(1, 300), min_size=1, max_size=5),
)
def test_epsilon_does_not_depend_on_units_or_on_how_the_run_is_split(noise, scale, parts):
    total = sum(parts)
    whole = epsilon({(gaussian(noise), FULL): total})
    # the same releases in other units, or as one release of a longer vector
    assert epsilon({(gaussian(noise * scale, scale), FULL): total}) == pytest.approx(whole, rel=1e-9, abs=1e-12)
    assert epsilon({(gaussian(noise, math.sqrt(total)), FULL): 1}) == pytest.approx(whole, rel=1e-9, abs=1e-12)
    # parts of the run under events that differ only in units
    split = {(gaussian(noise * (i + 2), float(i + 2)), FULL): part for i, part in enumerate(parts)}
    assert epsilon(split) == pytest.approx(whole, rel=1e-9, abs=1e-12)
    assert epsilon(dict(reversed(split.items()))) == epsilon(split)


def test_adaptive_composition_of_different_kinds_is_at_least_each_part():
    parts = [
        (gaussian(30.0), FULL),
        (topagg(), FULL),
        (ZCDPRelease(rho=1e-3), FULL),
        (gaussian(2.0), poisson(0.01)),
        (topagg(), poisson(0.1)),
    ]
    for relation in RELATION_NAMES:
        alone = [epsilon({part: 50}, relation=relation) for part in parts]
        together = epsilon(dict.fromkeys(parts, 50), relation=relation)
        assert max(alone) < together < math.inf


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [0.0, 1.0, 1.5, -1e-5, math.nan, math.inf, "1e-5", None, True])
@pytest.mark.parametrize("function", [epsilon, paper_epsilon])
def test_delta_outside_zero_and_one_is_refused(function, delta):
    with pytest.raises(ConfigurationError, match="Expected 0 < delta < 1"):
        function({(gaussian(1.0), FULL): 1}, delta=delta)


@pytest.mark.parametrize(("delta", "expected"), [(1e-18, 8.997182), (1e-300, 37.448848)])
def test_tiny_delta_unsampled(delta, expected):
    assert epsilon({(gaussian(1.0), FULL): 1}, delta=delta) == pytest.approx(expected, abs=1e-5)
    assert epsilon({(gaussian(1.0), FULL): 1}, delta=delta, accountant="rdp") > expected


@pytest.mark.parametrize("relation", RELATION_NAMES)
def test_tiny_delta_sampled_is_finite_and_says_so(relation):
    counts = {(gaussian(1.0), poisson(0.1)): 10}
    result = compute_epsilon(counts, delta=1e-18, relation=relation)
    assert 0 < result.epsilon < math.inf
    assert any("below its floor" in note for note in result.notes)
    with pytest.raises(ConfigurationError, match="below its floor"):
        epsilon(counts, delta=1e-18, accountant="pld", relation=relation)


def test_nothing_released_costs_nothing():
    for counts in ({}, {(gaussian(1.0), FULL): 0}, {(NonPrivateRelease(), FULL): 0}):
        assert compute_epsilon(counts, delta=DELTA, relation="replace_one").epsilon == 0.0
    assert paper_epsilon({}, delta=DELTA) == 0.0


@pytest.mark.parametrize("count", [-1, 1.0, True, "1", math.nan])
def test_counts_are_whole_numbers(count):
    with pytest.raises(ConfigurationError, match="integer >= 0"):
        epsilon({(gaussian(1.0), FULL): count})


@pytest.mark.parametrize("accountant", ["auto", "gaussian", "pld", "rdp"])
def test_one_non_private_release_is_infinite(accountant):
    counts = {(NonPrivateRelease(), FULL): 1, (gaussian(1e9), FULL): 1}
    assert epsilon(counts, accountant=accountant) == math.inf


@pytest.mark.parametrize("relation", ["replace", None])
def test_relation_is_required_by_name(relation):
    with pytest.raises(ConfigurationError, match="neighboring_relation"):
        epsilon({(gaussian(1.0), FULL): 1}, relation=relation)


def test_unknown_accountant():
    with pytest.raises(ConfigurationError, match="auto, gaussian, pld, rdp"):
        epsilon({(gaussian(1.0), FULL): 1}, accountant="gdp")


@pytest.mark.parametrize(
    ("event", "sampling", "relation", "accountant", "match"),
    [
        (gaussian(1.0), poisson(0.1), "replace_one", "rdp", "RDP accountant cannot .* replace_one"),
        (gaussian(1.0), poisson(0.1), "add_or_remove_one", "gaussian", "unsampled Gaussian releases only"),
        (ZCDPRelease(rho=1.0), FULL, "replace_one", "gaussian", "unsampled Gaussian releases only"),
        (ZCDPRelease(rho=1.0), FULL, "replace_one", "pld", "PLD accountant cannot .*ZCDP"),
        (gaussian(0.01), poisson(0.1), "add_or_remove_one", "pld", "noise multiplier below"),
        (gaussian(0.2), poisson(0.5), "add_or_remove_one", "pld", "beyond 100"),
    ],
)
def test_accountants_refuse_what_they_cannot_compose(event, sampling, relation, accountant, match):
    with pytest.raises(ConfigurationError, match=match):
        epsilon({(event, sampling): 1000}, relation=relation, accountant=accountant)


def test_rate_one_is_the_same_as_no_sampling():
    for relation in RELATION_NAMES:
        expected = epsilon({(gaussian(2.0, 2.0), FULL): 3}, relation=relation)
        assert epsilon({(gaussian(2.0, 2.0), poisson(1.0)): 3}, relation=relation) == expected
        assert epsilon({(gaussian(2.0, 2.0), poisson(1.0)): 1, (gaussian(2.0, 2.0), FULL): 2}) == expected


def test_whether_sampling_was_executed_changes_no_number():
    assert epsilon({(gaussian(1.0), poisson(0.1, executed=False)): 9}) == epsilon({(gaussian(1.0), poisson(0.1)): 9})


def test_replace_one_by_renyi_uses_the_stated_sensitivity():
    """dp-accounting's RDP does not double under replace-one; a norm bound of 1 means a sensitivity of 2."""
    counts = {(gaussian(1.0, 2.0), FULL): 1}
    assert epsilon(counts, relation="replace_one", accountant="rdp") == pytest.approx(10.7255, abs=1e-3)
    assert epsilon(counts, relation="replace_one", accountant="pld") == pytest.approx(9.997256, abs=1e-4)


@pytest.mark.parametrize(("noise", "low", "high"), [(1e-3, 504263.8, 504264.0), (1e-4, 5e7, 5.1e7), (1e-9, 5e17, 6e17)])
def test_too_little_noise_is_a_huge_number_not_a_small_one(noise, low, high):
    assert low <= epsilon({(gaussian(noise), FULL): 1}) <= high


@pytest.mark.parametrize("relation", RELATION_NAMES)
@pytest.mark.parametrize("noise", [0.02, 1e-3])
def test_too_little_sampled_noise_is_a_huge_number_and_no_memory(noise, relation):
    result = compute_epsilon({(gaussian(noise), poisson(0.01)): 10000}, delta=DELTA, relation=relation)
    assert 100 < result.epsilon < math.inf
    assert any("not by PLD" in note for note in result.notes)


def test_huge_noise_costs_nothing_or_little():
    assert epsilon({(gaussian(1e6), FULL): 1}) == 0.0
    # the closed form cancels to 0 here, but the total variation 4e-18 is above this delta
    assert 0.0 < epsilon({(gaussian(1e17), FULL): 1}, delta=1e-18) < 1e-6


@pytest.mark.parametrize("number", [1e-300, 1e-150, 1e150, 1e300])
@pytest.mark.parametrize("accountant", ["auto", "gaussian", "rdp"])
def test_absurd_numbers_give_bounds_not_errors(number, accountant):
    result = epsilon({(gaussian(number), FULL): 1000}, accountant=accountant)
    assert result > 1e100 if number < 1 else 0.0 <= result < 1e-3
    if accountant != "gaussian":
        assert epsilon({(ZCDPRelease(rho=number), FULL): 1000}, accountant=accountant) >= 0.0
        assert epsilon({(topagg(k=1, noise_std=number), FULL): 3}, accountant=accountant) >= 0.0
        assert epsilon({(gaussian(number), poisson(0.5)): 3}) >= 0.0


@pytest.mark.parametrize("bad", [math.nan, -1e-9])
def test_a_renyi_curve_that_went_wrong_proves_nothing(monkeypatch, bad):
    # the broken twin: dp-accounting turns such a curve into perfect privacy
    assert convert_rdp([2.0, 3.0], [bad, bad], DELTA)[0] == 0

    class Wrong(renyi.RdpAccountant):
        rdp = property(lambda self: np.full(len(self.orders), bad))

    renyi.renyi_curve.cache_clear()
    monkeypatch.setattr(renyi, "RdpAccountant", Wrong)
    counts = {(ZCDPRelease(rho=0.123), FULL): 1}
    assert epsilon(counts, accountant="rdp") == math.inf
    renyi.renyi_curve.cache_clear()


def test_sampled_zcdp_gains_nothing_and_says_so():
    release = ZCDPRelease(rho=0.01)
    sampled = compute_epsilon({(release, poisson(0.01)): 10}, delta=DELTA, relation="replace_one")
    assert sampled.epsilon == epsilon({(release, FULL): 10})
    assert any("no gain from sampling" in note for note in sampled.notes)


def test_sampled_ternary_is_charged_as_gaussian():
    event = topagg()
    sampled = compute_epsilon({(event, poisson(0.1)): 1290}, delta=DELTA, relation="replace_special")
    plain = epsilon({(gaussian(event.noise_std, event.l2_sensitivity), poisson(0.1)): 1290})
    assert sampled.epsilon == pytest.approx(plain, rel=1e-9)
    assert any("charged as the Gaussian" in note for note in sampled.notes)


def test_beyond_a_hundred_thousand_compositions_the_grid_is_finer():
    few, many = ({(gaussian(30.0), poisson(0.001)): count} for count in (100_000, 100_001))
    # a coarse grid rounds up: the finer one may be below although one more release was made
    assert epsilon(many, accountant="pld") <= epsilon(few, accountant="pld") * 1.0001
    assert epsilon(many) <= quick_epsilon_bound(many, delta=DELTA, relation="add_or_remove_one")


# --- the question before each release ---------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", sorted(RELATION_NAMES))
def test_distributions_are_composed_as_dp_accounting_composes_them(relation):
    terms = {
        (gaussian(1.1), poisson(0.02)): 300,
        (gaussian(0.9), poisson(0.01)): 20,
        (gaussian(9.0), FULL): 7,
    }
    factor = 2.0 if relation == "replace_one" else 1.0
    accountant = PLDAccountant(parse_relation(relation), 1e-4)
    for (event, sampling), count in terms.items():
        theirs = dp_accounting.GaussianDpEvent(factor * event.noise_multiplier)
        if sampling.rate < 1:
            theirs = dp_accounting.PoissonSampledDpEvent(sampling.rate, theirs)
        accountant.compose(theirs, count)
    asked = DELTA - 320 * 2.0**-50  # what rounding may hide
    assert epsilon(terms, relation=relation, accountant="pld") == pytest.approx(accountant.get_epsilon(asked), rel=1e-9)


@pytest.mark.parametrize(("rate", "noise", "count"), [(0.032, 0.65, 300), (0.01, 1.1, 3000), (0.2, 4.0, 500)])
def test_a_rough_answer_is_a_bound_close_to_the_exact_one(rate, noise, count):
    counts = {(gaussian(noise), poisson(rate)): count}
    rough = compute_epsilon(counts, delta=DELTA, relation="add_or_remove_one", is_rough=True).epsilon
    assert epsilon(counts) <= rough <= 1.002 * epsilon(counts)


def test_paper_number_refuses_what_the_paper_has_not():
    for event, sampling in ((gaussian(1.0), poisson(0.5)), (ZCDPRelease(rho=1.0), FULL), (NonPrivateRelease(), FULL)):
        with pytest.raises(ConfigurationError, match="unsampled Gaussian releases only"):
            paper_epsilon({(event, sampling): 1}, delta=DELTA)
    assert paper_epsilon({(topagg(), FULL): 1290}, delta=DELTA) == pytest.approx(0.9957, abs=1e-4)


def test_smaller_delta_never_costs_less():
    counts = {(gaussian(20.0), FULL): 100}
    values = [epsilon(counts, delta=delta) for delta in (1e-3, 1e-5, 1e-7, 1e-15)]
    assert all(small < large for small, large in pairwise(values))

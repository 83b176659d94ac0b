"""Events refuse what an accountant would misread, and survive a JSON round trip bit for bit."""

import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lightning_dp
from lightning_dp.accounting.events import (
    RELATION_NAMES,
    GaussianRelease,
    NonPrivateRelease,
    Sampling,
    TernaryRelease,
    ZCDPRelease,
    event_from_dict,
    parse_relation,
    relation_name,
)
from lightning_dp.errors import ConfigurationError

POSITIVE = st.floats(min_value=1e-6, max_value=1e9)
BAD_NUMBERS = [math.nan, math.inf, -math.inf, 0, 0.0, -1.0, "1", None, True, [1.0]]


def votes(k: int = 3, **changed):
    values = {"noise_std": 10.0, "l2_sensitivity": 2 * math.sqrt(k), "threshold": 4.0, "max_abs_vote": 20}
    return TernaryRelease(**(values | {"changes": ((k, 0), (0, 2 * k))} | changed))


@pytest.mark.parametrize("bad", BAD_NUMBERS)
@pytest.mark.parametrize(
    "build",
    [
        lambda bad: GaussianRelease(noise_std=bad, l2_sensitivity=1.0),
        lambda bad: GaussianRelease(noise_std=1.0, l2_sensitivity=bad),
        lambda bad: ZCDPRelease(rho=bad),
        lambda bad: votes(noise_std=bad),
        lambda bad: Sampling(scheme="poisson", rate=bad),
    ],
)
def test_numbers_that_accountants_misread_are_refused(build, bad):
    with pytest.raises(ConfigurationError, match="Expected a finite"):
        build(bad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, "1", None])
def test_threshold_is_finite_and_not_negative(bad):
    with pytest.raises(ConfigurationError, match="threshold"):
        votes(threshold=bad)


def test_zero_threshold_is_allowed():
    assert votes(threshold=0).threshold == 0.0


def test_overflowing_noise_multiplier_is_refused():
    with pytest.raises(ConfigurationError, match="noise_multiplier"):
        GaussianRelease(noise_std=1e300, l2_sensitivity=1e-300)
    with pytest.raises(ConfigurationError, match=r"noise_multiplier|mu"):
        GaussianRelease(noise_std=1e-300, l2_sensitivity=1e300)


@pytest.mark.parametrize("number", [2, np.float32(2.0), np.int64(2), Fraction(2)])
def test_every_number_becomes_a_python_float(number):
    event = GaussianRelease(noise_std=number, l2_sensitivity=number)
    assert type(event.noise_std) is float
    assert type(event.noise_multiplier) is float
    assert type(ZCDPRelease(rho=number).rho) is float


def test_a_dropped_cast_would_undercount():
    """The bug of dp-accounting that the cast guards against: an int multiplier drops the rest of the composition."""

    def epsilon(one):
        events = [dp_accounting.GaussianDpEvent(one), dp_accounting.GaussianDpEvent(one)]
        accountant = dp_accounting.rdp.RdpAccountant()
        accountant.compose(dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.ComposedDpEvent(events)), 100)
        return accountant.get_epsilon(1e-5)

    assert epsilon(1.0) == pytest.approx(3.0614, abs=1e-3)
    assert epsilon(1) < 1.3
    assert epsilon(GaussianRelease(noise_std=1, l2_sensitivity=1).noise_multiplier) == epsilon(1.0)


def test_noise_multiplier_and_mu():
    event = GaussianRelease(noise_std=6.0, l2_sensitivity=2.0)
    assert event.noise_multiplier == 3.0
    assert event.mu == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"changes": ()}, "at least one pair"),
        ({"changes": ((0, 0),)}, "none of them"),
        ({"changes": ((1.5, 0),)}, "integer >= 0"),
        ({"changes": ((-1, 0),)}, "integer >= 0"),
        ({"changes": (3,)}, "pairs"),
        ({"changes": 3}, "pairs"),
        ({"max_abs_vote": 0}, "max_abs_vote"),
        ({"max_abs_vote": 2.5}, "max_abs_vote"),
        ({"max_abs_vote": True}, "max_abs_vote"),
        # half of the coordinates left out: the Renyi curve would be half of the true one
        ({"changes": ((1, 0),)}, "largest L2 norm"),
        ({"l2_sensitivity": math.sqrt(3)}, "largest L2 norm"),
    ],
)
def test_ternary_release_refuses_inconsistent_facts(changed, match):
    with pytest.raises(ConfigurationError, match=match):
        votes(**changed)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"scheme": "shuffle"}, "one of full, poisson"),
        ({"scheme": "poisson", "rate": 1.5}, "<= 1"),
        ({"scheme": "full", "rate": 0.5}, "scheme='full'"),
        ({"scheme": "full", "executed": False}, "scheme='full'"),
        ({"scheme": "poisson", "rate": 0.5, "executed": 1}, "true or false"),
    ],
)
def test_sampling_refuses(values, match):
    with pytest.raises(ConfigurationError, match=match):
        Sampling(**values)


EVENTS = st.one_of(
    st.builds(GaussianRelease, noise_std=POSITIVE, l2_sensitivity=POSITIVE),
    st.builds(ZCDPRelease, rho=POSITIVE),
    st.just(NonPrivateRelease()),
    st.builds(votes, k=st.integers(1, 50), threshold=st.floats(0, 1e6), max_abs_vote=st.integers(1, 10**6)),
)


@given(event=EVENTS)
def test_events_survive_json_exactly(event):
    again = event_from_dict(json.loads(json.dumps(event.to_dict())))
    assert again == event
    assert type(again) is type(event)
    assert hash(again) == hash(event)
    assert type(event).from_dict(event.to_dict()) == event


@given(rate=st.floats(min_value=1e-9, max_value=1.0), executed=st.booleans())
def test_sampling_survives_json_exactly(rate, executed):
    sampling = Sampling(scheme="poisson", rate=rate, executed=executed)
    assert Sampling.from_dict(json.loads(json.dumps(sampling.to_dict()))) == sampling


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kind": "laplace", "scale": 1.0},
        {"kind": "gaussian", "noise_std": 1.0},
        {"kind": "gaussian", "noise_std": 1.0, "l2_sensitivity": 1.0, "extra": 1},
        {"kind": "gaussian", "noise_std": math.nan, "l2_sensitivity": 1.0},
        {"kind": 3},
        {"kind": ["gaussian"]},
        None,
        "gaussian",
    ],
)
def test_unknown_kinds_and_fields_are_refused(data):
    with pytest.raises(ConfigurationError, match="Expected"):
        event_from_dict(data)


def test_from_dict_refuses_another_kind_and_unknown_sampling_fields():
    with pytest.raises(ConfigurationError, match="kind 'zcdp'"):
        ZCDPRelease.from_dict(NonPrivateRelease().to_dict())
    with pytest.raises(ConfigurationError, match="exactly the fields"):
        Sampling.from_dict({"scheme": "full", "rate": 1.0})


def test_equal_numbers_of_different_kinds_are_different_events():
    k = 3
    gaussian = GaussianRelease(noise_std=10.0, l2_sensitivity=2 * math.sqrt(k))
    assert gaussian != votes(k)
    assert len({gaussian, votes(k), votes(k)}) == 2


def test_relations():
    for name in RELATION_NAMES:
        assert relation_name(parse_relation(name)) == name
        assert parse_relation(parse_relation(name)) is parse_relation(name)
    for bad in ("replace", "REPLACE_ONE", "", None, 2):
        with pytest.raises(ConfigurationError, match="add_or_remove_one, replace_one, replace_special"):
            parse_relation(bad)


def test_accounting_needs_no_torch():
    code = (
        "import sys, lightning_dp.accounting, lightning_dp.accounting.settings as s; assert 'torch' not in sys.modules"
    )
    root = Path(lightning_dp.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=120)

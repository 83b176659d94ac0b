"""Copies of a ledger in checkpoints: merged, resumed, altered, and carried to other claims."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import LedgerError
from tests.accounting.test_ledger import EVENTS, FULL, HEADER, KIND, fill, kinds_of


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def epsilon(ledger):
    return compute_epsilon(ledger.counts(), delta=1e-5, relation=ledger.relation).epsilon


def through_json(ledger):
    return json.loads(json.dumps(ledger.state_dict()))


def grow(ledger, kinds):
    for kind in kinds:
        ledger.append(*kind)


@settings(max_examples=60, deadline=None)
@given(
    shared=st.lists(KIND, max_size=6),
    ours=st.lists(KIND, max_size=6),
    theirs=st.lists(KIND, max_size=6),
    again=st.lists(KIND, max_size=3),
)
def test_merge_never_costs_less_than_either_side_and_is_idempotent(tmp_path_factory, shared, ours, theirs, again):
    folder = tmp_path_factory.mktemp("ledger")
    fill(folder / "ours", shared)
    shutil.copy(folder / "ours", folder / "theirs")
    with (
        PrivacyLedger.reopen(folder / "ours", durable=False) as left,
        PrivacyLedger.reopen(folder / "theirs", durable=False) as right,
    ):
        grow(left, ours)
        grow(right, theirs)
        sides, state = (dict(left.counts()), dict(right.counts())), through_json(right)
        most = max(epsilon(left), epsilon(right))
        assert left.merge(state) == len(theirs)
        assert left.merge(state) == 0
        grow(left, again)
        assert left.merge(state) == 0
        assert len(left) == len(shared) + len(ours) + len(theirs) + len(again)
        assert epsilon(left) >= most
        assert all(left.counts()[kind] >= count for side in sides for kind, count in side.items())
        # back again: both copies hold the same releases
        right.merge(through_json(left))
        assert right.counts() == left.counts()
    assert kinds_of(PrivacyLedger.read(folder / "ours")) == kinds_of(left)


def test_the_longer_copy_alone_would_undercount(path):
    """The broken twin: copies of one ledger that both went on hold different releases of equal price."""
    fill(path, [(EVENTS[0], FULL)] * 5)
    shutil.copy(path, path.with_suffix(".copy"))
    with PrivacyLedger.reopen(path, durable=False) as left, PrivacyLedger.reopen(path.with_suffix(".copy")) as right:
        grow(left, [(EVENTS[0], FULL)] * 3)
        grow(right, [(EVENTS[0], FULL)] * 2)
        longer = max(len(left), len(right))
        left.merge(right.state_dict())
        assert (longer, len(left)) == (8, 10)


def test_resume_takes_whichever_of_checkpoint_and_file_spent_more(path):
    with PrivacyLedger(HEADER, path, durable=False) as ledger:
        grow(ledger, [(EVENTS[0], FULL)] * 5)
        checkpoint = through_json(ledger)
        backup = path.read_bytes()
        grow(ledger, [(EVENTS[1], FULL)] * 3)
        later = through_json(ledger)
    # releases between the checkpoint and the crash stay charged
    with PrivacyLedger.reopen(path, durable=False) as ledger:
        assert ledger.merge(checkpoint) == 0
        assert len(ledger) == 8
    # an older copy of the file takes the rest from the checkpoint
    path.write_bytes(backup)
    with PrivacyLedger.reopen(path, durable=False) as ledger:
        assert ledger.merge(later) == 3
        assert len(ledger) == 8
    assert kinds_of(PrivacyLedger.read(path)) == [(EVENTS[0], FULL)] * 5 + [(EVENTS[1], FULL)] * 3
    # no file at all
    assert kinds_of(PrivacyLedger.from_state_dict(later)) == kinds_of(PrivacyLedger.read(path))


def test_state_is_compressed_and_shares_nothing():
    ledger = PrivacyLedger(HEADER, None)
    grow(ledger, [(EVENTS[0], FULL)] * 1000)
    state = ledger.state_dict()
    assert [run["count"] for run in state["runs"]] == [1000]
    state["header"]["unit"] = "nobody"
    assert ledger.unit == "record"


@pytest.mark.parametrize(
    "tamper",
    [
        lambda state: state["runs"][0].update(count=1),
        lambda state: state["runs"][0]["event"].update(noise_std=1e9),
        lambda state: state["header"].update(unit="nobody"),
        lambda state: state.update(format=2),
        lambda state: state.update(sha256="0" * 64),
        lambda state: state.update(extra=1),
        lambda state: state.pop("runs"),
        lambda state: state.update(runs=None),
        lambda state: state.clear(),
    ],
)
def test_altered_states_are_refused(tamper):
    ledger = PrivacyLedger(HEADER, None)
    grow(ledger, [(EVENTS[0], FULL)] * 3)
    state = through_json(ledger)
    tamper(state)
    with pytest.raises(LedgerError, match="cannot be trusted"):
        ledger.merge(state)
    with pytest.raises(LedgerError, match="cannot be trusted"):
        PrivacyLedger.from_state_dict(state)


@pytest.mark.parametrize("changed", [{"relation": "add_or_remove_one"}, {"unit": "user"}, {"num_records": 5}])
def test_states_about_something_else_are_refused(changed):
    other = PrivacyLedger(HEADER | changed, None)
    with pytest.raises(LedgerError, match=f"with {next(iter(changed))}="):
        PrivacyLedger(HEADER, None).merge(other.state_dict())


CLAIM_HEADER = HEADER | {
    "mechanism": "TopAgg",
    "target_delta": 1e-5,
    "unverified": [],
    "warnings": [],
    "plan": {"key": 0},
}


@pytest.mark.parametrize(
    "changed",
    [
        {"unverified": ["that noise is secret"]},
        {"warnings": ["telemetry.raw was on"]},
        {"conditional_on": ["a public encoder"]},
        {"mechanism": "Gaussian"},
        {"target_delta": 1e-3},
        {"accountant": "rdp"},
        {"plan": {"key": 1}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_releases_cannot_be_carried_out_of_the_claim_they_were_made_under(changed):
    """Counts without their header's conditions would be PROVED by the ledger that takes them."""
    theirs, ours = PrivacyLedger(CLAIM_HEADER | changed, None), PrivacyLedger(CLAIM_HEADER, None)
    for from_, to in ((theirs, ours), (ours, theirs)):
        with pytest.raises(LedgerError, match=rf"with {next(iter(changed))}=.*start a new run") as caught:
            to.merge(from_.state_dict())
        assert "\n" not in str(caught.value)
        assert len(to) == 0


def test_a_missing_condition_is_none():
    """Ledgers of older runs leave out what they have nothing to say of."""
    older = {name: value for name, value in CLAIM_HEADER.items() if name not in ("unverified", "warnings")}
    assert PrivacyLedger(CLAIM_HEADER, None).merge(PrivacyLedger(older, None).state_dict()) == 0

"""The accountant logs epsilon only where it is proved, never crosses the budget, and never forgets a release."""

import copy
import itertools
import math

import pytest
import pytorch_lightning as pl

from callbacks import GradientPrivatizer, PrivacyAccountant
from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.events import GaussianRelease, Sampling
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.accounting.plan import plan_header
from lightning_dp.accounting.settings import PrivacyBudget
from lightning_dp.errors import ConfigurationError, LedgerError, PrivacyProtocolError
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.no_privacy import NoPrivacy
from lightning_dp.mechanisms.topagg import TopAgg
from tests.conftest import TinyData, callbacks_for, settings, tiny_gan, trainer_for

EVENT = GaussianRelease(noise_std=2.0, l2_sensitivity=1.0)
FULL = Sampling(scheme="full")
HEADER = {
    "relation": "replace_one",
    "unit": "record",
    "mechanism": "Gaussian",
    "target_delta": 1e-5,
    "accountant": "auto",
}


class Kept(pl.loggers.Logger):
    """Keeps what it is given."""

    name, version = "kept", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **options):
        pass


def run(tmp_path, mechanism=None, max_steps=4, **privacy):
    kept, callbacks = Kept(), callbacks_for(mechanism, **privacy)
    trainer = trainer_for(tmp_path, callbacks, max_steps, logger=kept, log_every_n_steps=1)
    trainer.fit(tiny_gan(), datamodule=TinyData())
    return kept, callbacks[1], trainer


def opened(num_releases=3, epsilon=None, **privacy):
    """An accountant with a ledger in memory and a budget."""
    accountant = PrivacyAccountant(privacy=settings(**privacy))
    if epsilon is None:
        epsilon = compute_epsilon({(EVENT, FULL): num_releases}, delta=1e-5, relation="replace_one").epsilon
    budget = PrivacyBudget(noise_multiplier=2.0, num_releases=num_releases, epsilon=epsilon, delta=1e-5)
    accountant.open(budget, HEADER)
    return accountant


class TestLog:
    def test_epsilon_after_each_release_to_the_last_digit(self, tmp_path):
        kept, accountant, trainer = run(tmp_path)
        ((key, _),) = accountant.ledger.counts().items()
        expected = [compute_epsilon({key: n}, delta=1e-5, relation="replace_one").epsilon for n in range(1, 5)]
        rows = [(step, row) for step, row in kept.rows if "privacy/epsilon" in row]
        assert [row["privacy/epsilon"] for _, row in rows] == expected
        assert [row["privacy/releases"] for _, row in rows] == [1, 2, 3, 4]
        assert [step for step, _ in rows] == [1, 2, 3, 4]
        assert accountant.epsilon == expected[-1] == accountant.claim().epsilon
        assert float(trainer.callback_metrics["privacy/epsilon"]) == pytest.approx(expected[-1])

    @pytest.mark.parametrize(
        ("mechanism", "privacy"),
        [(NoPrivacy(), {}), (TopAgg(top_k=4), {"insecure_seed": 3})],
        ids=["NONPRIVATE", "UNVERIFIED"],
    )
    def test_no_epsilon_that_is_not_proved(self, tmp_path, mechanism, privacy):
        """Neither infinity, which would rank as a number, nor the epsilon of noise that everyone can draw again."""
        kept, accountant, trainer = run(tmp_path, mechanism, **privacy)
        assert accountant.epsilon is None
        assert not [name for _, row in kept.rows for name in row if "epsilon" in name]
        assert not [value for _, row in kept.rows for value in row.values() if math.isinf(value)]
        assert "privacy/epsilon" not in trainer.callback_metrics
        assert [row["privacy/releases"] for _, row in kept.rows if "privacy/releases" in row] == [1, 2, 3, 4]


class TestSampledEpsilon:
    """Where records are sampled, an epsilon takes longer than a step."""

    def spoken(self, monkeypatch, planned, clock):
        found = []
        monkeypatch.setattr("time.perf_counter", clock)
        monkeypatch.setattr("time.monotonic", clock)
        monkeypatch.setattr("time.time", clock)
        monkeypatch.setattr(
            "callbacks.privacy_accountant.spent_epsilon", lambda ledger, **_: found.append(len(ledger)) or 1.0
        )
        accountant = opened(num_releases=planned, epsilon=1.0)
        for _ in range(planned):
            accountant.ledger.append(EVENT, Sampling(scheme="poisson", rate=0.01))
            if accountant._is_time_to_speak():
                accountant.speak()
        assert accountant.epsilon_releases == planned
        return found

    @pytest.mark.parametrize(("planned", "points"), [(10_000, 10), (220, 3), (7, 1)])
    def test_when_it_is_shown_follows_from_the_plan_and_from_no_clock(self, monkeypatch, planned, points):
        """Steps take longer when they draw more records, so a rule that looks at the clock shows something of that."""
        slow, still = itertools.count(0.0, 9.0), itertools.repeat(0.0)
        found = [self.spoken(monkeypatch, planned, ticks.__next__) for ticks in (slow, still)]
        assert found[0] == found[1]
        assert len(found[0]) == points  # the last one among them, whatever it costs
        assert found[0][-1] == planned


class TestBudget:
    def test_the_planned_releases_fit_and_one_more_does_not(self):
        accountant = opened(num_releases=3)
        for _ in range(3):
            accountant.check_release(EVENT, FULL)
            accountant.ledger.append(EVENT, FULL)
        with pytest.raises(PrivacyProtocolError, match="would cross the budget"):
            accountant.check_release(EVENT, FULL)

    def test_epsilon_binds_where_more_releases_are_planned(self):
        allowed = compute_epsilon({(EVENT, FULL): 2}, delta=1e-5, relation="replace_one").epsilon
        accountant = opened(num_releases=100, epsilon=allowed)
        for _ in range(2):
            accountant.check_release(EVENT, FULL)
            accountant.ledger.append(EVENT, FULL)
        with pytest.raises(PrivacyProtocolError, match="would cross the budget"):
            accountant.check_release(EVENT, FULL)

    def test_a_dearer_event_is_seen_before_it_happens(self):
        accountant = opened(num_releases=3)
        with pytest.raises(PrivacyProtocolError, match="would cross the budget"):
            accountant.check_release(GaussianRelease(noise_std=0.1, l2_sensitivity=1.0), FULL)
        assert len(accountant.ledger) == 0

    def test_what_a_dead_warm_start_did_not_make_is_not_made_up_for(self):
        """The broken twin counts releases of all kinds together, leaves its plan, and loses its epsilon."""
        warm = (GaussianRelease(noise_std=4.0, l2_sensitivity=1.0), Sampling(scheme="poisson", rate=0.5))
        own = (GaussianRelease(noise_std=50.0, l2_sensitivity=1.0), FULL)
        plan = {warm: 3, own: 4}
        epsilon = compute_epsilon(plan, delta=1e-5, relation="replace_special").epsilon
        accountant = PrivacyAccountant(privacy=settings(neighboring_relation="replace_special"))
        budget = PrivacyBudget(noise_multiplier=2.0, num_releases=7, epsilon=epsilon, delta=1e-5, num_before=3)
        header = HEADER | {"relation": "replace_special", "planned": plan_header(plan)}
        accountant.open(budget, header, next_release=own)
        for key, count in ((warm, 2), (own, 4)):
            for _ in range(count):
                accountant.check_release(*key)
                accountant.ledger.append(*key)
        assert accountant._is_spent()
        with pytest.raises(PrivacyProtocolError, match="would cross the budget"):
            accountant.check_release(*own)
        accountant.check_release(*warm)  # its own place was kept
        claim = accountant.claim()
        assert (claim.level, claim.epsilon) == ("PROVED", epsilon)

    def test_the_trainer_stops_by_itself(self, tmp_path):
        """No max_steps: noise and budget fix the length, over several epochs of seven steps."""
        _, accountant, trainer = run(tmp_path, Gaussian(), max_steps=-1, noise_multiplier=6.0, target_epsilon=4.0)
        ((key, count),) = accountant.ledger.counts().items()
        assert count == accountant.budget.num_releases == trainer.global_step > 14
        assert accountant.claim().epsilon <= 4.0
        assert compute_epsilon({key: count + 1}, delta=1e-5, relation="replace_one").epsilon > 4.0

    def test_before_setup_there_is_no_ledger(self):
        accountant = PrivacyAccountant(privacy=settings())
        with pytest.raises(PrivacyProtocolError, match="opened by GradientPrivatizer"):
            _ = accountant.ledger
        with pytest.raises(PrivacyProtocolError, match="No budget"):
            opened_without_budget().check_release(EVENT, FULL)


def opened_without_budget():
    accountant = opened()
    accountant.budget = None
    return accountant


class TestState:
    def test_the_larger_of_file_and_checkpoint_counts(self):
        for in_file, in_checkpoint in ((5, 3), (3, 5)):
            shorter = opened(num_releases=10)
            for _ in range(min(in_file, in_checkpoint)):
                shorter.ledger.append(EVENT, FULL)
            longer = copy.deepcopy(shorter.ledger)
            for _ in range(2):
                longer.append(EVENT, FULL)
            if in_checkpoint == 5:
                shorter.load_state_dict({"ledger": longer.state_dict()})
                assert len(shorter.ledger) == 5
            else:
                state = shorter.state_dict()
                shorter._ledger = longer
                shorter.load_state_dict(state)
                assert len(shorter.ledger) == 5

    def test_a_checkpoint_of_other_records_is_refused(self):
        accountant, other = opened(), PrivacyLedger({**HEADER, "relation": "add_or_remove_one"}, None)
        with pytest.raises(LedgerError, match="relation"):
            accountant.load_state_dict({"ledger": other.state_dict()})

    @pytest.mark.parametrize(
        ("name", "value"), [("mechanism", "TopAgg"), ("target_delta", 1e-6), ("unit", "teacher"), ("accountant", "rdp")]
    )
    def test_a_ledger_of_another_run_is_refused(self, tmp_path, name, value):
        path = tmp_path / "ledger.jsonl"
        PrivacyLedger(HEADER, path).close()
        accountant = PrivacyAccountant(privacy=settings(), ledger_path=path)
        budget = PrivacyBudget(noise_multiplier=2.0, num_releases=3, epsilon=1.0, delta=1e-5)
        with pytest.raises(ConfigurationError, match=f"{name}=.*another --run_dir"):
            accountant.open(budget, {**HEADER, name: value})
        # Refused, and given back: the right settings can open it.
        accountant.open(budget, HEADER)

    def test_an_exception_gives_the_lock_back(self, tmp_path):
        path = tmp_path / "ledger.jsonl"

        class Breaks(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                raise RuntimeError("broken")

        for expected in (1, 2):
            trainer = trainer_for(tmp_path, [*callbacks_for(ledger_path=path), Breaks()])
            with pytest.raises(RuntimeError, match="broken"):
                trainer.fit(tiny_gan(), datamodule=TinyData())
            assert len(PrivacyLedger.read(path)) == expected


def test_the_privatizer_needs_this_accountant_in_the_trainer(tmp_path):
    """A second accountant would keep a ledger of its own, and checkpoints would carry the wrong one."""
    privatizer, _ = callbacks_for()
    stranger = PrivacyAccountant(privacy=settings())
    assert isinstance(privatizer, GradientPrivatizer)
    with pytest.raises(ConfigurationError, match="lose the ledger"):
        trainer_for(tmp_path, [privatizer, stranger]).fit(tiny_gan(), datamodule=TinyData())

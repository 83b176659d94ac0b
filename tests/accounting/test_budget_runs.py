"""Runs in the budget of a data set: what they give back, copies of them, and what they lease."""

import math

import pytest

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.budget_member import BudgetMember
from lightning_dp.accounting.budget_request import needed_by
from lightning_dp.accounting.dataset_budget import DatasetBudget
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.accounting.plan import plan_header
from lightning_dp.errors import ConfigurationError, LedgerError
from tests.accounting.budgets import DELTA, FULL, HEADER, POISSON, budget, flags, gaussian, request, reserve, room_for

__all__ = ["budget"]


class TestGivingBack:
    def ledger(self, tmp_path, run="a", folder="run"):
        return PrivacyLedger(HEADER | {"run_id": run}, tmp_path / folder / "ledger.jsonl", durable=False)

    def test_an_empty_ledger_gives_its_reservation_back(self, budget, tmp_path):
        epsilon = room_for(5)
        reserve(budget, request("a"), epsilon=epsilon)
        with self.ledger(tmp_path) as ledger:
            budget.give_back("a", ledger)
        assert budget.state().runs == {}
        reserve(budget, request("b"), epsilon=epsilon)
        with pytest.raises(LedgerError, match="is not in"):
            budget.note("a", PrivacyLedger(HEADER | {"run_id": "a"}, None))

    def test_one_release_keeps_the_whole_plan(self, budget, tmp_path):
        reserve(budget, request("a"))
        with self.ledger(tmp_path) as ledger:
            ledger.append(gaussian(), FULL)
            with pytest.raises(ConfigurationError, match="made 1 release, so its whole plan stays charged"):
                budget.give_back("a", ledger)
        assert budget.state().counts == {(gaussian(), FULL): 5}

    def test_what_was_noted_counts_though_the_ledger_was_emptied(self, budget, tmp_path):
        reserve(budget, request("a"))
        with self.ledger(tmp_path) as ledger:
            ledger.append(gaussian(), FULL)
            budget.note("a", ledger)
        with self.ledger(tmp_path, folder="again") as ledger, pytest.raises(ConfigurationError, match="stays charged"):
            budget.give_back("a", ledger)

    def give_back_after_one_of(self, budget, tmp_path, names):
        with self.ledger(tmp_path, run="a", folder="a") as ledger:
            ledger.append(*next(iter(budget.state().counts)))
            budget.note("a", ledger)
        for name in names:
            with self.ledger(tmp_path, run=name, folder=name) as ledger:
                budget.give_back(name, ledger)

    def test_a_list_cut_short_in_view_of_releases_is_no_list(self, budget, tmp_path):
        """Sixty runs were planned; whoever stops where the loss is largest may not claim the runs made alone."""
        names = [f"r{i}" for i in range(59)]
        reserve(budget, *(request(name, 1) for name in ["a", *names]), epsilon=5.0)
        assert budget.state().claim().epsilon == pytest.approx(room_for(60), rel=1e-6)
        self.give_back_after_one_of(budget, tmp_path, names)
        state = budget.state()
        assert state.counts == {(gaussian(), FULL): 1}
        assert not state.is_fixed_list
        assert state.claim().epsilon == 5.0

    def test_a_list_given_back_before_any_release_was_never_there(self, budget, tmp_path):
        reserve(budget, request("a", 1), request("b", 1))
        with self.ledger(tmp_path, run="b") as ledger:
            budget.give_back("b", ledger)
        assert budget.state().claim().epsilon == pytest.approx(room_for(1), rel=1e-6)

    def test_a_list_that_only_an_accountant_lets_through_stays_whole(self, budget, tmp_path):
        runs = [request(name, 2000, gaussian(1.0), POISSON) for name in "ab"]
        counts = {(gaussian(1.0), POISSON): 4000}
        reserve(budget, *runs, epsilon=compute_epsilon(counts, delta=DELTA, relation="replace_one").epsilon)
        with pytest.raises(LedgerError, match="admitted as part of one list"):
            self.give_back_after_one_of(budget, tmp_path, ["b"])
        assert budget.state().counts == counts

    def test_a_first_list_without_a_price_by_the_rule_fills_the_budget(self, budget):
        run = request("a", 20, gaussian(1.0), POISSON)
        reserve(budget, run, epsilon=3.0, rule="gaussian")
        assert budget.state().spent == math.inf
        with pytest.raises(ConfigurationError, match="has no price"):
            reserve(budget, request("b", 1))

    def test_another_runs_ledger_shows_nothing(self, budget, tmp_path):
        reserve(budget, request("a"))
        with self.ledger(tmp_path, run="b") as ledger, pytest.raises(ConfigurationError, match="ledger of run a"):
            budget.give_back("a", ledger)
        with pytest.raises(ConfigurationError, match="open ledger"):
            budget.give_back("a", PrivacyLedger(HEADER | {"run_id": "a"}, None))


class TestCopies:
    def test_an_older_copy_of_a_run_may_not_go_on(self, budget, tmp_path):
        reserve(budget, request("a", 9))
        path = tmp_path / "ledger.jsonl"
        with PrivacyLedger(HEADER | {"run_id": "a"}, path, durable=False) as ledger:
            ledger.append(gaussian(), FULL)
            copy = path.read_bytes()
            ledger.append(gaussian(), FULL)
            budget.note("a", ledger)
        path.write_bytes(copy)
        with PrivacyLedger.reopen(path) as ledger, pytest.raises(LedgerError, match="older copy"):
            budget.note("a", ledger)

    def test_two_copies_may_not_both_begin(self, budget):
        reserve(budget, request("a", 9))
        first, second = (PrivacyLedger(HEADER | {"run_id": "a"}, None) for _ in range(2))
        first.append(gaussian(), FULL)
        budget.note("a", first)
        second.append(gaussian(), FULL)
        with pytest.raises(LedgerError, match="older copy"):
            budget.note("a", second)

    def test_the_note_comes_before_the_noise_and_stops_the_release(self, tmp_path):
        ledger = PrivacyLedger(HEADER, tmp_path / "ledger.jsonl", durable=False)
        seen = []

        def refuse():
            seen.append(len(PrivacyLedger.read(tmp_path / "ledger.jsonl")))
            raise LedgerError("no")

        ledger.on_append(refuse)
        for number in (1, 2):  # asked again until it is granted
            with pytest.raises(LedgerError, match="no"):
                ledger.append(gaussian(), FULL)
            assert seen[-1] == len(ledger) == number  # charged all the same
        ledger.on_append(lambda: seen.append("granted"))
        ledger.append(gaussian(), FULL)
        assert seen == [1, 2, "granted"]
        assert list(ledger.writers().values()) == [3]


class TestLeases:
    """A copy of a run folder taken in mid-run, of a process that went on and was killed before it could say how far."""

    def begun(self, budget, tmp_path, upto=5, made=4, copied_at=2):
        """Return the ledgers of the original, as the kill left it, and of the copy."""
        reserve(budget, request("a", 9))
        original, copy = tmp_path / "original.jsonl", tmp_path / "copy.jsonl"
        with PrivacyLedger(HEADER | {"run_id": "a"}, original, durable=False) as ledger:
            for number in range(1, made + 1):
                ledger.append(gaussian(), FULL)
                if number == 1:
                    budget.lease("a", ledger, upto)
                if number == copied_at:
                    copy.write_bytes(original.read_bytes())
        return original, copy

    def taken_over(self, budget, path):
        """Go on in a copy: charge what may have been released elsewhere."""
        ledger = PrivacyLedger.reopen(path)
        for writer, count in budget.unseen("a", ledger).items():
            ledger.charge_lost(writer, gaussian(), FULL, count)
        return ledger

    def test_the_copy_is_charged_for_all_that_the_killed_process_had_room_for(self, budget, tmp_path):
        original, copy = self.begun(budget, tmp_path)
        with self.taken_over(budget, copy) as ledger:
            assert len(ledger) == 5
            ledger.append(gaussian(), FULL)
            budget.lease("a", ledger, 4)
        seen = len(PrivacyLedger.read(original)) + 1
        assert seen <= len(PrivacyLedger.read(copy)) == 6
        with PrivacyLedger.reopen(original) as ledger, pytest.raises(LedgerError, match="older copy"):
            budget.unseen("a", ledger)

    def test_without_leases_its_releases_would_be_made_twice(self, budget, tmp_path):
        """The broken twin: what is noted at the first release and at the end alone."""
        original, copy = self.begun(budget, tmp_path, upto=1)
        with self.taken_over(budget, copy) as ledger:
            while len(ledger) < 9:
                ledger.append(gaussian(), FULL)
        visible = len(PrivacyLedger.read(original)) + 9 - 2
        assert visible > sum(budget.state().counts.values())

    def test_an_original_that_lives_stops_when_its_copy_has_begun(self, budget, tmp_path):
        original, copy = self.begun(budget, tmp_path, made=5)
        with PrivacyLedger.reopen(original) as alive, self.taken_over(budget, copy) as ledger:
            ledger.append(gaussian(), FULL)
            budget.lease("a", ledger, 1)
            alive.append(gaussian(), FULL)
            with pytest.raises(LedgerError, match="older copy"):
                budget.lease("a", alive, 9)

    def test_a_copy_stops_when_its_original_went_on_meanwhile(self, budget, tmp_path):
        reserve(budget, request("a", 9))
        path, copy = tmp_path / "original.jsonl", tmp_path / "copy.jsonl"
        with PrivacyLedger(HEADER | {"run_id": "a"}, path, durable=False) as alive:
            alive.append(gaussian(), FULL)
            budget.lease("a", alive, 2)
            copy.write_bytes(path.read_bytes())
            with self.taken_over(budget, copy) as ledger:
                assert len(ledger) == 2
                alive.append(gaussian(), FULL)
                alive.append(gaussian(), FULL)
                budget.lease("a", alive, 4)
                ledger.append(gaussian(), FULL)
                with pytest.raises(LedgerError, match="older copy"):
                    budget.lease("a", ledger, 1)

    def test_what_a_process_that_ended_did_not_use_is_free(self, budget, tmp_path):
        reserve(budget, request("a", 9))
        path = tmp_path / "ledger.jsonl"
        with PrivacyLedger(HEADER | {"run_id": "a"}, path, durable=False) as ledger:
            ledger.append(gaussian(), FULL)
            budget.lease("a", ledger, 5)
            budget.note("a", ledger, has_ended=True)
        with PrivacyLedger.reopen(path) as ledger:
            assert budget.unseen("a", ledger) == {}


def test_a_copy_without_a_release_ends_quietly_when_its_original_has_begun(budget, tmp_path):
    """It gives nothing back, and its end hides no error that it ends with."""
    header = HEADER | {"run_id": "a", "planned": plan_header({(gaussian(), FULL): 9})}
    ledgers = [PrivacyLedger(header, tmp_path / f"{name}.jsonl", durable=False) for name in "ab"]
    members = [
        BudgetMember(flags(budget.folder), one, num_releases=9, next_release=(gaussian(), FULL)) for one in ledgers
    ]
    for member in members:
        member.reserve()
    ledgers[0].append(gaussian(), FULL)
    members[1].end()
    assert sum(budget.state().counts.values()) == 9
    for ledger in ledgers:
        ledger.close()


class TestLongerThanPlanned:
    """A run that was made longer than its plan leases beyond it, and a copy is charged beyond it."""

    def member(self, budget, ledger):
        made = BudgetMember(flags(budget.folder), ledger, num_releases=40, next_release=(gaussian(), FULL))
        made.reserve()
        return made

    def killed_and_copied(self, budget, tmp_path):
        """Return the ledger of a killed run, two of whose releases a copy lacks."""
        header = HEADER | {"run_id": "a", "planned": plan_header({(gaussian(), FULL): 9})}
        original, copy = tmp_path / "original.jsonl", tmp_path / "copy.jsonl"
        with PrivacyLedger(header, original, durable=False) as ledger:
            self.member(budget, ledger)
            for number in range(1, 15):
                ledger.append(gaussian(), FULL)
                if number == 13:
                    copy.write_bytes(original.read_bytes())
        return copy

    def go_on(self, budget, copy):
        """Make all that is left in the copy; return how many releases anybody has seen."""
        with PrivacyLedger.reopen(copy, durable=False) as ledger:
            self.member(budget, ledger)
            while len(ledger) < 40:
                ledger.append(gaussian(), FULL)
            return 14 + ledger.made

    def test_the_copy_keeps_within_the_reservation(self, budget, tmp_path):
        seen = self.go_on(budget, self.killed_and_copied(budget, tmp_path))
        assert seen == 40 == sum(budget.state().counts.values())

    def test_with_room_for_the_plan_alone_it_would_not(self, budget, tmp_path, monkeypatch):
        copy = self.killed_and_copied(budget, tmp_path)
        monkeypatch.setattr(DatasetBudget, "unseen", lambda *_: {})  # what is left of nine after thirteen
        assert self.go_on(budget, copy) > sum(budget.state().counts.values())


def test_a_warm_start_that_died_half_way_needs_what_it_reserved():
    """Its own releases do not take the place of those that were never made; the broken twin asks for two more."""
    ledger = PrivacyLedger(HEADER, None)
    warm, own = (gaussian(3.0), FULL), (gaussian(), FULL)
    plan = {warm: 3, own: 9}
    ledger.append(*warm)
    for _ in range(4):
        assert needed_by(ledger, planned=plan, next_release=own, num_releases=12) == plan
        ledger.append(*own)
    assert needed_by(ledger, planned=plan, next_release=own, num_releases=15) == plan | {own: 12}  # made longer


def test_what_a_run_needs():
    ledger = PrivacyLedger(HEADER, None)
    warm, own = (gaussian(3.0), FULL), (gaussian(), FULL)
    plan = {warm: 1, own: 9}
    assert needed_by(ledger, planned=plan, next_release=own, num_releases=10) == plan
    ledger.append(*warm)
    ledger.append(*own)
    assert needed_by(ledger, planned=plan, next_release=own, num_releases=10) == plan
    louder = (gaussian(2.0), FULL)  # resumed with other noise: what was made, and what is left of the other kind
    assert needed_by(ledger, planned=plan, next_release=louder, num_releases=10) == {warm: 1, own: 1, louder: 8}
    assert needed_by(ledger, planned=plan, next_release=own, num_releases=1) == {warm: 1, own: 1}

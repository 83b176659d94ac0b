"""The budget of a data set: runs reserve before they release, none crosses it, and nothing reserved is ever lost."""

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lightning_dp
from lightning_dp.accounting import budget_file
from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.budget_request import DatasetBudgetSettings, RunRequest, needed_by
from lightning_dp.accounting.claim import ClaimLevel
from lightning_dp.accounting.dataset_budget import DatasetBudget
from lightning_dp.accounting.events import GaussianRelease, NonPrivateRelease, Sampling
from lightning_dp.accounting.filters import make_filter
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import BudgetExceededError, ConfigurationError, LedgerError

ROOT = Path(lightning_dp.__file__).parents[1]
FULL = Sampling(scheme="full")
POISSON = Sampling(scheme="poisson", rate=0.02)
DELTA = 1e-5
HEADER = {
    "relation": "replace_one",
    "unit": "record (through the one teacher that holds it)",
    "mechanism": "Gaussian",
    "target_delta": DELTA,
    "dataset": "digits",
    "fingerprint": "f1",
    "num_records": 200,
}


def gaussian(noise=10.0):
    return GaussianRelease(noise_std=noise, l2_sensitivity=1.0)


def request(run, count=5, event=None, sampling=FULL, **header):
    return RunRequest(run=run, name=run, header=HEADER | header, needed={(event or gaussian(), sampling): count})


def flags(folder, epsilon=3.0, **options):
    return DatasetBudgetSettings(folder=str(folder), epsilon=epsilon, **options)


def room_for(count, event=None):
    """An epsilon that holds exactly so many releases."""
    return compute_epsilon({(event or gaussian(), FULL): count}, delta=DELTA, relation="replace_one").epsilon * (
        1 + 1e-9
    )


@pytest.fixture
def budget(tmp_path):
    return DatasetBudget(tmp_path / "budget")


def reserve(budget, *requests, **options):
    return budget.reserve(flags(budget.folder, **options), list(requests))


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
            with pytest.raises(ConfigurationError, match="made 1 releases, so its whole plan stays charged"):
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


class TestFile:
    def lines(self, budget):
        reserve(budget, request("a"))
        reserve(budget, request("b", 4))
        return budget._file.path, budget._file.path.read_bytes()

    def test_every_flipped_bit_is_refused(self, budget):
        path, data = self.lines(budget)
        for place in range(0, len(data), 23):
            flipped = data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :]
            path.write_bytes(flipped)
            with pytest.raises(LedgerError, match=r"budget\.jsonl[^\n]*$"):
                budget.state()
            with pytest.raises(LedgerError):
                reserve(budget, request("c", 1))
        path.write_bytes(data)
        assert list(budget.state().runs) == ["a", "b"]

    def test_a_cut_at_any_byte_is_refused(self, budget):
        path, data = self.lines(budget)
        for cut in range(0, len(data), 37):
            path.write_bytes(data[:cut])
            with pytest.raises(LedgerError, match="cut off"):
                budget.state()
            with pytest.raises(LedgerError, match="cut off"):
                reserve(budget, request("c", 1))
        path.unlink()
        with pytest.raises(LedgerError, match="no such file"):
            reserve(budget, request("c", 1))

    def test_a_torn_reservation_never_counted_and_is_mended(self, budget):
        path, data = self.lines(budget)
        path.write_bytes(data + b'{"kind":"reserve","ru')
        assert list(budget.state().runs) == ["a", "b"]
        reserve(budget, request("c", 1))
        assert list(budget.state().runs) == ["a", "b", "c"]
        assert path.read_bytes().startswith(data)

    def test_a_line_that_is_whole_counts_though_its_process_died_before_the_head_followed(self, budget):
        self.lines(budget)
        head = (budget.folder / "budget.head").read_bytes()
        reserve(budget, request("c", 1))
        (budget.folder / "budget.head").write_bytes(head)
        assert list(budget.state().runs) == ["a", "b", "c"]

    def test_a_torn_header_is_begun_anew(self, budget):
        budget.folder.mkdir()
        budget._file.path.write_bytes(b'{"dataset":"di')
        reserve(budget, request("a"))
        assert list(budget.state().runs) == ["a"]

    @pytest.mark.parametrize("garbage", [b"\xff\n", b"{}\n", b"[]\n", b"\n\n", b"PK\x03\x04\n"])
    def test_other_files_are_refused_in_one_line(self, budget, garbage):
        budget.folder.mkdir()
        budget._file.path.write_bytes(garbage)
        with pytest.raises(LedgerError, match=r"budget\.jsonl, line 1") as caught:
            reserve(budget, request("a"))
        assert "\n" not in str(caught.value)
        assert budget._file.path.read_bytes() == garbage

    def test_sealed_lines_of_another_kind_are_refused(self, budget):
        reserve(budget, request("a"))
        for line in (
            {"kind": "gift"},
            {"kind": "reserve"},
            {"kind": "seen", "run": "z", "writers": {}},
            {"kind": "return", "run": "z"},
        ):
            with budget._file.locked() as file:
                size = budget._file.path.stat().st_size
                head = (budget.folder / "budget.head").read_bytes()
                file.append(line)
            with pytest.raises(LedgerError, match=r"line 3: no line of a data set's budget"):
                budget.state()
            os.truncate(budget._file.path, size)
            (budget.folder / "budget.head").write_bytes(head)

    def test_a_full_disk_reserves_nothing(self, budget, monkeypatch):
        path, data = self.lines(budget)
        for name in ("write", "fsync"):
            calls = []

            def full(*arguments, calls=calls):
                calls.append(arguments)
                raise OSError(28, "No space left on device")

            with monkeypatch.context() as patch:
                patch.setattr(budget_file.os, name, full)
                with pytest.raises(LedgerError, match="No space left on device"):
                    reserve(budget, request("c", 1))
            assert calls
            assert path.read_bytes() == data
        assert list(budget.state().runs) == ["a", "b"]

    def test_a_reservation_is_on_the_disk_before_it_counts(self, budget, monkeypatch):
        flushed = []
        real = os.fsync
        monkeypatch.setattr(budget_file.os, "fsync", lambda fd: (flushed.append(os.fstat(fd).st_size), real(fd)))
        reserve(budget, request("a"))
        assert budget._file.path.stat().st_size in flushed

    def test_a_folder_that_cannot_be(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(LedgerError, match="cannot be written"):
            DatasetBudget(tmp_path / "file").reserve(flags(tmp_path / "file"), [request("a")])


RACE = """
    import os, sys, time
    from pathlib import Path
    sys.path.insert(0, os.getcwd())
    from tests.accounting.test_dataset_budget import DatasetBudget, flags, request, room_for
    from lightning_dp.errors import BudgetExceededError
    folder, start = Path(sys.argv[1]), time.time() + 0.3
    children = []
    for number in range(int(sys.argv[2])):
        child = os.fork()
        if not child:
            while time.time() < start:
                pass
            try:
                DatasetBudget(folder).reserve(flags(folder, room_for(12)), [request(f"run{number}")])
                os._exit(0)
            except BudgetExceededError:
                os._exit(9)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(*codes)
"""


def test_racing_processes_cannot_both_take_the_last_of_it(tmp_path):
    """Twelve processes at once, room for two of them: two get in, found one budget, and ten are refused."""
    folder = tmp_path / "budget"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RACE), str(folder), "12"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    codes = sorted(map(int, done.stdout.split()))
    assert codes == [0, 0, *[9] * 10]
    state = DatasetBudget(folder).state()
    assert len(state.runs) == 2
    assert state.spent <= 1
    lines = [json.loads(line)["kind"] for line in (folder / "budget.jsonl").read_text().splitlines()]
    assert lines == ["dataset budget", "reserve", "reserve"]


def test_without_the_lock_they_could(tmp_path, monkeypatch):
    """The broken twin: two processes that read before either writes."""
    folder = tmp_path / "budget"
    epsilon = room_for(7)
    budget = DatasetBudget(folder)
    reserve(budget, request("a", 1), epsilon=epsilon)
    stale = budget._file.read()
    reserve(budget, request("b", 5), epsilon=epsilon)
    from lightning_dp.accounting.budget_shortage import shortage_of
    from lightning_dp.accounting.budget_state import state_of

    assert shortage_of(state_of(stale, budget._file.path), [request("c", 5).needed]) is None
    with pytest.raises(BudgetExceededError):
        reserve(budget, request("c", 5), epsilon=epsilon)


def test_the_limit_is_kept_to_the_last_bit():
    rule = make_filter("gaussian", epsilon=1.0, delta=DELTA)
    exact = {(gaussian(1 / math.sqrt(rule.limit)), FULL): 1}
    assert compute_epsilon(exact, delta=DELTA, relation="replace_one").epsilon <= 1.0

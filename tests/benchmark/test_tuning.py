"""A selection is charged before its first run, draws once and by its law, and publishes the best run alone."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.claiming import claim_from_ledger
from lightning_dp.accounting.dataset_budget import DatasetBudget
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.accounting.selection import RepeatLaw, selection_epsilon
from lightning_dp.benchmark.draws import Draws
from lightning_dp.benchmark.grid_file import load_grid
from lightning_dp.benchmark.score import Score
from lightning_dp.benchmark.tuning import Tuning, delete_leftovers
from lightning_dp.benchmark.tuning_result import publish_choice
from lightning_dp.errors import BudgetExceededError, ConfigurationError, LedgerError
from tests.benchmark.made_up import DELTA, FULL, RELATION, gaussian, make_run, noise_for, plan_made_up, write_grid
from tests.benchmark.test_runner import FakeBackend, fail
from tests.cli.runs import TINY

METHODS = {"first": {"config": "base.yaml", "mechanisms": ["Gaussian"]}}
LAW = RepeatLaw(mean=3)
WORST = {(gaussian(noise_for(10, 3)), FULL): 3}
"""The plan of the louder candidates."""
PRICE = selection_epsilon(WORST, LAW, delta=DELTA, relation=RELATION)


class Backend(FakeBackend):
    """Makes runs up, in the order in which they were begun; remembers them."""

    def __init__(self, breaks=None, interrupt_after=None):
        super().__init__(breaks)
        self.begun, self.left = [], interrupt_after

    def start(self, task):
        self.begun.append(task.name)
        super().start(task)

    def collect(self):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left = None if self.left is None else self.left - 1
        return super().collect()


def tuning(tmp_path, *, law=LAW, score="accuracy/cnn", records="held_out", planner=plan_made_up, **changes):
    grid = load_grid(write_grid(tmp_path / "grid", **{"methods": METHODS, **changes}))
    found = Tuning(grid, tmp_path / "out", planner=planner, score=Score(name=score, records=records), law=law)
    found.plan()
    return found


def within(tmp_path, epsilon):
    return {"dataset_budget": {"folder": str(tmp_path / "budget"), "epsilon": epsilon}}


@pytest.fixture
def draw(monkeypatch):
    """Let the law draw this number next; a second draw fails the test."""

    def drawn(number):
        numbers = [number]
        monkeypatch.setattr(RepeatLaw, "draw", lambda self: numbers.pop())

    return drawn


def published(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_best_alone_is_published_under_the_price_of_the_choice(tmp_path, draw, cli):
    draw(5)
    found = tuning(tmp_path)
    best = found.run(Backend())
    assert best is not None
    names = Draws.read(found.private).cells
    values = {name: json.loads(p.read_text())["evaluation"]["accuracy"]["cnn"] for name, p in cards(found, names)}
    assert best.score == max(values.values())
    assert best.scores == {}
    card = publish_choice(found.folder, best, score="accuracy/cnn")
    found.private.joinpath("draws.json").touch()
    delete_leftovers(found.folder)  # as the next command does, where a crash came before the end
    assert card.claim["epsilon"] == PRICE
    outcome = cli("account", found.folder)
    assert (outcome.code, "agrees with the run's own claim" in outcome.out) == (0, True)
    assert "the held-out records of digits: accuracy/cnn" in outcome.out
    names = {"ledger.jsonl", "claim.json", "run_card.json", "run_card.html", "config.yaml", "selected.json", ".lock"}
    assert published(found.folder) == {*names, "samples.png"}
    assert card.created > best.card.created  # its own date would tell its place among the draws
    own = json.dumps(best.card.claim["epsilon"])
    for name in ("run_card.json", "run_card.html", "config.yaml", "selected.json", "claim.json"):
        text = (found.folder / name).read_text()
        assert "private" not in text.replace("PRIVATE", "").replace("the private records", ""), name
        assert own not in text, name


def cards(found, names):
    return [(name, found.private / "runs" / f"{place:04d}" / "run_card.json") for place, name in enumerate(names)]


def test_it_is_charged_before_its_first_run_and_in_the_budget(tmp_path, draw):
    draw(2)

    class Looks(Backend):
        def start(self, task):
            ledger = PrivacyLedger.read(tmp_path / "out" / "ledger.jsonl")
            assert claim_from_ledger(ledger).epsilon == PRICE
            (charge,) = DatasetBudget(tmp_path / "budget").state().runs.values()
            assert (charge.counts, sum(charge.writers.values())) == (ledger.counts(), 1)
            super().start(task)

    found = tuning(tmp_path, **within(tmp_path, 2 * PRICE))
    assert found.run(Looks()) is not None
    assert DatasetBudget(tmp_path / "budget").state().claim().epsilon == PRICE


def test_without_room_in_the_budget_nothing_is_drawn(tmp_path, draw):
    draw(2)
    found, backend = tuning(tmp_path, **within(tmp_path, 0.9 * PRICE)), Backend()
    for refused in (found.check_budget, lambda: found.run(backend)):
        with pytest.raises(BudgetExceededError, match="would cross the budget"):
            refused()
    assert backend.begun == []
    assert not (found.folder / "ledger.jsonl").exists()
    assert not Draws.exist(found.private)


# The number of runs has the law that is priced -----------------------------------------------------------------------


def follows(law, make, tmp_path, trials=300):
    """Tell whether numbers of draws have the law: no count is six standard deviations from its mean."""
    numbers = Counter(len(make(tmp_path / f"{trial}").cells) for trial in range(trials))
    shares = [(trials * law.probability(count), numbers[count]) for count in (1, 2, 3, 5)]
    return all(abs(seen - mean) < 6 * math.sqrt(mean) for mean, seen in shares)


def test_the_number_of_runs_has_the_law_that_is_priced(tmp_path):
    def make(folder):
        folder.mkdir(parents=True)
        return Draws.make(folder, ["a", "b"], LAW)

    def fixed(folder):
        """Broken: exactly as many as the law has on average."""
        folder.mkdir(parents=True)
        return Draws(folder, ("a",) * round(LAW.mean))

    assert follows(LAW, make, tmp_path / "right")
    assert not follows(LAW, fixed, tmp_path / "wrong")


def test_every_candidate_may_be_drawn_each_time(tmp_path):
    seen = Counter()
    for trial in range(100):
        (tmp_path / f"{trial}").mkdir()
        seen.update(Draws.make(tmp_path / f"{trial}", ["a", "b", "c"], RepeatLaw(mean=5)).cells)
    assert len(seen) == 3
    assert min(seen.values()) > 60  # of about 500; below that by chance once in more than 10^9


# All of it is charged, not the winner --------------------------------------------------------------------------------


def is_charged(folder, budget):
    """Tell whether claim, card, ledger and budget of a published run all state the price of the choice."""
    ledger = PrivacyLedger.read(folder / "ledger.jsonl")
    told = [json.loads((folder / name).read_text()) for name in ("claim.json", "run_card.json")]
    (charge,) = budget.state().runs.values()
    return (
        claim_from_ledger(ledger).epsilon == told[0]["epsilon"] == told[1]["claim"]["epsilon"] == PRICE
        and charge.counts == ledger.counts()
    )


def test_a_winner_that_is_charged_alone_is_found(tmp_path, draw):
    draw(3)
    found, budget = tuning(tmp_path, **within(tmp_path, 2 * PRICE)), DatasetBudget(tmp_path / "budget")
    best = found.run(Backend())
    publish_choice(found.folder, best, score="accuracy/cnn")
    assert is_charged(found.folder, budget)
    for wrong in ("ledger.jsonl", "run_card.json"):  # broken: as a program that copies the best run's folder
        kept = (found.folder / wrong).read_bytes()
        shutil.copyfile(best.run_dir / wrong, found.folder / wrong)
        assert not is_charged(found.folder, budget)
        (found.folder / wrong).write_bytes(kept)
    assert is_charged(found.folder, budget)


# Draws are made once -------------------------------------------------------------------------------------------------


def test_an_interrupted_selection_goes_on_with_the_same_draws(tmp_path, draw):
    draw(4)
    found, backend = tuning(tmp_path), Backend(interrupt_after=1)
    with pytest.raises(KeyboardInterrupt, match="same draws"):
        found.run(backend)
    drawn = (found.private / "draws.json").read_bytes()
    assert backend.interrupted
    again, rest = tuning(tmp_path), Backend()
    assert again.run(rest) is not None  # the law would fail the test if it were asked again
    assert (found.private / "draws.json").read_bytes() == drawn
    ended = sorted(path.parent.name for path in found.private.glob("runs/*/run_card.json"))
    assert ended == ["0000", "0001", "0002", "0003"]
    assert backend.begun[0] not in rest.begun, "a run that ended is not made again"
    assert len(PrivacyLedger.read(found.folder / "ledger.jsonl")) == 1


def test_draws_that_are_gone_are_not_drawn_anew(tmp_path, draw, monkeypatch):
    draw(4)
    found = tuning(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        found.run(Backend(interrupt_after=1))
    (found.private / "draws.json").unlink()
    draw(9)
    with pytest.raises(LedgerError, match="draws are gone"):
        tuning(tmp_path).run(Backend())
    monkeypatch.setattr(Draws, "exist", staticmethod(lambda folder: True))
    monkeypatch.setattr(Draws, "read", classmethod(lambda cls, folder: Draws(folder, ("a",) * 9)))
    assert len(Draws.read(found.private).cells) == 9  # broken: as many more as one likes, at no price


def test_a_crash_before_the_charge_keeps_the_draws(tmp_path, draw, monkeypatch):
    draw(4)
    found = tuning(tmp_path)

    def crash(*_):
        raise LedgerError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(PrivacyLedger, "append_all", crash)
        with pytest.raises(LedgerError, match="disk full"):
            found.run(Backend())
    drawn = Draws.read(found.private).cells
    backend = Backend()
    assert tuning(tmp_path).run(backend) is not None
    assert Draws.read(found.private).cells == drawn
    assert len(backend.begun) == 4


def test_a_candidate_that_is_drawn_twice_runs_twice(tmp_path, draw):
    draw(3)
    found = tuning(tmp_path, epsilons=[1], seeds=[1])
    assert found.run(Backend()) is not None
    assert len(set(Draws.read(found.private).cells)) == 1
    ledgers = [PrivacyLedger.read(path) for path in sorted(found.private.glob("runs/*/ledger.jsonl"))]
    assert len(ledgers) == 3
    assert len({next(iter(ledger.writers())) for ledger in ledgers}) == 3


def test_a_run_that_fails_counts_and_is_not_made_again(tmp_path, draw):
    draw(3)
    one = {"epsilons": [1], "seeds": [1]}  # equal scores, whatever was drawn: the first wins
    spent = lambda task, run_dir, config: make_run(run_dir, config, upto=3) or fail(task, run_dir, config)  # noqa: E731
    best = tuning(tmp_path, **one).run(Backend({"0001": fail, "0002": spent}))
    assert best is not None
    assert best.run_dir.name == "0000"
    rest = Backend()
    assert tuning(tmp_path, **one).run(rest) == best
    assert rest.begun == []
    assert Draws.read(tmp_path / "out" / "private").failed == {1, 2}


def test_if_nothing_was_drawn_or_none_ended_the_charge_stays(tmp_path, draw):
    draw(0)
    assert tuning(tmp_path, law=RepeatLaw(mean=3, shape=math.inf)).run(Backend()) is None
    draw(2)
    again = tmp_path / "again"
    assert tuning(again).run(Backend({"0": fail})) is None
    for folder in (tmp_path, again):
        assert len(PrivacyLedger.read(folder / "out" / "ledger.jsonl")) == 1


# Other ways, and mistakes --------------------------------------------------------------------------------------------


def test_all_candidates_are_composed_and_shown(tmp_path):
    found = tuning(tmp_path, law=None, **within(tmp_path, 40.0))
    best = found.run(Backend())
    quiet = {(gaussian(noise_for(1, 3)), FULL): 6}
    counts = {**quiet, **{key: 2 * count for key, count in WORST.items()}}
    assert best.claim.epsilon == compute_epsilon(counts, delta=DELTA, relation=RELATION).epsilon
    assert best.score == max(best.scores.values())
    assert len(best.scores) == 4
    publish_choice(found.folder, best, score="accuracy/cnn")
    found.close(keep=False)
    assert len(list((found.folder / "runs").iterdir())) == 4
    assert DatasetBudget(tmp_path / "budget").state().counts == counts


def test_another_selection_in_the_same_folder_is_refused(tmp_path, draw):
    draw(1)
    tuning(tmp_path).run(Backend())
    for changes in ({"law": RepeatLaw(mean=4)}, {"score": "fid"}, {"seeds": [1]}):
        with pytest.raises(ConfigurationError, match="holds another selection"):
            tuning(tmp_path, **changes).run(Backend())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": {"first": {"config": "base.yaml", "mechanisms": ["NoPrivacy"]}}}, "no price"),
        ({"methods": {"first": {"config": "base.yaml", "mechanisms": ["Impossible"]}}}, "cannot run"),
        ({"score": "niceness"}, "Expected the score to be one of"),
        ({"records": "mine"}, "Expected the score's records"),
    ],
)
def test_mistakes(tmp_path, changes, words):
    with pytest.raises(ConfigurationError, match=words):
        tuning(tmp_path, **changes)


def test_candidates_on_other_records_are_refused(tmp_path):
    def planned(request):
        plan = plan_made_up(request)
        seed = yaml.safe_load(Path(request).read_text())["seed_everything"]
        object.__setattr__(plan, "header", {**plan.header, "fingerprint": f"f{seed}"})
        return plan

    with pytest.raises(ConfigurationError, match="Expected all candidates with fingerprint='f1', got fingerprint='f2'"):
        tuning(tmp_path, planner=planned)


def test_the_claim_says_whose_records_the_score_read(tmp_path):
    kinds = ("held_out", "public", "training")
    found = {records: tuning(tmp_path / records, records=records).plan() for records in kinds}
    assert found["held_out"].epsilon == found["public"].epsilon == PRICE
    assert any("held-out records of digits" in text for text in found["held_out"].not_covered)
    assert not any("held-out records of digits" in text for text in found["public"].not_covered)
    assert (found["training"].epsilon, str(found["training"].level)) == (None, "UNVERIFIED")
    assert "computed from them without noise" in found["training"].statement()


def test_the_claim_says_what_the_time_of_a_random_number_of_runs_tells(tmp_path):
    """Whoever knows when it began and ended knows roughly how many runs were made, which the price takes as unknown."""
    found = {name: tuning(tmp_path / name, law=law).plan() for name, law in (("random", LAW), ("all", None))}
    assert any("roughly how many runs" in text for text in found["random"].not_covered)
    assert not any("roughly how many runs" in text for text in found["all"].not_covered)
    for claim in found.values():
        assert sum(text.startswith("time and memory") for text in claim.not_covered) == 1


def test_lower_is_better_for_a_distance(tmp_path, draw):
    draw(2)
    best = tuning(tmp_path, score="fid").run(Backend())
    assert best.score == best.card.evaluation["fid"] > 0


def test_a_score_that_no_run_will_have():
    for resolved in ({"evaluate": False}, {"evaluation": {"classifiers": ["mlp"]}}):
        with pytest.raises(ConfigurationError, match="accuracy/cnn"):
            Score(name="accuracy/cnn").check(resolved, "a")
    Score(name="accuracy/mlp").check({"evaluation": {"classifiers": ["mlp"]}}, "a")


def tiny_grid(tmp_path):
    data = {"EmbeddedDigits": {"init_args": {"num_train": 200}}}
    methods = {"tiny": {"config": "base.yaml", "mechanisms": ["TopAgg"]}}
    base = yaml.safe_load(TINY.read_text())
    return write_grid(tmp_path, base=base, data=data, methods=methods, epsilons=[1])


def test_the_command_says_the_price_beforehand(tmp_path, cli):
    grid = tiny_grid(tmp_path)
    flags = (grid, "--score", "accuracy/logistic", "--out", tmp_path / "out")
    outcome = cli("select", *flags, "--dry_run", "--mean", 2)
    assert outcome.code == 0, outcome.err
    assert "2 candidates, chosen by accuracy/logistic. The choice is (epsilon=1.696" in " ".join(outcome.out.split())
    assert not (tmp_path / "out" / "ledger.jsonl").exists()
    assert "accuracy/logistic" in cli("select", grid, "--score", "accuracy/cnn", "--dry_run").err
    assert "belong to --rule random" in cli("select", *flags, "--rule", "all", "--mean", 2).error()
    budget = ("--dataset_budget.folder", tmp_path / "budget", "--dataset_budget.epsilon", 1)
    assert "would cross the budget" in cli("select", *flags, "--dry_run", *budget).err


@pytest.mark.slow
def test_the_command_from_end_to_end(tmp_path, cli):
    grid = tiny_grid(tmp_path)
    out, budget = tmp_path / "out", tmp_path / "budget"
    flags = (
        "--score",
        "accuracy/logistic",
        "--mean",
        1,
        "--dataset_budget.folder",
        budget,
        "--dataset_budget.epsilon",
        3,
    )
    outcome = cli("select", grid, *flags, "--out", out)
    assert outcome.code == 0, outcome.err
    assert cli("account", out).code == 0
    assert cli("sample", out, "--num", 10).code == 0
    claim = json.loads((out / "claim.json").read_text())
    assert json.loads((out / "release" / "generator.json").read_text())["claim"]["epsilon"] == claim["epsilon"]
    assert json.loads(cli("account", "--dataset", budget, "--json").out)["claim"]["epsilon"] == claim["epsilon"]
    assert not (out / "private").exists()
    assert "Another selection needs another --out" in cli("select", grid, *flags, "--out", out).error()

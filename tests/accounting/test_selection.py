"""The best of a random number of runs: its price, the law of the number, and a tiny grid from end to end."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from lightning_dp.accounting import selection
from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.budget_request import DatasetBudgetSettings, RunRequest
from lightning_dp.accounting.dataset_budget import DatasetBudget
from lightning_dp.accounting.events import (
    DiscreteGaussianRelease,
    GaussianRelease,
    NonPrivateRelease,
    Sampling,
    SelectionRelease,
    VonMisesFisherRelease,
    ZCDPRelease,
    event_from_dict,
    parse_relation,
)
from lightning_dp.accounting.renyi import relation_curve
from lightning_dp.accounting.selection import RepeatLaw, select_best, selection_epsilon, selection_event
from lightning_dp.errors import ConfigurationError
from tests.conftest import TinyData, callbacks_for, tiny_gan, trainer_for

FULL = Sampling(scheme="full")
RUN = {(GaussianRelease(noise_std=4.1258, l2_sensitivity=1.0), Sampling(scheme="poisson", rate=0.01)): 10_000}
LAWS = [RepeatLaw(mean=mean, shape=shape) for mean in (2, 20) for shape in (0.0, 0.5, 1.0, 3.0, math.inf)]


# Reference values: one run costs epsilon 1.000 by Renyi divergence at delta 1e-5.
@pytest.mark.parametrize(
    ("mean", "shape", "epsilon"),
    [
        (10, math.inf, 2.319),
        (10, 1.0, 2.127),
        (10, 0.5, 1.955),
        (10, 0.0, 1.763),
        (30, math.inf, 4.50),
        (100, math.inf, 8.24),
    ],
)
def test_known_prices(mean, shape, epsilon):
    law = RepeatLaw(mean=mean, shape=shape)
    found = selection_epsilon(RUN, law, delta=1e-5, relation="add_or_remove_one")
    assert found == pytest.approx(epsilon, abs=0.0051)
    one = compute_epsilon(RUN, delta=1e-5, relation="add_or_remove_one", accountant="rdp").epsilon
    assert found > one == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_law_is_one_with_the_mean_that_is_priced(law):
    first = 0 if math.isinf(law.shape) else 1
    chances = [law.probability(count) for count in range(2500)]
    assert sum(chances) == pytest.approx(1.0, abs=1e-6)
    assert sum(count * chance for count, chance in enumerate(chances)) == pytest.approx(law.mean, rel=1e-5)
    assert all(chance == 0 for chance in chances[:first])


def test_the_laws_are_those_of_the_paper():
    geometric = RepeatLaw(mean=5, shape=1.0)
    for count in (1, 2, 7):
        assert geometric.probability(count) == pytest.approx(0.2 * 0.8 ** (count - 1))
    logarithmic = RepeatLaw(mean=5, shape=0.0)
    ratio = logarithmic.probability(2) / logarithmic.probability(1)
    assert logarithmic.probability(3) / logarithmic.probability(2) == pytest.approx(ratio * 4 / 3)
    assert RepeatLaw(mean=1, shape=0.5).draw() == 1


def test_the_number_is_drawn_from_the_operating_system_by_its_law(monkeypatch):
    law = RepeatLaw(mean=4, shape=1.0)
    draws = Counter(law.draw() for _ in range(4000))
    for count in (1, 2, 5):
        expected = 4000 * law.probability(count)
        assert abs(draws[count] - expected) < 6 * math.sqrt(expected)
    torch.manual_seed(0)
    first = [RepeatLaw(mean=50, shape=0.0).draw() for _ in range(30)]
    torch.manual_seed(0)
    assert first != [RepeatLaw(mean=50, shape=0.0).draw() for _ in range(30)]  # no seed replays it
    asked = []
    monkeypatch.setattr(selection.secrets, "randbits", lambda bits: asked.append(bits) or 0)
    law.draw()
    assert asked == [53]


@pytest.mark.parametrize(
    "event",
    [
        GaussianRelease(noise_std=30.0, l2_sensitivity=1.0),
        DiscreteGaussianRelease(noise_std=30.0, l2_sensitivity=1.0),
        ZCDPRelease(rho=1 / 1800),
        VonMisesFisherRelease(distance=1.0, dim=900),
    ],
    ids=lambda event: event.kind,
)
def test_every_private_event_has_a_price(event):
    """All four are 1/1800-zCDP, so they cost the same."""
    law = RepeatLaw(mean=10)
    found = selection_epsilon({(event, FULL): 100}, law, delta=1e-5, relation="replace_one")
    gaussian = {(GaussianRelease(noise_std=30.0, l2_sensitivity=1.0), FULL): 100}
    expected = selection_epsilon(gaussian, law, delta=1e-5, relation="replace_one")
    if event.kind == "von_mises_fisher":  # whose own curve is a little below that
        assert 0.9 * expected < found < expected
    else:
        assert found == pytest.approx(expected, rel=1e-6)
    alone = compute_epsilon(gaussian, delta=1e-5, relation="replace_one").epsilon
    ten = compute_epsilon({key: 10 * count for key, count in gaussian.items()}, delta=1e-5, relation="replace_one")
    assert alone < found < ten.epsilon


def test_the_worst_plan_is_charged_at_every_order():
    """Plans whose Renyi curves cross: the price is not below that of each."""
    few = {(GaussianRelease(noise_std=1.2, l2_sensitivity=1.0), Sampling(scheme="poisson", rate=0.01)): 500}
    many = {(GaussianRelease(noise_std=9.0, l2_sensitivity=1.0), FULL): 15}
    law, where = RepeatLaw(mean=5), {"delta": 1e-5, "relation": "add_or_remove_one"}
    both = selection_event([few, many], law, relation="add_or_remove_one")
    found = compute_epsilon({(both, FULL): 1}, **where).epsilon
    assert found >= max(selection_epsilon(plan, law, **where) for plan in (few, many))
    relation = parse_relation("add_or_remove_one")
    curves = [sum(n * relation_curve(*key, relation) for key, n in plan.items()) for plan in (few, many)]
    assert ((curves[0] > curves[1]).any(), (curves[0] < curves[1]).any()) == (True, True)
    assert len(selection_event([few, few], law, relation="add_or_remove_one").plans) == 1


def test_an_event_survives_json():
    plans = [RUN, {(ZCDPRelease(rho=0.1), FULL): 3}]
    event = selection_event(plans, RepeatLaw(mean=4, shape=math.inf), relation="replace_one")
    assert event_from_dict(json.loads(json.dumps(event.to_dict()))) == event
    assert hash(event) == hash(event_from_dict(event.to_dict()))
    assert str(event) == "the best of a random number of runs (mean 4, Poisson)"


@pytest.mark.parametrize(
    "changes",
    [
        {"plans": ()},
        {"plans": ((),)},
        {"plans": (((NonPrivateRelease(), FULL, 1),),)},
        {"mean": 0.5},
        {"mean": math.inf},
        {"shape": -1.0},
        {"shape": math.nan},
        {"relation": "nearby"},
        {"plans": (((ZCDPRelease(rho=1.0), FULL, 0),),)},
    ],
)
def test_a_selection_that_cannot_be_is_refused(changes):
    fine = {"plans": (((ZCDPRelease(rho=1.0), FULL, 1),),), "mean": 3.0, "shape": 1.0, "relation": "replace_one"}
    SelectionRelease(**fine)
    with pytest.raises(ConfigurationError):
        SelectionRelease(**{**fine, **changes})


def test_sampled_runs_have_a_price_under_replace_one():
    run = {(GaussianRelease(noise_std=4.0, l2_sensitivity=1.0), Sampling(scheme="poisson", rate=0.02)): 200}
    one = compute_epsilon(run, delta=1e-5, relation="replace_one").epsilon
    found = selection_epsilon(run, RepeatLaw(mean=5), delta=1e-5, relation="replace_one")
    unsampled = {(event, FULL): count for (event, _), count in run.items()}
    assert one < found < selection_epsilon(unsampled, RepeatLaw(mean=5), delta=1e-5, relation="replace_one")


def test_a_selection_is_a_release_in_a_data_sets_budget(tmp_path):
    run = {(GaussianRelease(noise_std=10.0, l2_sensitivity=1.0), FULL): 5}
    event = selection_event([run], RepeatLaw(mean=3), relation="replace_one")
    header = {"relation": "replace_one", "unit": "record", "mechanism": "m", "target_delta": 1e-5, "dataset": "d"}
    request = RunRequest(run="s", name="s", header=header, needed={(event, FULL): 1})
    budget = DatasetBudget(tmp_path / "budget")
    budget.reserve(DatasetBudgetSettings(folder=str(budget.folder), epsilon=6.0), [request])
    state = budget.state()
    assert state.terms.rule == "renyi"
    assert state.claim().epsilon == selection_epsilon(run, RepeatLaw(mean=3), delta=1e-5, relation="replace_one")
    exact = DatasetBudget(tmp_path / "exact")
    exact.reserve(DatasetBudgetSettings(folder=str(exact.folder), epsilon=6.0), [replace(request, run="p", needed=run)])
    with pytest.raises(ConfigurationError, match=r"no price for the best of a random number of runs"):
        exact.reserve(DatasetBudgetSettings(folder=str(exact.folder)), [request])


def test_what_has_no_price_is_refused_or_infinite():
    law = RepeatLaw(mean=10)
    assert selection_epsilon({}, law, delta=1e-5, relation="replace_one") == 0
    assert selection_epsilon({(NonPrivateRelease(), FULL): 1}, law, delta=1e-5, relation="replace_one") == math.inf
    for options in ({"mean": 0.5}, {"mean": math.nan}, {"mean": 3, "shape": -1.0}, {"mean": 3, "shape": math.nan}):
        with pytest.raises(ConfigurationError):
            RepeatLaw(**options)
    with pytest.raises(ConfigurationError, match="at least one setting"):
        select_best([], lambda setting: (setting, 0.0), law)
    with pytest.raises(ConfigurationError, match="that is a number"):
        select_best([1], lambda setting: (setting, math.nan), law)


def test_only_the_best_is_returned():
    made = []

    def run(setting):
        made.append(setting)
        return f"model {setting}", float(setting)

    best = select_best([1, 2, 3], run, RepeatLaw(mean=20))
    assert best is not None
    assert (best.setting, best.result, best.score) == (max(made), f"model {max(made)}", float(max(made)))


def test_a_tiny_grid_from_end_to_end(tmp_path, monkeypatch):
    """The recipe: one plan for every setting, a score on the held-out split, and the price of the whole selection."""
    monkeypatch.setattr(RepeatLaw, "draw", lambda self: 3)
    ledgers = []

    def run(learning_rate):
        privatizer, accountant = callbacks_for()
        module = tiny_gan(learning_rate=learning_rate)
        trainer_for(tmp_path, [privatizer, accountant], 3).fit(module, datamodule=TinyData())
        ledgers.append(accountant.ledger.counts())
        images, _ = module.released_generator().sample(10, seed=0)
        held_out = TinyData().read().test_images.float() / 255
        return module.released_model(), -float((images.mean() - held_out.mean()).abs())

    law = RepeatLaw(mean=3)
    best = select_best([0.01, 0.1], run, law)
    assert best is not None
    assert len(ledgers) == 3
    assert all(counts == ledgers[0] for counts in ledgers)  # one plan, whatever the settings
    price = selection_epsilon(ledgers[0], law, delta=1e-5, relation="replace_one")
    assert price > compute_epsilon(ledgers[0], delta=1e-5, relation="replace_one").epsilon

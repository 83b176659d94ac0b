import math

import pytest

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.events import GaussianRelease, Sampling
from lightning_dp.accounting.settings import PrivacySettings, resolve_budget
from lightning_dp.errors import ConfigurationError

FULL = Sampling(scheme="full")


def event(noise_multiplier: float) -> GaussianRelease:
    return GaussianRelease(noise_std=noise_multiplier * 10, l2_sensitivity=10.0)


def resolve(max_steps=None, **options):
    settings = PrivacySettings(neighboring_relation="replace_one", **options)
    return resolve_budget(settings, make_event=event, sampling=FULL, max_steps=max_steps)


@pytest.mark.parametrize(("epsilon", "mu"), [(1, 0.26805), (10, 2.00045)])
def test_target_and_length_give_the_noise(epsilon, mu):
    budget = resolve(max_steps=400, target_epsilon=epsilon)
    assert budget.noise_multiplier == pytest.approx(math.sqrt(400) / mu, rel=1e-4)
    spent = compute_epsilon({(event(budget.noise_multiplier), FULL): 400}, delta=1e-5, relation="replace_one").epsilon
    assert 0.99 * epsilon <= spent <= epsilon


def test_target_and_noise_give_the_length():
    """DataLens on MNIST at epsilon 1: 149 releases (teacher_gans, known answer 10)."""
    budget = resolve(target_epsilon=1.0, noise_multiplier=5000 / (2 * math.sqrt(200 * 15)))
    assert budget.num_releases == 149


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_the_accountant_that_states_the_epsilon_plans_it(accountant):
    """The broken twin, planned by the exact curve, would stop a run by Renyi divergence before its last release."""

    def spent(noise, count):
        counts = {(event(noise), FULL): count}
        return compute_epsilon(counts, delta=1e-5, relation="replace_one", accountant=accountant).epsilon

    noise = resolve(max_steps=20, target_epsilon=3.0, accountant=accountant).noise_multiplier
    assert 2.99 <= spent(noise, 20) <= 3.0
    assert resolve(noise_multiplier=noise, target_epsilon=3.0, accountant=accountant).num_releases == 20
    assert resolve(noise_multiplier=noise, max_steps=20, accountant=accountant).epsilon == spent(noise, 20)
    twin = spent(resolve(max_steps=20, target_epsilon=3.0).noise_multiplier, 20)
    assert (twin > 3.0) is (accountant == "rdp")


def test_noise_and_length_give_epsilon():
    budget = resolve(max_steps=86, noise_multiplier=5000 / (2 * math.sqrt(200 * 15)))
    assert budget.epsilon == pytest.approx(0.7381, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "No privacy setting"),
        ({"max_steps": 5}, "No privacy setting"),
        ({"target_epsilon": 1.0}, "add --trainer.max_steps"),
        ({"noise_multiplier": 1.0}, "does not bound the run"),
        ({"target_epsilon": 1.0, "noise_multiplier": 0.5}, "one release already costs more"),
        ({"target_epsilon": 1.0, "noise_multiplier": 10.0, "max_steps": 400}, "Contradictory"),
    ],
)
def test_too_little_and_contradictory_settings_are_refused(options, words):
    with pytest.raises(ConfigurationError, match=words):
        resolve(**options)


@pytest.mark.parametrize("name", ["target_epsilon", "noise_multiplier"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_bad_numbers_are_refused(name, value):
    with pytest.raises(ConfigurationError, match=name):
        PrivacySettings(neighboring_relation="replace_one", **{name: value})


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_bad_deltas_are_refused(delta):
    with pytest.raises(ConfigurationError, match="target_delta"):
        PrivacySettings(neighboring_relation="replace_one", target_epsilon=1.0, target_delta=delta)


def test_unknown_relations_are_refused_with_the_choices():
    with pytest.raises(ConfigurationError, match="replace_one"):
        PrivacySettings(neighboring_relation="replace", target_epsilon=1.0)


BEFORE = {(GaussianRelease(noise_std=8.0, l2_sensitivity=1.0), FULL): 1}


@pytest.mark.parametrize("sampling", [FULL, Sampling(scheme="poisson", rate=0.05)])
@pytest.mark.parametrize("relation", ["replace_one", "add_or_remove_one"])
def test_releases_that_come_first_are_paid_by_the_same_budget(sampling, relation):
    settings = PrivacySettings(neighboring_relation=relation, target_epsilon=1.0)
    plan = {"make_event": event, "sampling": sampling, "max_steps": 20}
    alone, after = resolve_budget(settings, **plan), resolve_budget(settings, **plan, before=BEFORE)
    assert (after.num_releases, after.num_before, after.num_own) == (21, 1, 20)

    def spent(budget):
        counts = {**BEFORE, (event(budget.noise_multiplier), sampling): 20}
        return compute_epsilon(counts, delta=1e-5, relation=relation).epsilon

    assert 0.999 <= spent(after) <= 1.0
    assert spent(alone) > 1.0  # the broken twin plans as if nothing came first


def test_sampled_releases_that_take_half_of_the_budget_under_replace_one_leave_the_other_half():
    """A guess of what they cost, twice add-or-remove, was taken for the cost: no noise seemed to be enough."""
    poisson, relation = Sampling(scheme="poisson", rate=0.05), "replace_one"
    first = resolve_budget(
        PrivacySettings(neighboring_relation=relation, target_epsilon=0.5),
        make_event=event,
        sampling=poisson,
        max_steps=2,
    )
    before = {(event(first.noise_multiplier), poisson): 2}
    settings = PrivacySettings(neighboring_relation=relation, target_epsilon=1.0)
    after = resolve_budget(settings, make_event=event, sampling=FULL, max_steps=2, before=before)
    counts = {**before, (event(after.noise_multiplier), FULL): 2}
    assert 0.999 <= compute_epsilon(counts, delta=1e-5, relation=relation).epsilon <= 1.0


def test_the_length_leaves_room_for_what_comes_first():
    noise = {"target_epsilon": 1.0, "noise_multiplier": 40.0}
    settings = PrivacySettings(neighboring_relation="replace_one", **noise)
    alone = resolve(**noise)
    after = resolve_budget(settings, make_event=event, sampling=FULL, max_steps=None, before=BEFORE)
    assert 1 < after.num_own < alone.num_releases
    counts = {**BEFORE, (event(40.0), FULL): after.num_own}
    assert compute_epsilon(counts, delta=1e-5, relation="replace_one").epsilon <= 1.0

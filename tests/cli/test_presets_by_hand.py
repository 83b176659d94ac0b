"""Epsilons of shipped configurations, composed once more from the numbers of the papers, by the library alone.

Nothing of ours is between those numbers and the library: no event, no sensitivity, no accountant. The claim is the one
that a run card prints of such a run.
"""

import math
from pathlib import Path

import dp_accounting as dpa
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from lightning_dp.accounting.claim import PrivacyClaim
from lightning_dp.accounting.claiming import claim_from_ledger
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.accounting.plan import parse_plan
from lightning_dp.cli import plugins  # noqa: F401  (names in configurations)
from lightning_dp.cli.planning import plan_cli

pytestmark = pytest.mark.filterwarnings("ignore")  # `main` silences what jsonargparse deprecates

EXPERIMENTS = Path(__file__).parents[2] / "configs" / "experiment"
DELTA = 1e-5
RELATION = dpa.NeighboringRelation


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-dp"])


def card(name: str, *flags: str) -> tuple[PrivacyClaim, list[float]]:
    """Return the claim of a whole run, and the noise std of each kind of its releases."""
    cli = plan_cli(EXPERIMENTS / f"{name}.yaml", *flags)
    header = cli.privatizer.public_header(cli.model, cli.datamodule, cli.budget)
    ledger = PrivacyLedger(header, None)
    ledger.append_all(plan := parse_plan(header["planned"]))
    return claim_from_ledger(ledger), [getattr(event, "noise_std", math.nan) for event, _ in plan]


def gaussian(std_over_distance: float, count: int) -> float:
    """Releases that all records take part in, in closed form."""
    return dpa.get_epsilon_gaussian(std_over_distance / math.sqrt(count), DELTA)


def sampled(parts: list[tuple[float, float, int]], relation: RELATION) -> float:
    """Releases of Poisson batches, by privacy loss distributions.

    Args:
        parts: Noise std over the norm of what one record sends, rate, and how many.
        relation: Under replace-one the library doubles what one record sends.
    """
    accountant = PLDAccountant(relation)
    for multiplier, rate, count in parts:
        accountant.compose(dpa.PoissonSampledDpEvent(rate, dpa.GaussianDpEvent(multiplier)), count)
    return accountant.get_epsilon(DELTA)


def holds(claim: PrivacyClaim, by_hand: float, target: float) -> None:
    assert claim.level == "PROVED"
    assert claim.epsilon == pytest.approx(by_hand, rel=2e-4)
    assert claim.epsilon <= target + 1e-9


def test_datalens():
    """4000 teachers vote on 200 coordinates of each of 15 images; one changes its mind about all: 2 sqrt(3000)."""
    claim, [std] = card("datalens_mnist")
    assert std == pytest.approx(5000)
    holds(claim, gaussian(5000 / (2 * math.sqrt(200 * 15)), claim.num_releases), 1.0)
    assert gaussian(5000 / (2 * math.sqrt(200 * 15)), claim.num_releases + 1) > 1.0


def test_gpate():
    """A teacher moves 150 histograms by sqrt 2, and a third of each largest count by one third."""
    claim, [std] = card("gpate_mnist")
    assert std == pytest.approx(1000)
    holds(claim, gaussian(1000 / math.sqrt(150 * (2 + 1 / 9)), claim.num_releases), 1.0)


@pytest.mark.parametrize(
    "views", [(), ("--model.views_per_record", "4", "--model.max_shift", "2")], ids=["one", "four"]
)
def test_dpsgd_whatever_its_views_and_its_average(views):
    """1024 of 60,000 records a step, 1800 steps, gradients clipped to .1; views are averaged before that."""
    claim, [std] = card("dpsgd_mnist", *views)
    holds(claim, sampled([(std / 0.1, 1024 / 60_000, 1800)], RELATION.ADD_OR_REMOVE_ONE), 2.93)


def test_adaptive_clipping_costs_what_its_noise_says():
    """Gradient and indicator are one vector of norm 1."""
    flags = ("--mechanism", "AdaptiveGaussian", "--privacy.target_epsilon", "null", "--privacy.noise_multiplier", "1.5")
    claim, [std] = card("dpsgd_mnist", *flags)
    assert std == 1.5
    holds(claim, sampled([(1.5, 1024 / 60_000, 1800)], RELATION.ADD_OR_REMOVE_ONE), math.inf)


def test_directions_are_charged_as_zcdp_without_a_gain_of_sampling():
    flags = ("--mechanism", "VonMisesFisher", "--privacy.target_epsilon", "null", "--privacy.noise_multiplier", "20")
    claim, _ = card("dpsgd_mnist", *flags)
    by_hand = RdpAccountant()
    by_hand.compose(dpa.ZCDpEvent(1 / (2 * 20.0**2)), 1800)
    assert 0.97 * by_hand.get_epsilon(DELTA) <= claim.epsilon <= by_hand.get_epsilon(DELTA) * (1 + 1e-9)


@pytest.mark.slow
def test_gswgan():
    """Each of 1000 teachers judges by a coin of 1 %, all 32 images of a step at once, each bounded by 1/32."""
    claim, [std] = card("gswgan_mnist")
    joint = math.sqrt(32) / 32
    holds(claim, sampled([(std / joint, 10 / 1000, 20_000)], RELATION.REPLACE_ONE), 10.0)


def test_gswgan_as_published():
    """A charge per image is no proof, and shows no epsilon."""
    published = ("--model.accounting", "per_image", "--model.expected_judges", "1")
    claim, _ = card(
        "gswgan_mnist", *published, "--privacy.target_epsilon", "null", "--privacy.noise_multiplier", "1.07"
    )
    assert (claim.level, claim.epsilon) == ("UNVERIFIED", None)


def test_joint_gradients_cost_twice_their_bound():
    """50 of 60,000 records share one gradient of norm .5; with one more it may be the opposite one."""
    flags = ("--trainer.max_steps", "20000", "--privacy.target_epsilon", "null", "--privacy.noise_multiplier", "1.1")
    claim, [std] = card("dpsinkhorn_mnist", *flags)
    assert std == pytest.approx(1.1)
    holds(claim, sampled([(1.1 / (2 * 0.5), 50 / 60_000, 20_000)], RELATION.ADD_OR_REMOVE_ONE), math.inf)

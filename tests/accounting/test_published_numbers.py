"""Numbers that papers print for their settings, and what is proved for them."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dp.accounting.accountants import compute_epsilon, paper_epsilon
from tests.accounting.test_accountants import DELTA, FULL, epsilon, gaussian, topagg


def datalens(batch, k=200, noise_std=5000.0):
    return gaussian(noise_std, 2 * math.sqrt(k * batch))


def test_datalens_mnist_numbers():
    step = datalens(15)
    assert step.mu**2 / 2 == pytest.approx(2.4e-4, rel=1e-12)
    assert paper_epsilon({(step, FULL): 86}, delta=DELTA) == pytest.approx(0.9957, abs=1e-4)
    assert paper_epsilon({(step, FULL): 87}, delta=DELTA) == pytest.approx(1.0017, abs=1e-4)
    assert math.sqrt(86) * step.mu == pytest.approx(0.20317, abs=1e-5)
    assert epsilon({(step, FULL): 86}) == pytest.approx(0.7381, abs=1e-4)
    assert epsilon({(step, FULL): 86}, delta=1e-6) == pytest.approx(0.8484, abs=1e-4)
    assert epsilon({(step, FULL): 149}) <= 1 < epsilon({(step, FULL): 150})


def test_datalens_fashion_numbers():
    step = datalens(15, 350, 1000.0)
    assert math.sqrt(146) * step.mu == pytest.approx(1.7510, abs=1e-4)
    assert epsilon({(step, FULL): 146}) == pytest.approx(8.497, abs=1e-3)


@pytest.mark.parametrize(
    ("k", "noise_std", "aggregations", "paper", "exact", "allowed_rdp", "allowed_exact", "target"),
    [
        (200, 5000, 1290, 0.9957, 0.7381, 1909, 2245, 1),
        (700, 9000, 1188, 0.9930, 0.7360, 1767, 2078, 1),
        (700, 9000, 1200, 0.9982, 0.7401, 1767, 2078, 1),
        (300, 800, 1635, 9.9689, 8.4963, 1901, 2134, 10),
        (350, 1000, 2190, 9.9696, 8.4969, 2546, 2858, 10),
        (500, 700, 729, 9.7887, 8.3438, 873, 980, 10),
        (500, 700, 750, 9.9601, 8.4889, 873, 980, 10),
    ],
)
def test_datalens_readme_settings(k, noise_std, aggregations, paper, exact, allowed_rdp, allowed_exact, target):
    one = (datalens(1, k, noise_std), FULL)
    assert paper_epsilon({one: aggregations}, delta=DELTA) == pytest.approx(paper, abs=1e-4)
    assert epsilon({one: aggregations}) == pytest.approx(exact, abs=1e-4)
    for accountant, allowed in (("rdp", allowed_rdp), ("auto", allowed_exact)):
        assert epsilon({one: allowed}, accountant=accountant) <= target
        assert epsilon({one: allowed + 1}, accountant=accountant) > target


@pytest.mark.parametrize(
    ("beta", "k", "noise_std", "target", "allowed"),
    [(0.7, 200, 5000, 1, 2361), (0.9, 200, 5000, 1, 2375), (0.2, 300, 800, 10, 2576), (0.27, 350, 1000, 10, 3589)],
)
def test_ternary_output_allows_more(beta, k, noise_std, target, allowed):
    event = topagg(k, noise_std, beta)
    assert epsilon({(event, FULL): allowed}) <= target < epsilon({(event, FULL): allowed + 1})
    result = compute_epsilon({(event, FULL): allowed}, delta=DELTA, relation="replace_one")
    assert result.accountant == "rdp"
    assert any("ternary" in note for note in result.notes)
    # never above the Gaussian it is a post-processing of
    assert result.epsilon < epsilon({(event, FULL): allowed}, accountant="gaussian")


def test_ternary_falls_back_to_the_gaussian_when_that_is_smaller():
    event = topagg(k=1, noise_std=2.0, beta=0.5, num_teachers=4)
    counts = {(event, FULL): 1}
    assert epsilon(counts) == min(epsilon(counts, accountant=way) for way in ("gaussian", "rdp"))
    assert epsilon(counts) <= epsilon({(gaussian(2.0, 2.0), FULL): 1})


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 5000), noise=st.floats(5, 1e4), delta=st.sampled_from([1e-3, 1e-5, 1e-8]))
def test_exact_is_at_most_improved_renyi_at_most_the_papers(count, noise, delta):
    counts = {(gaussian(noise), FULL): count}
    exact, improved = (epsilon(counts, delta=delta, accountant=way) for way in ("gaussian", "rdp"))
    assert exact <= improved + 1e-9
    assert improved <= paper_epsilon(counts, delta=delta) * (1 + 1e-9) + 1e-12


def test_order_of_the_three_conversions_on_mnist():
    counts = {(datalens(15), FULL): 86}
    values = [epsilon(counts), epsilon(counts, accountant="rdp"), paper_epsilon(counts, delta=DELTA)]
    assert [round(value, 3) for value in values] == [0.738, 0.808, 0.996]

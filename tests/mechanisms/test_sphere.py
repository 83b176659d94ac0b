import numpy as np
import pytest
from scipy import stats

from lightning_dp.accounting.bessel import mean_resultant_length
from lightning_dp.mechanisms.sphere import sample_directions, sample_gaps


def angle_cdf(dim: int, concentration: float):
    """Return the distribution function of the angle: density sin^(d-2) exp(-2 k sin^2(angle / 2)), by quadrature."""

    def log_density(angle):
        return (dim - 2) * np.log(np.sin(angle)) - 2 * concentration * np.sin(angle / 2) ** 2

    rough = np.concatenate([np.geomspace(1e-12, 1e-2, 4000), np.linspace(1e-2, np.pi - 1e-9, 20_000)[1:]])
    heavy = rough[log_density(rough) > log_density(rough).max() - 60]
    angles = np.linspace(heavy[0], heavy[-1], 40_001)
    density = np.exp(log_density(angles) - log_density(angles).max())
    total = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return lambda angle: np.interp(angle, angles, total / total[-1])


SMALL = [(2, 0.0), (2, 3.0), (2, 1e4), (3, 0.5), (3, 1e6), (10, 5.0), (10, 1e9), (1000, 30.0), (1000, 1e5)]
LARGE = [(10**5, 300.0), (10**5, 1e5), (10**6, 1e3), (10**6, 1e6), (10**6, 1e9), (10**7, 1e7)]


@pytest.mark.parametrize(("dim", "concentration"), SMALL + LARGE)
def test_component_along_the_mean_has_its_law(dim, concentration):
    gaps, rests = sample_gaps(dim, np.full(50_000, concentration), np.random.default_rng(7))
    np.testing.assert_allclose(gaps + rests, 2.0, rtol=1e-15)
    angles = 2 * np.arcsin(np.sqrt(gaps / 2))
    assert stats.kstest(angles, angle_cdf(dim, concentration)).pvalue > 1e-3
    # The same test must see a concentration that is off where that matters.
    if concentration**2 > 0.1 * dim:
        assert stats.kstest(angles, angle_cdf(dim, 1.5 * concentration)).pvalue < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "concentration"), [(5, 2.0), (10, 5.0), (20, 30.0), (1000, 1e3), (10**5, 1e3), (10**6, 1e4)]
)
def test_component_along_the_mean_has_its_law_over_millions_of_draws(dim, concentration):
    gaps, _ = sample_gaps(dim, np.full(4_000_000, concentration), np.random.default_rng(8))
    assert stats.kstest(2 * np.arcsin(np.sqrt(gaps / 2)), angle_cdf(dim, concentration)).pvalue > 1e-3


@pytest.mark.parametrize(("dim", "concentration", "num"), [(3, 1.0, 10**6), (10, 5.0, 10**6), (100, 50.0, 10**5)])
def test_mean_is_the_ratio_of_bessel_functions(dim, concentration, num):
    gaps, _ = sample_gaps(dim, np.full(num, concentration), np.random.default_rng(9))
    error = 1 - gaps.mean() - mean_resultant_length(dim, concentration)
    assert abs(error) < 5 * gaps.std() / num**0.5


@pytest.mark.parametrize(("dim", "num"), [(2, 40_000), (3, 40_000), (10, 20_000), (1000, 2000)])
def test_directions_are_symmetric_around_their_mean(dim, num):
    stream = np.random.default_rng(dim)
    eta = stream.standard_normal(dim)
    eta *= 1.5 * dim**0.5 / np.linalg.norm(eta)
    drawn = sample_directions(np.tile(eta, (num, 1)), stream)
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1.0, rtol=1e-12)
    mean = eta / np.linalg.norm(eta)
    along = drawn @ mean
    assert stats.kstest(np.arccos(along), angle_cdf(dim, float(np.linalg.norm(eta)))).pvalue > 1e-4
    across = drawn - along[:, None] * mean
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    fixed = stream.standard_normal(dim)
    fixed -= mean * (mean @ fixed)
    side = across @ (fixed / np.linalg.norm(fixed))
    if dim == 2:
        assert abs(side.mean()) < 5 / num**0.5
        np.testing.assert_allclose(np.abs(side), 1.0)
    else:  # one coordinate of a uniform direction in d - 1 dimensions
        half = (dim - 2) / 2
        assert stats.kstest((side + 1) / 2, stats.beta(half, half).cdf).pvalue > 1e-4


def test_zero_gives_uniform_directions_beside_others():
    stream = np.random.default_rng(3)
    natural = np.zeros((30_000, 3))
    natural[::2, 2] = 4.0
    drawn = sample_directions(natural, stream)
    for axis in range(3):  # Archimedes: each coordinate is uniform on [-1, 1]
        assert stats.kstest((drawn[1::2, axis] + 1) / 2, "uniform").pvalue > 1e-4
    assert drawn[::2, 2].mean() == pytest.approx(float(mean_resultant_length(3, 4.0)), abs=0.01)


@pytest.mark.parametrize("dim", [10**5, 10**6])
def test_large_vectors_keep_norm_and_mean(dim):
    eta = np.zeros((1, dim))
    eta[0, 5] = dim  # mean component 0.618, spread 1e-3
    drawn = sample_directions(eta, np.random.default_rng(dim))
    assert np.linalg.norm(drawn) == pytest.approx(1.0, abs=1e-12)
    assert drawn[0, 5] == pytest.approx(0.6180341, abs=6 / dim**0.5)
    assert stats.kstest(np.delete(drawn[0], 5) * (dim / (1 - drawn[0, 5] ** 2)) ** 0.5, "norm").pvalue > 1e-4


@pytest.mark.parametrize("natural", [np.zeros((2, 1)), np.full((1, 3), np.nan), np.full((1, 3), np.inf)])
def test_bad_parameters_are_refused(natural):
    with pytest.raises(ValueError, match="finite natural parameters"):
        sample_directions(natural, np.random.default_rng(0))

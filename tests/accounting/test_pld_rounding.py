"""What transforms in double precision lose in the far tail of a composed privacy loss distribution."""

import math

import numpy as np
import pytest
from dp_accounting import NeighboringRelation

from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.events import GaussianRelease, Sampling
from lightning_dp.accounting.gaussian_loss import one_gaussian_release
from lightning_dp.errors import ConfigurationError

COUNT, RATE = 10_000, 0.01


def tail_delta(pmf, count: int, epsilon: float) -> float:
    """Compose under exponential tilting, whose rounding is relative to the tail, and return delta at epsilon."""
    dense = pmf.to_dense_pmf()
    masses, step = np.asarray(dense._probs), dense._discretization
    losses = (dense._lower_loss + np.arange(len(masses))) * step
    low, high = 0.0, 50.0
    for _ in range(60):
        tilt = (low + high) / 2
        weights = masses * np.exp(tilt * losses - (tilt * losses).max())
        low, high = (tilt, high) if count * np.average(losses, weights=weights) < epsilon else (low, tilt)
    logs = np.log(np.maximum(masses, 1e-300)) + low * losses
    log_total = np.logaddexp.reduce(logs)
    weights = np.exp(logs - log_total)
    mean = np.sum(weights * losses)
    std = math.sqrt(np.sum(weights * (losses - mean) ** 2) * count)
    size = 1 << math.ceil(math.log2((24 * std + 4 * np.abs(losses).max()) / step))
    wrapped = np.zeros(size)
    np.add.at(wrapped, (dense._lower_loss + np.arange(len(masses))) % size, weights)
    composed = np.fft.ifft(np.fft.fft(wrapped) ** count).real.clip(min=0)
    places = round(mean * count / step) - size // 2 + np.arange(size)
    beyond = places * step > epsilon
    found, at = composed[places % size][beyond], places[beyond] * step
    return float(np.sum(found * np.exp(count * log_total - low * at) * -np.expm1(epsilon - at)))


@pytest.mark.parametrize(("delta", "accountant"), [(1e-5, "pld"), (1e-10, "pld"), (2e-11, "pld"), (1e-12, "rdp")])
def test_a_composed_distribution_keeps_its_delta(delta, accountant):
    counts = {(GaussianRelease(noise_std=1.0, l2_sensitivity=1.0), Sampling(scheme="poisson", rate=RATE)): COUNT}
    result = compute_epsilon(counts, delta=delta, relation="add_or_remove_one")
    assert result.accountant == accountant
    one = one_gaussian_release(1.0, RATE, NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-4)
    assert tail_delta(one._pmf_remove, COUNT, result.epsilon) <= delta


def test_a_delta_within_rounding_is_refused():
    counts = {(GaussianRelease(noise_std=1.0, l2_sensitivity=1.0), Sampling(scheme="poisson", rate=RATE)): COUNT}
    with pytest.raises(ConfigurationError, match="delta=1e-12 is within the rounding"):
        compute_epsilon(counts, delta=1e-12, relation="add_or_remove_one", accountant="pld")

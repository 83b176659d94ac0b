import math

import numpy as np
import pytest
from scipy import special

from lightning_dp.accounting.bessel import mean_resultant_length
from lightning_dp.errors import ConfigurationError


@pytest.mark.parametrize(
    ("dim", "concentration", "expected"),
    [(3, 1.0, 0.3130353), (10, 5.0, 0.4224502), (100, 50.0, 0.4150686), (10**6, 1e6, 0.6180341)],
)
def test_known_values(dim, concentration, expected):
    """mechanisms (d)."""
    assert float(mean_resultant_length(dim, concentration)) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("dim", [2, 3, 5, 10, 64, 100])
def test_agrees_with_the_quotient_of_bessel_functions_where_that_is_computable(dim):
    x = np.geomspace(1e-3, 1e4, 60)
    expected = special.ive(dim / 2, x) / special.ive(dim / 2 - 1, x)
    usable = np.isfinite(expected)
    assert usable.sum() > 30
    np.testing.assert_allclose(mean_resultant_length(dim, x)[usable], expected[usable], rtol=2e-13)


@pytest.mark.parametrize("dim", [2, 3, 10, 1000, 10**5, 10**6, 10**7])
def test_bounds_that_the_proofs_rest_on(dim):
    """0 <= A'(x) / x <= 1/d and decreasing, A'(x) <= 1 and increasing."""
    x = np.geomspace(1e-6, 1e6, 200)
    length = mean_resultant_length(dim, x)
    slope = length / x
    assert (slope <= (1 + 1e-14) / dim).all()
    assert (np.diff(slope) <= 1e-14 * slope[:-1]).all()
    assert (length <= 1).all()
    assert (np.diff(length) >= -1e-14 * length[1:]).all()


def test_scalars_zeros_and_shapes():
    assert mean_resultant_length(4, 0.0) == 0.0
    assert mean_resultant_length(4, np.zeros((2, 3))).shape == (2, 3)
    assert mean_resultant_length(3, 2.0) == pytest.approx(1 / math.tanh(2) - 0.5)


@pytest.mark.parametrize(("dim", "concentration"), [(1, 1.0), (3, -1.0), (3, math.nan), (3, math.inf)])
def test_bad_input_is_refused(dim, concentration):
    with pytest.raises(ConfigurationError, match="dim >= 2 and finite concentrations"):
        mean_resultant_length(dim, concentration)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_dp.errors import ConfigurationError
from lightning_dp.evaluation.fidelity import frechet_distance, gaussian_distance, kernel_distance, precision_recall


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(0, 3), st.floats(0, 3)), min_size=1, max_size=6))
def test_gaussian_distance_of_diagonal_gaussians(axes):
    """Closed form: sum of (difference of means)^2 + (difference of standard deviations)^2."""
    shift, left, right = (torch.tensor(column, dtype=torch.float64) for column in zip(*axes, strict=True))
    got = gaussian_distance(torch.zeros_like(shift), left.square().diag(), shift, right.square().diag())
    assert got == pytest.approx(float(shift.square().sum() + (left - right).square().sum()), abs=1e-7)


def test_gaussian_distance_of_rotated_gaussians():
    """A common rotation changes nothing; covariances that do not commute agree with the product form's eigenvalues."""
    rotation = torch.linalg.qr(normal(4, 4)).Q
    left, right = torch.tensor([1.0, 2, 3, 4]).double().diag(), torch.tensor([2.0, 2, 1, 5]).double().diag()
    zero = torch.zeros(4, dtype=torch.float64)
    turned = gaussian_distance(zero, rotation @ left @ rotation.T, zero, rotation @ right @ rotation.T)
    assert turned == pytest.approx(gaussian_distance(zero, left, zero, right))
    mixed = rotation @ right @ rotation.T
    roots = torch.linalg.eigvals(left @ mixed).sqrt().real.sum()
    expected = float(left.trace() + mixed.trace() - 2 * roots)
    assert gaussian_distance(zero, left, zero, mixed) == pytest.approx(expected)


class FlatFeatures(nn.Module):
    num_features = 12

    def forward(self, images):
        return images.flatten(1).double()


def test_frechet_distance_equals_torchmetrics():
    real, fake = normal(60, 3, 2, 2, seed=1), 1.5 * normal(50, 3, 2, 2, seed=2) + 0.3
    metric = FrechetInceptionDistance(feature=FlatFeatures(), normalize=True, input_img_size=(3, 2, 2))
    metric.set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    ours = frechet_distance(real.flatten(1), fake.flatten(1))
    assert ours == pytest.approx(float(metric.compute()), rel=1e-5)
    assert ours > 1


def test_frechet_distance_of_equal_and_of_constant_sets():
    points = normal(40, 8)
    assert frechet_distance(points, points) == pytest.approx(0, abs=1e-9)
    constant = torch.zeros(10, 8)
    expected = points.mean(0).square().sum() + torch.cov(points.T).trace()
    assert frechet_distance(points, constant) == pytest.approx(float(expected))


def test_kernel_distance_by_its_definition():
    real, fake = normal(9, 5, seed=1).float(), normal(7, 5, seed=2).float() + 1

    def kernel(x, y):
        return float((x @ y / 5 + 1) ** 3)

    within_real = [kernel(real[i], real[j]) for i in range(9) for j in range(9) if i != j]
    within_fake = [kernel(fake[i], fake[j]) for i in range(7) for j in range(7) if i != j]
    across = [kernel(x, y) for x in real for y in fake]
    means = [sum(values) / len(values) for values in (within_real, within_fake, across)]
    expected = means[0] + means[1] - 2 * means[2]
    for chunk in (2, 100):
        assert kernel_distance(real, fake, chunk=chunk) == pytest.approx(expected, rel=1e-4)


def test_kernel_distance_is_unbiased_around_zero():
    values = [kernel_distance(normal(50, 4, seed=i), normal(50, 4, seed=1000 + i)) for i in range(40)]
    assert min(values) < 0 < max(values)


def two_clusters():
    """Real lies at 0 and at 100; fake only at 0: plausible, but without variety."""
    real = torch.cat([normal(40, 2, seed=1), 100 + normal(40, 2, seed=2)])
    fake = 0.1 * normal(40, 2, seed=3)
    return real, fake


def assert_oriented(measure):
    """Precision is what a collapsed but plausible generator keeps, recall what it loses."""
    real, fake = two_clusters()
    precision, recall = measure(real, fake)
    assert precision == 1
    assert recall < 0.3
    precision, recall = measure(fake, real)  # now the fakes hold a cluster that is not real
    assert precision < 0.3
    assert recall == 1


def test_precision_and_recall_are_not_swapped():
    assert_oriented(precision_recall)


def test_the_orientation_check_catches_swapped_names():
    with pytest.raises(AssertionError):
        assert_oriented(lambda real, fake: precision_recall(real, fake)[::-1])


def test_precision_recall_of_known_sets():
    """On a line, k=1: real balls of radius 1 around 0, 1 and 10 (radius 9); fakes 0.5, 1.9, 30 and 31."""
    real = torch.tensor([[0.0], [1.0], [10.0]])
    fake = torch.tensor([[0.5], [-1.5], [30.0], [31.0]])
    # real radii 1, 1, 9 cover [-1, 2] and [1, 19]: of the fakes only 0.5.
    # fake radii 2, 2, 1, 1 cover [-1.5, 2.5], [-3.5, 0.5], [29, 32]: of the reals 0 and 1.
    assert precision_recall(real, fake, neighbours=1) == pytest.approx((1 / 4, 2 / 3))


@pytest.mark.parametrize("chunk", [3, 1000])
def test_precision_recall_of_equal_and_of_far_sets(chunk):
    points = normal(30, 6)
    assert precision_recall(points, points, chunk=chunk) == (1, 1)
    assert precision_recall(points, points + 1000, chunk=chunk) == (0, 0)


def test_precision_recall_survives_a_large_offset():
    real, fake = normal(50, 3, seed=1), normal(50, 3, seed=2)
    assert precision_recall(real + 1e4, fake + 1e4) == precision_recall(real, fake)


def test_constant_fakes_give_a_number():
    precision, recall = precision_recall(normal(20, 3), torch.zeros(20, 3))
    assert 0 <= precision <= 1
    assert recall == 0


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance, precision_recall])
def test_wrong_sets_are_refused(measure):
    with pytest.raises(ConfigurationError, match=r"shape \(N, d\) and \(M, d\)"):
        measure(torch.zeros(9, 2), torch.zeros(9, 3))
    with pytest.raises(ConfigurationError, match="at least"):
        measure(torch.zeros(9, 2), torch.zeros(1, 2))
    with pytest.raises(ConfigurationError, match="Expected finite features"):
        measure(torch.zeros(9, 2), torch.full((9, 2), torch.nan))

import pytest
import torch
import torch.nn.functional as F

from lightning_dp.errors import ConfigurationError
from lightning_dp.losses import transport_cost
from lightning_dp.losses.transport_cost import PointCloud, TransportCost


def cloud(num, dim=7, *, seed=0, dtype=torch.float64, num_classes=3):
    source = torch.Generator().manual_seed(seed)
    points = 2 * torch.rand(num, dim, generator=source, dtype=torch.float64) - 1
    return PointCloud(points.to(dtype), torch.randint(num_classes, (num,), generator=source))


def by_features(first, second, cost, num_classes=3):
    """The definition: squared L2 plus L1 on (x, w onehot(label)), with a tensor over pairs and coordinates."""

    def features(part):
        one_hot = F.one_hot(part.labels, num_classes).to(part.points)
        return torch.cat([part.points, cost.label_weight * one_hot], dim=1)

    difference = features(first)[:, None] - features(second)[None]
    return difference.square().sum(-1) + cost.l1_weight * difference.abs().sum(-1)


COSTS = [TransportCost(l1_weight=m, label_weight=w) for m in (0, 1, 3) for w in (0, 15)]


@pytest.mark.parametrize("cost", COSTS, ids=str)
def test_matrix_is_the_cost_of_features_with_scaled_labels(cost):
    first, second = cloud(6), cloud(4, seed=1)
    torch.testing.assert_close(cost.matrix(first, second), by_features(first, second, cost))


def test_labels_that_differ_cost_450_and_30():
    assert TransportCost(l1_weight=0).label_cost == 450
    assert TransportCost(l1_weight=1).label_cost == 450 + 30


@pytest.mark.parametrize("cost", COSTS, ids=str)
def test_gradient_is_that_of_the_definition(cost):
    first, second = cloud(6), cloud(4, seed=1)
    weights = torch.rand(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    points = first.points.clone().requires_grad_()
    by_features(PointCloud(points, first.labels), second, cost).mul(weights).sum().backward()
    torch.testing.assert_close(cost.gradient(first, second, weights), points.grad)


def test_l1_is_taken_a_few_rows_at_a_time_with_the_same_result(monkeypatch):
    first, second, cost = cloud(7), cloud(4, seed=1), TransportCost()
    weights = torch.rand(7, 4, dtype=torch.float64)
    whole = cost.matrix(first, second), cost.gradient(first, second, weights)
    sizes = []
    original = torch.sub
    monkeypatch.setattr(transport_cost, "_CACHE_NUMBERS", 2 * 4 * 7)  # two rows
    monkeypatch.setattr(torch, "sub", lambda *a, out, **k: sizes.append(out.shape[0]) or original(*a, out=out, **k))
    torch.testing.assert_close(cost.matrix(first, second), whole[0], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(cost.gradient(first, second, weights), whole[1], rtol=1e-14, atol=1e-14)
    assert sizes == [2, 2, 2, 1] * 2


def test_equal_coordinates_have_no_l1_gradient():
    """Black borders agree in every image; they must not fill the clipped norm."""
    points = torch.zeros(3, 5, dtype=torch.float64)
    gradient = TransportCost().gradient(PointCloud(points), PointCloud(points[:2]), torch.ones(3, 2).double())
    assert not gradient.any()


def test_squared_distances_of_float32_points_are_exact_to_the_temperature():
    """In bfloat16 they would be off by more than 0.05; float64 products do not follow autocast."""
    first, second, cost = cloud(20, 784), cloud(20, 784, seed=1), TransportCost(l1_weight=0)
    low = [PointCloud(part.points.float(), part.labels) for part in (first, second)]
    with torch.autocast("cpu", torch.bfloat16):
        matrix = cost.matrix(*low)
    assert matrix.dtype == torch.float64
    assert (matrix - cost.matrix(first, second)).abs().max() < 1e-4
    rounded = low[0].points.bfloat16() @ low[1].points.bfloat16().T
    assert (rounded.double() - first.points @ second.points.T).abs().max() > 0.02


def test_gradient_has_shape_and_type_of_the_points():
    first, second = cloud(3, dtype=torch.float32), cloud(5, seed=1, dtype=torch.float32)
    gradient = TransportCost().gradient(first, second, torch.ones(3, 5, dtype=torch.float64))
    assert gradient.shape == (3, 7)
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize("name", ["l1_weight", "label_weight"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_bad_weights_are_refused(name, value):
    with pytest.raises(ConfigurationError, match=name):
        TransportCost(**{name: value})


@pytest.mark.parametrize(
    ("points", "options", "words"),
    [
        (torch.zeros(0, 3), {}, "n >= 1"),
        (torch.zeros(3), {}, r"\(n, d\)"),
        (torch.zeros(2, 3), {"labels": torch.zeros(3)}, "labels of shape"),
        (torch.zeros(2, 3), {"log_weights": torch.zeros(2, 1)}, "log_weights of shape"),
    ],
)
def test_clouds_that_do_not_fit_are_refused(points, options, words):
    with pytest.raises(ValueError, match=words):
        PointCloud(points, **options)


def test_labels_of_one_cloud_only_are_refused():
    with pytest.raises(ValueError, match="one has labels"):
        TransportCost().matrix(cloud(3), PointCloud(cloud(3).points))

"""Gradients through standardised weights against automatic differentiation, and the norms that bound them."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dp.gradients import record_gradients
from lightning_dp.gradients import standardised as standardised_gradients
from lightning_dp.gradients.parts import Order, Rows
from lightning_dp.gradients.record_gradients import RecordGradients, overheard_gradients
from lightning_dp.gradients.standardised import Standardisation, StandardisedRows, rounding_margin
from lightning_dp.networks.standardised import made_from, standardised
from lightning_dp.networks.wide_resnet import StandardisedConv2d


def weights(dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """Three outputs: an ordinary one, one below the least variance, one far from centred."""
    stream = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, 3, 3, generator=stream, dtype=torch.float64)
    weight[1] *= 1e-4
    weight[2] += 30
    gain = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64).view(3, 1, 1, 1)
    return weight.to(dtype).requires_grad_(), gain.to(dtype).requires_grad_()


def through(given: Tensor, order: Order | None = None) -> tuple[StandardisedRows, Tensor, Tensor]:
    """Rows through the weights, and what automatic differentiation makes of them: of the weight, and of the gain."""
    weight, gain = weights(given.dtype)
    made = standardised(weight, gain)
    source = made_from(made)
    assert source is not None
    found = [torch.autograd.grad(made, (weight, gain), one, retain_graph=True) for one in given]
    laid = given if order is None else order.laid(given)
    rows = Rows(laid if order is not None else laid.flatten(2), order)
    over = Standardisation(source, len(given), order)
    over.measure(rows.lines, slice(0, len(given)))
    part = StandardisedRows(rows, over)
    return part, torch.stack([pair[0].flatten() for pair in found]), torch.stack([pair[1].flatten() for pair in found])


@pytest.mark.parametrize("order", [None, Order((3, 3, 3, 4), (0, 3, 1, 2))], ids=["as it is", "channels last"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_equals_automatic_differentiation(order, dtype, rtol):
    given = torch.randn(5, 3, 4, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    part, wanted, wanted_gain = through(given, order)
    atol = rtol * float(wanted.abs().max())
    torch.testing.assert_close(part.rows(), wanted, rtol=rtol, atol=atol)
    torch.testing.assert_close(part.through.gains, wanted_gain, rtol=rtol, atol=rtol * float(wanted_gain.abs().max()))
    torch.testing.assert_close(part.squared_norms.sqrt().to(dtype), wanted.norm(dim=1), rtol=rtol, atol=0)
    shares, total = torch.linspace(0.2, 1, 5, dtype=torch.float64), torch.zeros(wanted.shape[1], dtype=torch.float64)
    part.add_weighted_sum(shares, total)
    torch.testing.assert_close(total, shares @ wanted.double(), rtol=rtol, atol=5 * atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_summed_is_bounded_by_its_norm(dtype):
    """Also where nearly everything of a gradient lies along what the map takes away."""
    weight, gain = weights(dtype)
    stream = torch.Generator().manual_seed(2)
    given = torch.randn(6, 3, 4, 3, 3, generator=stream, dtype=torch.float64)
    given[1], given[2] = 1e3 + given[1], 1e3 * weight.detach().double() + given[2]
    given[3, :2], given[4] = 0, 1e-30 * given[4]
    part, _, _ = through(given.to(dtype))
    found = RecordGradients(torch.arange(6), [[part], [Rows(part.through.gains)]], [weight.numel(), gain.numel()])
    for record, bound in enumerate(found.norm_bounds):
        alone = found.weighted_sum(F.one_hot(torch.tensor(record), 6).double())
        assert alone.norm() <= bound
        loose = 0.1 * float(part.squared_masses[record].sqrt())  # much cancels, or underflows
        assert bound <= max(1.01 * float(alone.norm()), loose, 1e-15)


def test_rounding_of_norms_is_counted():
    """The broken twin: norms as computed in single precision, below the truth for about half of the records."""
    weight, _ = weights(torch.float32)
    stream = torch.Generator().manual_seed(4)
    centred = weight.detach() - weight.detach().mean((1, 2, 3), keepdim=True)
    given = torch.randn(50, 3, 4, 3, 3, generator=stream) + 10 * F.normalize(centred.flatten(1)).view_as(centred)
    part, _, _ = through(given)
    totals = [torch.zeros(weight.numel(), dtype=torch.float64) for _ in given]
    for record, total in enumerate(totals):
        part.add_weighted_sum(F.one_hot(torch.tensor(record), len(given)).double(), total)
    exact = torch.stack(totals).norm(dim=1)
    assert (part.squared_norms.sqrt() < exact).sum() > 5
    assert (part.squared_bounds.sqrt() >= exact).all()


def worst(m: int, u: float) -> Fraction:
    """Return how far a squared norm may be off in terms of |G|^2: gamma of each sum and product, no order cut off."""
    unit = Fraction(u)

    def gamma(count: int) -> Fraction:
        return count * unit / (1 - count * unit)

    squared_h = (1 + 5 * unit) ** 4 / (1 - gamma(m))  # |c|^2 is off by gamma(m), its root and what follows by 5 u
    of_b = (1 + gamma(m)) ** 2 - 1
    off = gamma(m + 2)  # |G|^2: squares, a root, and its square
    off += (1 + gamma(m - 1)) ** 2 - 1  # m a^2
    off += of_b  # b^2 (2 - |h|^2), in which x |2 - x| <= 1
    off += (1 + of_b) * squared_h**2 * gamma(m + 2)  # the same, of |h|^2
    off += 2 * squared_h * ((1 + gamma(m - 1)) ** 2 * (1 + gamma(m)) - 1)  # 2 a b <h, 1>, at worst all along one vector
    return off + (48 * unit if unit < 2**-50 else 0)  # what double precision adds where it is the precision of G


def measured(m: int, u: float) -> Fraction:
    """Return |G|^2 as it enters the margin, at the least, in terms of what it is."""
    off = (m + 3) * Fraction(u)
    return Fraction(91, 90) * (1 - off / (1 - off))


@pytest.mark.parametrize("unit", [2.0**-8, 2.0**-24, 2.0**-53])
def test_the_margin_covers_any_order_of_adding_for_all_shapes(unit):
    shapes = [1, 2, 9, 27, 50, 144, 576, 2304, 4608, 20_000, 53_000, 150_528, 10**6, 3_355_000]
    covered = [m for m in shapes if math.isfinite(rounding_margin(m, unit))]
    assert covered == [m for m in shapes if (m + 4) * unit <= 0.2]
    for m in covered:
        assert worst(m, unit) <= Fraction(rounding_margin(m, unit)) * measured(m, unit)
    assert rounding_margin(2304, 2.0**-24) < 0.00166  # of the squared norm, on WRN-16-4


def test_the_first_order_alone_would_not_cover_large_inputs():
    """The broken twin: 12 (m + 4) u, for a layer that sees an image of 224 x 224 in colour."""
    m, unit = 150_528, 2.0**-24
    assert worst(m, unit) > 12 * (m + 4) * Fraction(unit) * measured(m, unit)


def test_weights_with_too_many_inputs_are_carried_back(monkeypatch):
    net, maps = Net(lambda conv, maps: conv(maps)), torch.randn(2, 1, 6, 6)
    found = [overheard_gradients(net, lambda n, m: n(m).sum(), (maps,), ids=torch.arange(2), as_rows=False)]
    monkeypatch.setattr(standardised_gradients, "_MOST_ROUNDING", 1e-12)
    found += [overheard_gradients(net, lambda n, m: n(m).sum(), (maps,), ids=torch.arange(2), as_rows=False)]
    assert [any(isinstance(part, StandardisedRows) for part in one._parts) for one in found] == [True, False]
    torch.testing.assert_close(found[0].norms, found[1].norms, rtol=1e-4, atol=0)


def test_norms_of_what_the_weight_became_would_not_do():
    """The broken twin: the gain multiplies gradients, so a norm taken before the map is too small for gain 2."""
    given = torch.zeros(1, 3, 4, 3, 3, dtype=torch.float64)
    given[0, 1] = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    part, wanted, _ = through(given)
    assert Rows(given.flatten(1)).squared_bounds.sqrt() < wanted.norm()
    assert part.squared_bounds.sqrt() >= wanted.norm()


class Net(nn.Module):
    def __init__(self, run) -> None:
        super().__init__()
        self.conv = StandardisedConv2d(1, 2, 3)
        self._run = run

    def forward(self, maps: Tensor) -> Tensor:
        return self._run(self.conv, maps)


def written_to(conv: nn.Module, maps: Tensor) -> Tensor:
    weight = standardised(conv.weight, conv.gain)
    weight.mul_(3)
    return F.conv2d(maps, weight, conv.bias)


def twice(conv: nn.Module, maps: Tensor) -> Tensor:
    weight = standardised(conv.weight, conv.gain)
    return F.conv2d(maps, weight) + F.conv2d(torch.tanh(maps), weight)


@pytest.mark.parametrize("run", [lambda conv, maps: conv(maps), written_to, twice])
@pytest.mark.parametrize("frozen", ["", "gain", "weight"])
def test_networks_equal_single_backward_passes(run, frozen):
    torch.manual_seed(0)
    net = Net(run).double()
    for name, parameter in net.conv.named_parameters():
        parameter.requires_grad_(name != frozen and not (name == "bias" and run is twice))
    maps = torch.randn(4, 1, 6, 6, dtype=torch.float64)
    trained = [p for p in net.parameters() if p.requires_grad]

    def loss(net: nn.Module, one: Tensor) -> Tensor:
        return net(one).square().sum()

    wanted = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(loss(net, one[None]), trained)]) for one in maps]
    )
    found = overheard_gradients(net, loss, (maps,), ids=torch.arange(4), as_rows=False)
    torch.testing.assert_close(found.weighted_sum(torch.ones(4).double()), wanted.sum(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.norms, wanted.norm(dim=1), rtol=1e-9, atol=1e-9)


def test_gradients_of_fewer_bits_are_measured_in_those_of_the_weight():
    """Under autocast: as they are, their norms would be known to a few percent, and no run would begin."""
    torch.manual_seed(0)
    net, maps = Net(lambda conv, maps: conv(maps)), torch.randn(4, 1, 6, 6)

    def loss(net: nn.Module, one: Tensor) -> Tensor:
        return net(one).float().square().sum()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = overheard_gradients(net, loss, (maps,), ids=torch.arange(4), as_rows=False)
    found = overheard_gradients(net, loss, (maps,), ids=torch.arange(4), as_rows=False)
    torch.testing.assert_close(low.norms, found.norms, rtol=0.05, atol=0)
    for record, bound in enumerate(low.norm_bounds):
        alone = low.weighted_sum(F.one_hot(torch.tensor(record), 4).double()).norm()
        assert alone <= bound <= 1.02 * alone


def test_the_closed_form_is_what_networks_use(monkeypatch):
    def fail(*args):
        raise AssertionError("carried back row by row")

    monkeypatch.setattr(record_gradients, "_carried_back", fail)
    net, maps = Net(lambda conv, maps: conv(maps)), torch.randn(2, 1, 6, 6)
    overheard_gradients(net, lambda n, m: n(m).sum(), (maps,), ids=torch.arange(2), as_rows=False)

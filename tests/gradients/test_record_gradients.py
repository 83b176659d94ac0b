import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_dp.errors import PrivacyProtocolError
from lightning_dp.gradients import parts
from lightning_dp.gradients.layers import patches
from lightning_dp.gradients.overheard import UnsupportedNetwork
from lightning_dp.gradients.parts import Product, Rows
from lightning_dp.gradients.per_record import trainable_parameters
from lightning_dp.gradients.record_gradients import RecordGradients, overheard_gradients
from lightning_dp.modules.dpsgd import mean_cross_entropy
from lightning_dp.modules.vae import DPVAE
from lightning_dp.networks.classifiers import ConvClassifier, FeatureClassifier, MLPClassifier
from lightning_dp.networks.dcgan import DCGANCritic
from lightning_dp.networks.scattering import ScatteringClassifier
from lightning_dp.networks.small import MLPDiscriminator, SmallConvDiscriminator
from lightning_dp.networks.tempered import TemperedCNN
from lightning_dp.networks.vae import ConvDecoder, ConvEncoder, CosineDecoder, CosineEncoder, one_hot
from lightning_dp.networks.wide_resnet import WideResNet

GRAY = (1, 28, 28)


def looped(net, loss, records) -> torch.Tensor:
    """Gradients by single backward passes."""
    rows = []
    for index in range(len(records[0])):
        part = loss(net, *(tensor[index : index + 1] for tensor in records))
        found = torch.autograd.grad(part, list(trainable_parameters(net).values()), allow_unused=True)
        parameters = trainable_parameters(net).values()
        pairs = zip(found, parameters, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
    return torch.stack(rows)


def gradients_of(net, loss, records, *, as_rows=False) -> RecordGradients:
    return overheard_gradients(net, loss, records, ids=torch.arange(len(records[0])), as_rows=as_rows)


def rows_of(gradients) -> torch.Tensor:
    return torch.cat([chunk.values[:, 0] for chunk in gradients.row_chunks()])


def classifier(make, shape=GRAY, views=1):
    def build():
        records = (torch.rand(4, views, *shape), torch.arange(4) % 10)
        return make(), mean_cross_entropy, records

    return build


def critic(make, shape=GRAY):
    def loss(net, image, label):
        return F.softplus(-net(image, one_hot(label, 10).to(image))).sum()

    return lambda: (make(), loss, (torch.rand(4, *shape), torch.arange(4)))


def autoencoder(make_encoder, make_decoder, draws=1):
    def build():
        module = DPVAE(make_encoder(), make_decoder(), draws_per_record=draws)
        latents = torch.randn(4, draws, module.autoencoder.encoder.latent_dim)
        return module.autoencoder, module.record_loss, (torch.rand(4, *GRAY), torch.arange(4), latents)

    return build


NETWORKS = {
    "tempered": classifier(TemperedCNN),
    "tempered sigmoid, 3 views": classifier(lambda: TemperedCNN(activation="tempered_sigmoid"), views=3),
    "wide resnet, 2 views": classifier(lambda: WideResNet((3, 8, 8), depth=10, width=1), (3, 8, 8), views=2),
    "conv": classifier(lambda: ConvClassifier(GRAY, 10)),
    "mlp": classifier(lambda: MLPClassifier(GRAY, 10)),
    "scattering": classifier(lambda: ScatteringClassifier(GRAY, order=2)),
    "features": classifier(FeatureClassifier),
    "dcgan critic": critic(lambda: DCGANCritic(GRAY, width=8)),
    "small critic": critic(lambda: SmallConvDiscriminator(GRAY, 10)),
    "mlp critic": critic(lambda: MLPDiscriminator(GRAY, 10)),
    "conv vae, 2 draws": autoencoder(lambda: ConvEncoder(GRAY), lambda: ConvDecoder(GRAY), draws=2),
    "cosine vae": autoencoder(lambda: CosineEncoder(GRAY), lambda: CosineDecoder(GRAY)),
}


def built(build, dtype):
    torch.manual_seed(0)
    net, loss, records = build()
    return net.to(dtype), loss, tuple(t.to(dtype) if t.is_floating_point() else t for t in records)


def assert_same(net, loss, records, *, as_rows, rtol, atol):
    wanted = looped(net, loss, records).double()
    found = gradients_of(net, loss, records, as_rows=as_rows)
    weights = torch.linspace(0.3, 1.0, len(wanted), dtype=torch.float64)
    scale = wanted.abs().max()
    torch.testing.assert_close(found.norms, wanted.norm(dim=1), rtol=rtol, atol=0)
    torch.testing.assert_close(found.weighted_sum(weights), weights @ wanted, rtol=rtol, atol=atol * scale)
    torch.testing.assert_close(rows_of(found).double(), wanted, rtol=rtol, atol=atol * scale)
    bounds = found.norm_bounds / wanted.norm(dim=1)
    assert ((bounds >= 1) & (bounds < 1.001)).all()


@pytest.mark.parametrize("as_rows", [False, True], ids=["ghost", "materialize"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_equals_a_loop_of_single_backward_passes(name, as_rows):
    assert_same(*built(NETWORKS[name], torch.float64), as_rows=as_rows, rtol=1e-10, atol=1e-12)
    assert_same(*built(NETWORKS[name], torch.float32), as_rows=as_rows, rtol=1e-4, atol=1e-5)


class Chain(nn.Module):
    """Uses whatever it is told to."""

    def __init__(self, layers: dict[str, nn.Module], run) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._run = run

    def forward(self, values):
        return self._run(self, values)


def squares(net, values):
    return net(values).square().sum()


def tied():
    net = Chain({"a": nn.Linear(5, 5), "b": nn.Linear(5, 5)}, lambda n, x: n.b(torch.tanh(n.a(x))))
    net.b.weight = net.a.weight
    return net


UNUSUAL = {
    "a layer used twice": lambda: Chain({"a": nn.Linear(5, 5)}, lambda n, x: n.a(torch.tanh(n.a(x)))),
    "a weight of two layers": tied,
    "a transposed weight": lambda: Chain(
        {"a": nn.Linear(5, 3)}, lambda n, x: F.linear(torch.tanh(n.a(x)), n.a.weight.T)
    ),
    "places of a sequence": lambda: Chain(
        {"a": nn.Linear(1, 4), "norm": nn.LayerNorm(4)}, lambda n, x: n.norm(n.a(x.unsqueeze(-1)))
    ),
    "an unused layer": lambda: Chain({"a": nn.Linear(5, 2), "b": nn.Linear(5, 2)}, lambda n, x: n.a(x)),
    "a frozen layer": lambda: Chain(
        {"a": nn.Linear(5, 4), "b": nn.Linear(4, 4).requires_grad_(False), "c": nn.Linear(4, 2)},
        lambda n, x: n.c(torch.tanh(n.b(n.a(x)))),
    ),
    "a weight without a bias": lambda: nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 2)),
    "activations in place": lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)),
    "a part without a gradient": lambda: Chain(
        {"a": nn.Linear(5, 3), "b": nn.Linear(5, 3)}, lambda n, x: n.a(x) * n.b(x).detach()
    ),
    "a row of maps": lambda: Chain({"a": nn.Conv2d(1, 2, 1)}, lambda n, x: n.a(x.view(1, 1, 5))),
    "two heads": lambda: Chain({"a": nn.Linear(5, 4), "b": nn.Linear(5, 4)}, lambda n, x: n.a(x) * n.b(x)),
    "transposed convolution": lambda: Chain(
        {"a": nn.ConvTranspose2d(1, 3, 3, stride=2, padding=1, output_padding=1), "n": nn.GroupNorm(3, 3)},
        lambda n, x: n.n(n.a(x.view(-1, 1, 1, 5))),
    ),
}


@pytest.mark.parametrize("as_rows", [False, True], ids=["ghost", "materialize"])
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_uses_of_weights_are_right(name, as_rows):
    torch.manual_seed(0)
    net = UNUSUAL[name]().double()
    records = (torch.randn(6, 5, dtype=torch.float64),)
    assert_same(net, squares, records, as_rows=as_rows, rtol=1e-10, atol=1e-12)


def penalised(net, values):
    return torch.func.grad(lambda at: net(at).sum())(values).square().sum()


def overwriting(net, values):
    values = values.clone()
    out = net[0](values)
    values.zero_()
    return out.square().sum()


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, values):
        return self.a(values) * self.b(torch.ones(1, 5, dtype=values.dtype))


class Product2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 4)

    def forward(self, values):
        return self.a(values) + values @ self.a.weight.T


def plain_net():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def weight_of_a_record(net, values):
    return F.linear(values, values.expand(5, 5) * net[0].weight.sum()).square().sum()


REFUSED = {
    "a matrix product": (Product2, squares, "a.weight is used by another operation"),
    "a decay of weights": (plain_net, lambda n, x: squares(n, x) + n[0].weight.square().sum(), "0.weight is used by"),
    "a gradient penalty": (plain_net, penalised, "differentiates"),
    "an overwritten input": (plain_net, overwriting, "overwritten"),
    "no record's own": (Constant, squares, "no record's own"),
    "a weight of a record": (plain_net, weight_of_a_record, "0.weight is used by another operation"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_overheard_is_refused(name):
    make, loss, words = REFUSED[name]
    with pytest.raises(UnsupportedNetwork, match=words):
        gradients_of(make(), loss, (torch.randn(3, 5),))


@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": 2}, {"padding": "same"}], ids=str)
def test_convolutions_of_other_kinds_are_refused(options):
    net = nn.Sequential(nn.Conv2d(2, 2, 3, **options))
    with pytest.raises(UnsupportedNetwork, match="convolution"):
        gradients_of(net, squares, (torch.randn(3, 2, 6, 6),))


def test_no_record_reaches_another():
    net, loss, (views, labels) = built(NETWORKS["wide resnet, 2 views"], torch.float32)
    before = rows_of(gradients_of(net, loss, (views, labels)))
    views[2] += 100
    after = rows_of(gradients_of(net, loss, (views, labels)))
    others = torch.arange(4) != 2
    torch.testing.assert_close(before[others], after[others], rtol=1e-5, atol=1e-7)
    assert not torch.equal(before[2], after[2])


def test_a_coupled_loss_cannot_be_written():
    """The broken twin: a term over pairs. The loss is handed one record, whose only pair is with itself."""

    def with_spread(net, values):
        return squares(net, values) + net(values).var(0, unbiased=False).sum()

    net, records = plain_net(), (torch.randn(5, 5),)
    torch.testing.assert_close(
        rows_of(gradients_of(net, with_spread, records)), rows_of(gradients_of(net, squares, records))
    )


@pytest.mark.parametrize("as_rows", [False, True], ids=["ghost", "materialize"])
def test_a_record_that_is_no_number_adds_nothing_and_spoils_nobody(as_rows):
    net, values = plain_net(), torch.randn(5, 5)
    values[1, 0], values[3, 2] = math.nan, math.inf
    found = gradients_of(net, squares, (values,), as_rows=as_rows)
    assert torch.isfinite(found.norm_bounds).tolist() == [True, False, True, False, True]
    weights = torch.isfinite(found.norm_bounds).double()
    kept = torch.tensor([0, 2, 4])
    alone = gradients_of(net, squares, (values[kept],), as_rows=as_rows).weighted_sum(torch.ones(3).double())
    torch.testing.assert_close(found.weighted_sum(weights), alone, rtol=1e-5, atol=1e-7)
    assert torch.isfinite(found.weighted_sum(torch.zeros(5).double())).all()


def test_parameters_and_their_gradients_are_left_alone():
    net = plain_net()
    before = [p.clone() for p in net.parameters()]
    gradients_of(net, squares, (torch.randn(3, 5),)).weighted_sum(torch.ones(3).double())
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


class TestBounds:
    """Norms that the contributions, as they are summed, do not exceed."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-3, 1.0, 1e15])
    def test_rows_are_measured_from_above(self, dtype, scale):
        stream = torch.Generator().manual_seed(0)
        values = (torch.randn(50, 7, 900, generator=stream, dtype=torch.float64) * scale).to(dtype)
        exact = values.double().flatten(1).norm(dim=1)
        part = Rows(values)
        assert (part.squared_bounds.sqrt() >= exact).all()
        if scale > 1e-18:
            assert (part.squared_bounds.sqrt() <= exact * 1.001).all()

    def test_squares_that_underflow_are_counted(self):
        """The broken twin: the plain norm of single precision, which is zero here."""
        part = Rows(torch.full((1, 1, 10**4), 1e-30))
        assert part.squared_norms.sqrt() < 1e-28 == pytest.approx(1e-30 * 10**2)
        assert part.squared_bounds.sqrt() >= 1e-28

    def test_places_that_cancel_raise_the_norm(self):
        """What is summed rounds in proportion to what cancels, so a norm far below that is not taken at its word."""
        left = torch.randn(3, 2, 4, dtype=torch.float64)
        right = torch.ones(3, 2, 5, dtype=torch.float64)
        left[:, 1] = -left[:, 0] * (1 - 1e-9)
        part = Product(left, right)
        found = RecordGradients(torch.arange(3), [[part]], [20])
        assert (found.norms < 1e-7).all()
        assert (found.norm_bounds >= part.squared_masses.sqrt() / 64).all()

    def test_factors_are_measured_from_above(self):
        stream = torch.Generator().manual_seed(1)
        left, right = (torch.randn(40, 3, size, generator=stream).double() for size in (6, 8))
        part = Product(left, right)
        exact = part.rows().norm(dim=1)
        assert (part.squared_bounds.sqrt() >= exact * (1 - 1e-15)).all()
        assert (part.squared_masses.sqrt() >= exact).all()


def test_factors_that_were_overwritten_after_they_were_measured_are_refused():
    left, right = torch.randn(3, 1, 4), torch.randn(3, 1, 5)
    found = RecordGradients(torch.arange(3), [[Product(left, right)]], [20])
    assert torch.isfinite(found.norm_bounds).all()
    right.mul_(100)
    with pytest.raises(PrivacyProtocolError, match="overwritten"):
        found.weighted_sum(torch.ones(3).double())


def clipped_sum(net, values, bound=1.0):
    found = gradients_of(net, squares, (values,))
    return found.weighted_sum(bound / found.norm_bounds.clamp(min=bound))


def largest_move(summed, values):
    """How far the sum moves at most when one of the records leaves."""
    whole = summed(values)
    others = torch.arange(len(values))
    return max((whole - summed(values[others != left])).norm().item() for left in range(len(values)))


@pytest.fixture
def toy():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    return net, 5 * torch.randn(6, 3, dtype=torch.float64)


class TestBrokenTwins:
    """Each would be a release whose stated sensitivity is wrong."""

    def test_the_real_one_stays_within_its_bound(self, toy):
        net, values = toy
        assert 0.5 < largest_move(lambda v: clipped_sum(net, v), values) <= 1.0

    def test_norms_without_the_bias_are_caught(self, toy, monkeypatch):
        net, values = toy

        parameters = list(net.parameters())
        norms = RecordGradients.norm_bounds.fget

        def without_bias(self):
            kept = self._held
            self._held = [None if p.dim() == 1 else part for p, part in zip(parameters, kept, strict=True)]
            found = norms(self)
            self._held = kept
            return found

        monkeypatch.setattr(RecordGradients, "norm_bounds", property(without_bias))
        assert largest_move(lambda v: clipped_sum(net, v), values) > 1.05

    def test_a_weight_on_the_sum_is_caught(self, toy):
        net, values = toy

        def weighted_afterwards(values):
            found = gradients_of(net, squares, (values,))
            weights = 1 / found.norm_bounds.clamp(min=1)
            return weights.mean() * found.weighted_sum(torch.ones_like(weights))

        assert largest_move(weighted_afterwards, values) > 1.05

    def test_clipping_the_sum_is_caught(self):
        """One record against many that say the opposite: without it, the clipped sum turns around."""
        net = nn.Linear(1, 1, bias=False).double()
        values = torch.tensor([[-30.0], [10.0], [10.0]], dtype=torch.float64)

        def clipped_afterwards(values):
            found = gradients_of(net, lambda n, v: n(v).sum(), (values,))
            total = found.weighted_sum(torch.ones(len(values), dtype=torch.float64))
            return total / total.norm().clamp(min=1)

        assert largest_move(clipped_afterwards, values) == pytest.approx(2)


def test_patches_are_what_a_convolution_meets():
    maps = torch.arange(2 * 3 * 5 * 6, dtype=torch.float32).view(2, 3, 5, 6)
    found = patches(maps, torch.Size((2, 3)), (2, 1), (1, 0), torch.Size((3, 4)))
    wanted = F.unfold(maps, (2, 3), stride=(2, 1), padding=(1, 0)).unflatten(1, (3, 2, 3)).unflatten(-1, (3, 4))
    assert torch.equal(found, wanted.permute(0, 4, 5, 2, 3, 1))


def test_what_was_summed_is_let_go():
    """Sums and what they are made of do not stand at the same time; nobody sums what is gone."""
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    found = gradients_of(net, squares, (torch.randn(3, 5),))
    weights = torch.ones(3, dtype=torch.float64)
    wanted, held = found.weighted_sum(weights), [weakref.ref(part) for part in found._parts]
    total = torch.zeros_like(wanted)
    found.add_weighted_sum(weights, total)
    assert torch.equal(total, wanted)
    assert [part() for part in held] == [None] * 4
    for ask in (lambda: found.norm_bounds, lambda: found.add_weighted_sum(weights, total)):
        with pytest.raises(PrivacyProtocolError, match="summed and let go"):
            ask()


@pytest.mark.parametrize("places", [1, 3])
def test_a_wide_product_is_summed_in_blocks(places, monkeypatch):
    left, right = torch.randn(4, places, 10), torch.randn(4, places, 6)
    weights = torch.rand(4, dtype=torch.float64)
    wanted = torch.einsum("n,ntp,ntd->pd", weights, left.double(), right.double()).flatten()
    for entries in (1, 3 * 4 * places, 2**17):  # a column at a time, three, all
        monkeypatch.setattr(parts, "_BLOCK_ENTRIES", entries)
        total = torch.ones(60, dtype=torch.float64)
        Product(left, right).add_weighted_sum(weights, total)
        torch.testing.assert_close(total, 1 + wanted)
        rows = torch.ones(60, dtype=torch.float64)
        Rows(Product(left, right).rows().float()).add_weighted_sum(weights, rows)
        torch.testing.assert_close(rows, 1 + wanted, rtol=1e-5, atol=1e-5)

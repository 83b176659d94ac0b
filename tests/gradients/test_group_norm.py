"""Group normalisation in one pass with its per-record gradients, against automatic differentiation."""

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.gradients.group_norm import GroupNormLayer
from lightning_dp.gradients.record_gradients import overheard_gradients

SHAPES = {
    "maps": (5, 8, 6, 4),
    "one record": (1, 8, 6, 4),
    "one place": (5, 8, 1, 1),
    "rows": (5, 8, 7),
    "none": (5, 8),
}


def normed(maps: Tensor, groups: int, gain: Tensor, offset: Tensor | None) -> Tensor:
    """Written out: the backward pass of `F.group_norm` crashes without an offset and with channels last."""
    grouped = maps.reshape(len(maps), groups, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    values = (centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()).reshape(maps.shape)
    wide = (-1, *[1] * (maps.dim() - 2))
    return values * gain.view(wide) + (0 if offset is None else offset.view(wide))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("batches", [1, 3])
def test_all_gradients_equal_automatic_differentiation(name, last, biased, batches):
    torch.manual_seed(0)
    shape = SHAPES[name]
    maps = 3 + 2 * torch.randn(batches, *shape, dtype=torch.float64)[-1]  # a record's stride may be anything
    if last and maps.dim() == 4:
        maps = maps.contiguous(memory_format=torch.channels_last)
    maps.requires_grad_()
    gain, offset = (torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    used = offset if biased else None
    gradient = torch.randn(shape, dtype=torch.float64)
    layer = GroupNormLayer(gain, used, 4, len(shape) - 1, 1e-5)
    found, leading = layer.run(maps, gain.detach(), None if used is None else used.detach())
    wanted = normed(maps, 4, gain, used)
    assert leading == shape[:1]
    torch.testing.assert_close(found, wanted)
    parts = [part.rows() for _, part in layer.parts(gradient, as_rows=False)]
    for index in range(shape[0]):
        alone = torch.zeros_like(gradient)
        alone[index] = gradient[index]
        trained = (gain, offset) if biased else (gain,)
        for part, one in zip(parts, torch.autograd.grad(wanted, trained, alone, retain_graph=True), strict=True):
            torch.testing.assert_close(part[index], one)
    torch.testing.assert_close(*(torch.autograd.grad(out, maps, gradient)[0] for out in (found, wanted)))


def squares(net: nn.Module, maps: Tensor) -> Tensor:
    return net(maps).square().sum()


def test_a_second_backward_pass_does_not_meet_the_sums_of_the_first():
    layer = GroupNormLayer(torch.ones(4, requires_grad=True), None, 2, 3, 1e-5)
    maps = torch.randn(2, 4, 3, 3, requires_grad=True)
    out, _ = layer.run(maps, torch.ones(4), None)
    first, second = torch.randn(2, *maps.shape).unbind()
    for gradient in (first, second):
        layer.parts(gradient, as_rows=False)
        wanted = torch.autograd.grad(normed(maps, 2, torch.ones(4), None), maps, gradient)[0]
        torch.testing.assert_close(torch.autograd.grad(out, maps, gradient, retain_graph=True)[0], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_than_the_weights_go_the_ordinary_way(dtype, monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4))
    records = (torch.randn(3, 1, 6, 6),)
    seen = []
    monkeypatch.setattr(GroupNormLayer, "run", lambda self, *a, f=GroupNormLayer.run: seen.append(1) or f(self, *a))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = overheard_gradients(net, squares, records, ids=torch.arange(3), as_rows=False)
    assert bool(seen) == (dtype == torch.float32)
    assert torch.isfinite(found.norm_bounds).all()

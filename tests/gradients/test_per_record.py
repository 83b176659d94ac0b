import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_dp.gradients.per_record import per_record_rows, row_segments, trainable_parameters


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )


def cross_entropy(net, image, label):
    return F.cross_entropy(net(image), label)


def batch(num: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(1)
    return torch.randn(num, 1, 8, 8, generator=stream), torch.randint(3, (num,), generator=stream)


def rows_of(net, loss, records, chunk_size=3) -> torch.Tensor:
    return torch.cat([chunk.values[:, 0] for chunk in per_record_rows(net, loss, records, chunk_size=chunk_size)])


def looped(net, loss, records) -> torch.Tensor:
    """The same by single backward passes."""
    rows = []
    for index in range(len(records[0])):
        net.zero_grad(set_to_none=True)
        loss(net, *(tensor[index : index + 1] for tensor in records)).backward()
        rows.append(torch.cat([p.grad.flatten() for p in trainable_parameters(net).values()]))
    net.zero_grad(set_to_none=True)
    return torch.stack(rows)


def test_rows_equal_a_loop_of_single_backward_passes():
    net = network().double()
    images, labels = batch()
    records = (images.double(), labels)
    torch.testing.assert_close(
        rows_of(net, cross_entropy, records), looped(net, cross_entropy, records), rtol=1e-10, atol=1e-12
    )


def test_chunk_size_changes_nothing():
    net, (images, labels) = network().double(), batch()
    records = (images.double(), labels)
    whole = rows_of(net, cross_entropy, records, chunk_size=100)
    for chunk_size in (1, 2, 7):
        torch.testing.assert_close(rows_of(net, cross_entropy, records, chunk_size), whole, rtol=1e-12, atol=1e-14)


def test_the_mean_row_is_the_gradient_of_the_mean_loss():
    net, records = network(), batch()
    F.cross_entropy(net(records[0]), records[1]).backward()
    plain = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(rows_of(net, cross_entropy, records).mean(0), plain)


def test_an_empty_batch_yields_nothing():
    assert list(per_record_rows(network(), cross_entropy, batch(0), chunk_size=3)) == []


def test_frozen_parameters_are_left_out():
    net, records = network(), batch()
    net[0].requires_grad_(False)
    rows = rows_of(net, cross_entropy, records)
    assert rows.shape == (7, sum(p.numel() for p in net[1:].parameters())) == (7, sum(row_segments(net)))
    torch.testing.assert_close(rows, looped(net, cross_entropy, records))


def test_segments_follow_the_order_of_named_parameters():
    net = network()
    assert row_segments(net) == tuple(p.numel() for p in net.parameters())
    assert list(trainable_parameters(net)) == [name for name, _ in net.named_parameters()]


def test_ids_stay_with_their_rows():
    ids = torch.tensor([5, 9, 11, 30, 31, 40, 41])
    chunks = list(per_record_rows(network(), cross_entropy, batch(), chunk_size=3, ids=ids))
    assert [chunk.teacher_ids.tolist() for chunk in chunks] == [[5, 9, 11], [30, 31, 40], [41]]
    assert all(chunk.queries == slice(0, 1) for chunk in chunks)
    assert [tuple(chunk.values.shape) for chunk in chunks] == [(3, 1, 151), (3, 1, 151), (1, 1, 151)]


def test_a_loss_may_use_any_method_of_the_network():
    class TwoParts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 2), nn.Linear(2, 4)

        def encode(self, record):
            return self.first(record)

    def loss(net, record, noise):
        return (net.second(net.encode(record) + noise) - record).square().sum()

    torch.manual_seed(0)
    net, records = TwoParts(), (torch.randn(5, 4), torch.randn(5, 2))
    torch.testing.assert_close(rows_of(net, loss, records), looped(net, loss, records))


def test_no_record_reaches_the_row_of_another():
    net, (images, labels) = network(), batch()
    before = rows_of(net, cross_entropy, (images, labels))
    images[2] += 100
    after = rows_of(net, cross_entropy, (images, labels))
    others = torch.arange(7) != 2
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[2], after[2])


def test_a_coupled_loss_cannot_be_written():
    """The broken twin: a term over pairs. The loss is handed one record, whose only pair is with itself."""

    def with_spread(net, image, label):
        logits = net(image)
        return F.cross_entropy(logits, label) + torch.cdist(logits, logits).sum() + logits.var(0, unbiased=False).sum()

    net, records = network(), batch()
    torch.testing.assert_close(rows_of(net, with_spread, records), rows_of(net, cross_entropy, records))


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.Dropout(0.5)], ids=["batch norm", "dropout"])
def test_layers_that_couple_records_or_draw_are_refused(layer):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(RuntimeError, match=r"(?i)in-?place|random"):
        rows_of(net, cross_entropy, batch())


def test_parameters_and_their_gradients_are_left_alone():
    net = network()
    before = [p.clone() for p in net.parameters()]
    rows_of(net, cross_entropy, batch())
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_bad_calls_are_refused():
    images, labels = batch()
    with pytest.raises(ValueError, match="chunk_size >= 1"):
        rows_of(network(), cross_entropy, (images, labels), chunk_size=0)
    with pytest.raises(ValueError, match="one length"):
        rows_of(network(), cross_entropy, (images, labels[1:]))

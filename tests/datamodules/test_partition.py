"""Each record has exactly one teacher, chosen by position or id alone; the checks catch the official dealing."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from datamodules.partition import TeacherPartition, hash_assignment
from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.teachers import TeacherShards

# Records per class of MNIST's training file.
MNIST_COUNTS = (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
PINNED_PERMUTATION = [3, 2, 0, 0, 2, 1, 1, 3, 3, 2, 0, 1]
PINNED_HASH = [2, 2, 2, 2, 0, 3, 2, 2, 1, 3, 0, 3]

# A dealer maps labels (N,) and pixels (N, d) to shards; ours ignore both. That is what the checks below establish.
Dealer = Callable[[Tensor, Tensor], list[Tensor]]


def shards_of(partition: TeacherPartition) -> list[Tensor]:
    """The positions of the records that each teacher of a run holds."""
    num = partition.num_records
    images, labels = torch.zeros(num, 1, 1, 1, dtype=torch.uint8), torch.zeros(num, dtype=torch.int64)
    held = TeacherShards(images, labels, partition.assignment, partition.num_teachers)
    return list(held.order.split(held.sizes.tolist()))


def sizes_of(partition: TeacherPartition) -> Tensor:
    return torch.bincount(partition.assignment, minlength=partition.num_teachers)


def our_dealer(num_teachers: int, method: str) -> Dealer:
    def deal(labels: Tensor, pixels: Tensor) -> list[Tensor]:
        return shards_of(TeacherPartition(len(labels), num_teachers, method))

    return deal


def class_dealer(num_teachers: int) -> Dealer:
    """The broken twin: one record per class in turn, a class that runs out starts again (teacher_gans.md 1.2)."""

    def deal(labels: Tensor, pixels: Tensor) -> list[Tensor]:
        classes = [torch.nonzero(labels == c).flatten().tolist() for c in labels.unique().tolist()]
        size = len(labels) // num_teachers
        cursor = [0] * len(classes)
        dealt = []
        for position in range(size * num_teachers):
            c = position % len(classes)
            dealt.append(classes[c][cursor[c] % len(classes[c])])
            cursor[c] += 1
        return list(torch.tensor(dealt).split(size))

    return deal


def check_each_record_in_one_shard(shards: list[Tensor], num_records: int) -> None:
    times = torch.bincount(torch.cat(shards), minlength=num_records)
    twice, never = int((times > 1).sum()), int((times == 0).sum())
    assert (twice, never) == (0, 0), f"{twice} records in two shards, {never} in none"


def check_blind_to_content(deal: Dealer, labels: Tensor, pixels: Tensor, seed: int = 0) -> None:
    """The map of records to shards stays when labels and pixels are replaced."""
    generator = torch.Generator().manual_seed(seed)
    other_labels = labels[torch.randperm(len(labels), generator=generator)]
    other_pixels = torch.randint_like(pixels, 256, generator=generator) if pixels.numel() else pixels
    before, after = deal(labels, pixels), deal(other_labels, other_pixels)
    moved = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert moved == 0, f"{moved} shards follow the labels or pixels"


def check_replaced_record_changes_one_shard(deal: Dealer, labels: Tensor, pixels: Tensor, index: int) -> None:
    """Replace one record (label and pixels): exactly one shard's contents differ."""
    new_labels, new_pixels = labels.clone(), pixels.clone()
    new_labels[index] = (labels[index] + 1) % 10
    new_pixels[index] = 255 - pixels[index]
    before = [(labels[s].tolist(), pixels[s].tolist()) for s in deal(labels, pixels)]
    after = [(new_labels[s].tolist(), new_pixels[s].tolist()) for s in deal(new_labels, new_pixels)]
    changed = sum(a != b for a, b in zip(before, after, strict=True))
    assert changed == 1, f"{changed} shards changed"


def records(num: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(10, (num,), generator=generator),
        torch.randint(256, (num, 3), dtype=torch.uint8, generator=generator),
    )


sizes = st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@pytest.mark.parametrize("method", ["permutation", "hash"])
@settings(max_examples=30, deadline=None)
@given(size=sizes, key=st.integers(-(2**70), 2**70))
def test_every_record_is_in_exactly_one_shard(method, size, key):
    num_records, num_teachers = size
    partition = TeacherPartition(num_records, num_teachers, method, key)
    shards = shards_of(partition)
    check_each_record_in_one_shard(shards, num_records)
    assert partition.assignment.dtype == torch.int64
    assert len(shards) == num_teachers
    for teacher, shard in enumerate(shards):
        assert (partition.assignment[shard] == teacher).all()
        assert torch.equal(shard, shard.sort().values)


@settings(max_examples=30, deadline=None)
@given(size=sizes, key=st.integers())
def test_permutation_is_balanced_to_one(size, key):
    shard_sizes = sizes_of(TeacherPartition(*size, key=key))
    assert int(shard_sizes.max() - shard_sizes.min()) <= 1


@pytest.mark.parametrize("method", ["permutation", "hash"])
def test_map_ignores_pixels_and_labels(method):
    check_blind_to_content(our_dealer(40, method), *records(600))


@pytest.mark.parametrize("method", ["permutation", "hash"])
@pytest.mark.parametrize("index", [0, 17, 599])
def test_one_replaced_record_changes_exactly_one_shard(method, index):
    check_replaced_record_changes_one_shard(our_dealer(40, method), *records(600), index)


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.integers(), min_size=1, max_size=100, unique=True), data=st.data(), teachers=st.integers(1, 20))
def test_removing_a_record_leaves_the_others_in_place_under_hash(ids, data, teachers):
    gone = data.draw(st.integers(0, len(ids) - 1))
    before = hash_assignment(ids, teachers).tolist()
    after = hash_assignment(ids[:gone] + ids[gone + 1 :], teachers).tolist()
    assert before[:gone] + before[gone + 1 :] == after


def test_hash_partition_does_not_depend_on_the_number_of_records():
    small, large = (TeacherPartition(n, 50, "hash", key=3).assignment for n in (500, 501))
    assert torch.equal(small, large[:500])


def test_permutation_moves_many_records_when_one_is_added():
    # Why the docstring says "not for add/remove-one".
    small, large = (TeacherPartition(n, 50).assignment for n in (500, 501))
    assert int((small != large[:500]).sum()) > 10


@pytest.mark.parametrize("method", ["permutation", "hash"])
def test_keys_give_different_public_maps_and_repeat(method):
    first, again, other = (TeacherPartition(200, 10, method, key=key).assignment for key in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_maps_are_pinned():
    # A changed map would silently change what a resumed run's teachers hold.
    assert TeacherPartition(12, 4).assignment.tolist() == PINNED_PERMUTATION
    assert TeacherPartition(12, 4, "hash", key=7).assignment.tolist() == PINNED_HASH


def test_hash_is_roughly_even():
    shard_sizes = sizes_of(TeacherPartition(20000, 10, "hash")).float()
    assert (shard_sizes - 2000).abs().max() < 5 * 2000**0.5


def test_official_dealing_is_caught_by_the_same_checks():
    labels = torch.repeat_interleave(torch.arange(10), torch.tensor(MNIST_COUNTS))
    deal = class_dealer(4000)
    with pytest.raises(AssertionError, match="1138 records in two shards, 1138 in none"):
        check_each_record_in_one_shard(deal(labels, labels), len(labels))
    few_labels, pixels = records(600)
    with pytest.raises(AssertionError, match="shards follow the labels"):
        check_blind_to_content(class_dealer(40), few_labels, pixels)
    with pytest.raises(AssertionError, match=r"\d\d shards changed"):
        check_replaced_record_changes_one_shard(class_dealer(40), few_labels, pixels, 0)


@pytest.mark.parametrize("method", ["permutation", "hash"])
def test_mnist_at_the_paper_scale_holds_every_record_once(method):
    partition = TeacherPartition(60000, 4000, method)
    check_each_record_in_one_shard(shards_of(partition), 60000)
    if method == "permutation":
        assert sizes_of(partition).unique().tolist() == [15]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 11), "num_teachers <= num_records=10, got num_teachers=11"),
        ((0, 1), "at least one record"),
        ((10, 0), "at least one record and one teacher"),
        ((10, 2, "labels"), "got method='labels'"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        TeacherPartition(*arguments)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dp.errors import DataError
from lightning_dp.gradients.teachers import TeacherShards


def make_shards(assignment, num_teachers):
    assignment = torch.as_tensor(assignment)
    num = assignment.shape[0]
    return TeacherShards(
        torch.zeros(num, 1, 4, 4, dtype=torch.uint8), torch.zeros(num).long(), assignment, num_teachers
    )


@settings(max_examples=50, deadline=None)
@given(
    assignment=st.lists(st.integers(0, 4), min_size=1, max_size=40), batch=st.integers(1, 9), step=st.integers(0, 1000)
)
def test_every_position_belongs_to_its_teacher(assignment, batch, step):
    shards = make_shards(assignment, 5)
    positions = shards.positions(slice(0, 5), batch, step)
    assert positions.shape == (5, batch)
    for teacher in range(5):
        if shards.sizes[teacher]:
            assert set(shards.assignment[positions[teacher]].tolist()) == {teacher}


@settings(max_examples=50, deadline=None)
@given(assignment=st.lists(st.integers(0, 3), min_size=1, max_size=40), batch=st.integers(1, 9))
def test_the_rounds_visit_every_record_of_a_shard_equally_often(assignment, batch):
    shards = make_shards(assignment, 4)
    for teacher in range(4):
        size = int(shards.sizes[teacher])
        if size:
            visits = torch.cat([shards.positions(slice(teacher, teacher + 1), batch, s)[0] for s in range(size)])
            counts = torch.bincount(visits, minlength=len(assignment))[shards.assignment == teacher]
            assert (counts == batch).all()


def test_another_shard_size_moves_nobody_else():
    small, large = make_shards([0, 1, 2, 0, 1, 2, 0], 3), make_shards([0, 1, 2, 0, 1, 2, 1], 3)
    assert small.common_batch(30) == large.common_batch(30) == 2
    assert small.sizes.tolist() == [3, 2, 2]
    for step in range(5):
        assert torch.equal(small.positions(slice(2, 3), 2, step), large.positions(slice(2, 3), 2, step))


def test_chunks_of_teachers_see_the_same_positions():
    shards = make_shards(torch.arange(23) % 5, 5)
    whole = shards.positions(slice(0, 5), 4, 7)
    parts = [shards.positions(slice(start, min(start + 2, 5)), 4, 7) for start in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_single_record_per_teacher_is_recognised():
    assert make_shards([2, 0, 1], 4).is_single_record
    assert not make_shards([2, 2, 1], 4).is_single_record


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(3, 1, 4, 4)}, r"uint8.*dtype=torch.float32"),
        ({"labels": torch.zeros(2).long()}, r"labels, shape \(3,\), got shape=\(2,\)"),
        ({"assignment": torch.tensor([0, 1, 2])}, r"teachers in \[0, 2\), got assignment from 0 to 2"),
        ({"assignment": torch.tensor([0.0, 1.0, 0.0])}, r"whole number.*assignment"),
    ],
)
def test_records_that_do_not_fit_are_refused(changes, message):
    arguments = {
        "images": torch.zeros(3, 1, 4, 4, dtype=torch.uint8),
        "labels": torch.zeros(3).long(),
        "assignment": torch.tensor([0, 1, 0]),
        "num_teachers": 2,
    }
    with pytest.raises(DataError, match=message):
        TeacherShards(**(arguments | changes))

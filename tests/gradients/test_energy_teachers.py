import pytest
import torch

from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.energy_teachers import DirectionChunk, EnergyTeachers, PublicShapes
from lightning_dp.gradients.teachers import RowChunk, TeacherShards
from lightning_dp.losses.energy import unit_directions
from lightning_dp.mechanisms.topagg import public_rotation


def shards(num=12, teachers=3, num_classes=2):
    stream = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num, 1, 2, 2), generator=stream, dtype=torch.uint8)
    labels = torch.randint(0, num_classes, (num,), generator=stream)
    return TeacherShards(images, labels, torch.arange(num) % teachers, teachers)


def bound(data, chunk_size=512, num_teachers=3):
    ensemble = EnergyTeachers(num_teachers=num_teachers, chunk_size=chunk_size)
    ensemble.bind(data, num_classes=2, image_shape=(1, 2, 2), device="cpu", seed=0)
    return ensemble


def rows_by_teacher(ensemble, fakes, labels):
    rows = {}
    for chunk in ensemble.row_chunks(fakes, labels):
        for teacher, values in zip(chunk.teacher_ids.tolist(), chunk.values, strict=True):
            key = (teacher, chunk.queries.start)
            assert key not in rows, "a teacher spoke twice about the same images"
            rows[key] = values
    return rows


FAKES = torch.randn(4, 1, 2, 2)
LABELS = torch.tensor([0, 0, 1, 1])


def test_a_row_is_the_mean_unit_vector_to_the_teachers_records_of_the_label():
    data = shards()
    rows = rows_by_teacher(bound(data), FAKES, LABELS)
    for (teacher, start), values in rows.items():
        label = LABELS[start]
        mine = (data.assignment == teacher) & (data.labels == label)
        records = data.images[mine].float().flatten(1) / 255
        points = FAKES[start : start + 2].flatten(1)
        expected = torch.stack([((records - p) / (records - p).norm(dim=1, keepdim=True)).mean(0) for p in points])
        torch.testing.assert_close(values, expected)
        assert (values.norm(dim=-1) <= 1 + 1e-6).all()


def test_a_teacher_without_records_of_a_label_abstains():
    data = shards()
    data.labels[data.assignment == 1] = 0
    speakers = {teacher for teacher, start in rows_by_teacher(bound(data), FAKES, LABELS) if start == 2}
    assert 1 not in speakers


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_chunks_never_split_a_teacher_and_change_nothing(chunk_size):
    data = shards(num=20)
    whole, parts = (rows_by_teacher(bound(data, size), FAKES, LABELS) for size in (512, chunk_size))
    assert whole.keys() == parts.keys()
    for key, values in whole.items():
        torch.testing.assert_close(values, parts[key])


@pytest.mark.parametrize("changes_label", [False, True])
def test_isolation_a_changed_record_moves_only_its_own_teacher(changes_label):
    data = shards()
    before = rows_by_teacher(bound(data), FAKES, LABELS)
    data.images[4] = 255 - data.images[4]
    if changes_label:
        data.labels[4] = 1 - data.labels[4]
    after = rows_by_teacher(bound(data), FAKES, LABELS)
    owner = int(data.assignment[4])
    changed = {
        key
        for key in before.keys() | after.keys()
        if key not in before or key not in after or not torch.equal(before[key], after[key])
    }
    assert changed
    assert {teacher for teacher, _ in changed} == {owner}
    assert len(changed) == (2 if changes_label else 1)


def test_a_mean_over_all_teachers_would_be_caught():
    """The broken twin: rows centred by the mean row of all teachers move for everyone."""

    class Centred(EnergyTeachers):
        def row_chunks(self, fakes, labels):
            for chunk in super().row_chunks(fakes, labels):
                centred = chunk.values - chunk.values.mean(0, keepdim=True)
                yield RowChunk(chunk.teacher_ids, centred, chunk.queries)

    def rows(data):
        ensemble = Centred(num_teachers=3)
        ensemble.bind(data, num_classes=2, image_shape=(1, 2, 2), device="cpu", seed=0)
        return rows_by_teacher(ensemble, FAKES, LABELS)

    data = shards()
    before = rows(data)
    data.images[4] = 255 - data.images[4]
    after = rows(data)
    moved = {teacher for (teacher, start) in before if not torch.equal(before[teacher, start], after[teacher, start])}
    assert len(moved) > 1


def test_single_record_teachers_need_one_record_each():
    with pytest.raises(ConfigurationError, match="one record per teacher"):
        bound(shards(), num_teachers=None)
    ensemble = bound(shards(teachers=12), num_teachers=None)
    assert ensemble.row_structure(4).single_record


def test_labels_out_of_order_are_refused():
    with pytest.raises(ConfigurationError, match="sorted"):
        list(bound(shards()).row_chunks(FAKES, torch.tensor([0, 1, 0, 1])))


def test_a_fake_on_top_of_a_record_gets_no_direction_and_no_nan():
    directions = unit_directions(torch.zeros(1, 3), torch.zeros(2, 3))
    assert torch.equal(directions, torch.zeros(1, 2, 3))


@pytest.mark.parametrize("options", [{"num_teachers": 0}, {"chunk_size": 0}])
def test_bad_numbers_are_refused(options):
    with pytest.raises(ConfigurationError, match=">= 1"):
        EnergyTeachers(**options)


def votes_of_others(teachers, data, basis, fakes, labels):
    """Sign votes of every record but the first, by record, bit for bit."""
    teachers.bind(data, num_classes=2, image_shape=(1, 8, 8), device="cpu", seed=0)
    votes = {}
    for chunk in teachers.row_chunks(fakes, labels):
        for owner, row in zip(chunk.teacher_ids.tolist(), chunk.in_basis(basis), strict=True):
            votes[owner] = row
    return {owner: row for owner, row in votes.items() if owner != 0}


def others_moved_by_a_new_label(make, mine, num_threads=1):
    """Whether a record that changes its label moves a bit of another's row; a fake equal to a record shows it best."""
    num = mine + 30
    image = torch.randint(0, 256, (1, 1, 8, 8), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    images = image.expand(num, 1, 8, 8).contiguous()
    data = TeacherShards(images, (torch.arange(num) >= mine).long(), torch.arange(num), num)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    fakes = (image.float() / 255).flatten(1).expand(6, 64)
    basis = public_rotation(64, 0, 1)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        before = votes_of_others(make(), data, basis, fakes, labels)
        data.labels[0] = 1
        after = votes_of_others(make(), data, basis, fakes, labels)
    finally:
        torch.set_num_threads(threads_before)
    assert before.keys() == after.keys()
    return any(not torch.equal(row, after[owner]) for owner, row in before.items())


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("mine", [*range(1, 13), 511, 512, 513])
def test_a_record_that_changes_its_label_moves_no_bit_of_another(mine, num_threads):
    assert not others_moved_by_a_new_label(EnergyTeachers, mine, num_threads)


def test_products_as_tall_as_a_class_would_be_caught():
    """The broken twin rotates what it has selected; the height of the product then follows the labels."""

    class Late(EnergyTeachers):
        def row_chunks(self, fakes, labels):
            for chunk in super().row_chunks(fakes, labels):
                targets, points = chunk._shapes.within(None)
                late = PublicShapes(targets[chunk._selected], points)
                everything = torch.arange(len(chunk._selected))
                yield DirectionChunk(chunk.teacher_ids, chunk.queries, shapes=late, selected=everything, is_mean=False)

    if not any(others_moved_by_a_new_label(Late, mine) for mine in range(1, 13)):
        pytest.skip("on this machine a matrix product rounds its rows alike at every height")

"""One record reaches one teacher: the premise of every sensitivity of a teacher ensemble."""

import pytest
import torch

from lightning_dp.gradients.discriminator_teachers import DiscriminatorTeachers
from lightning_dp.gradients.teachers import TeacherShards
from lightning_dp.networks.datalens import DataLensGenerator

SHAPE, CLASSES, TEACHERS, BATCH, VICTIM = (1, 8, 8), 3, 5, 4, 2
ALL = [(network, backend) for network in ("datalens", "small_conv", "mlp") for backend in ("loop", "stacked")]


class SharedAdam(DiscriminatorTeachers):
    """Broken twin: every chunk uses the Adam slots of the first, as the published program does (flaw F1)."""

    def bind(self, *args, **options):
        super().bind(*args, **options)
        own = self._stacks.moments
        self._stacks.moments = lambda teachers: own(slice(0, teachers.stop - teachers.start))


class PrivateLabels(DiscriminatorTeachers):
    """Broken twin: the generator, with batch statistics, sees the private labels of all teachers in one batch."""

    def train(self, make_fakes, *, step):
        self._make_private = lambda: (
            make_fakes(self._shards.labels[self._shards.positions(slice(0, TEACHERS), BATCH, step)].flatten())
            .detach()
            .unflatten(0, (TEACHERS, BATCH))
        )
        super().train(make_fakes, step=step)

    def _round_batch(self, teachers, fakes, step):
        samples, one_hot = super()._round_batch(teachers, fakes, step)
        samples[:, one_hot.shape[1] :] = self._make_private()[teachers]
        return samples, one_hot


class CachedWeights(DiscriminatorTeachers):
    """Broken twin: autocast keeps the rounded weights of a chunk's first teacher, and the loop uses them for all."""

    def _computing(self):
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self.compute == "bfloat16")


def make_shards(kind):
    source = torch.Generator().manual_seed(1)
    num = TEACHERS * BATCH
    images = torch.randint(0, 256, (num, *SHAPE), generator=source, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (num,), generator=source)
    assignment = torch.arange(num) % TEACHERS
    record = VICTIM + TEACHERS
    if kind == "replaced":
        images[record] = 255 - images[record]
        labels[record] = (labels[record] + 1) % CLASSES
    if kind == "removed":
        keep = torch.arange(num) != record
        images, labels, assignment = images[keep], labels[keep], assignment[keep]
    return TeacherShards(images, labels, assignment, TEACHERS)


def three_rounds(ensemble, kind, network, backend, **settings):
    """Run three rounds against a generator that moves by a fixed transcript of aggregates."""
    settings = {"chunk_size": 2, "batch_size": BATCH, **settings}
    teachers = ensemble(network, num_teachers=TEACHERS, backend=backend, **settings)
    teachers.bind(make_shards(kind), num_classes=CLASSES, image_shape=SHAPE, device="cpu", seed=7)
    torch.manual_seed(0)
    generator = DataLensGenerator(SHAPE, CLASSES, latent_dim=4)
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-2)
    transcript = torch.Generator().manual_seed(5)
    for step in range(3):
        noise = 2 * torch.rand(100, 4, generator=transcript) - 1
        teachers.train(lambda labels, noise=noise: generator(noise[: len(labels)], labels), step=step)
        labels = torch.randint(0, CLASSES, (6,), generator=transcript)
        images = generator(noise[:6], labels)
        rows = torch.cat([chunk.values for chunk in teachers.row_chunks(images.detach(), labels)])
        optimizer.zero_grad()
        images.backward(gradient=-2 * torch.randn(images.shape, generator=transcript).sign())
        optimizer.step()
    state = teachers.state_dict()
    stacks = [stack for kind in ("parameters", "exp_avg", "exp_avg_sq") for stack in state[kind].values()]
    return [*stacks, rows]


def changed_teachers(ensemble, kind, network, backend, **settings):
    before = three_rounds(ensemble, "original", network, backend, **settings)
    after = three_rounds(ensemble, kind, network, backend, **settings)
    return {
        t for old, new in zip(before, after, strict=True) for t in range(TEACHERS) if not torch.equal(old[t], new[t])
    }


@pytest.mark.parametrize(("network", "backend"), ALL)
def test_replacing_a_record_changes_its_own_teacher_only(network, backend):
    assert changed_teachers(DiscriminatorTeachers, "replaced", network, backend) == {VICTIM}


@pytest.mark.parametrize(("network", "backend"), ALL)
def test_removing_a_record_changes_its_own_teacher_only(network, backend):
    # The batch stays below N // T of both, as the number of records is public.
    assert changed_teachers(DiscriminatorTeachers, "removed", network, backend, batch_size=BATCH - 1) == {VICTIM}


@pytest.mark.parametrize(("network", "backend"), ALL)
def test_in_bfloat16_a_record_changes_its_own_teacher_only(network, backend):
    found = changed_teachers(DiscriminatorTeachers, "replaced", network, backend, compute="bfloat16")
    assert found == {VICTIM}


@pytest.mark.parametrize("network", ["datalens", "small_conv", "mlp"])
def test_the_check_catches_weights_that_autocast_keeps(network):
    """The victim comes first in its chunk, (2, 3)."""
    found = changed_teachers(CachedWeights, "replaced", network, "loop", compute="bfloat16")
    assert found == {VICTIM, VICTIM + 1}


@pytest.mark.parametrize(("network", "backend"), ALL)
def test_the_check_catches_shared_adam_state(network, backend):
    assert changed_teachers(SharedAdam, "replaced", network, backend) > {VICTIM}


@pytest.mark.parametrize("backend", ["loop", "stacked"])
def test_the_check_catches_a_generator_that_sees_private_labels(backend):
    assert changed_teachers(PrivateLabels, "replaced", "small_conv", backend) > {VICTIM}


@pytest.mark.parametrize(("network", "backend"), ALL)
def test_a_broken_teacher_spoils_no_other(network, backend):
    def run(is_broken):
        teachers = DiscriminatorTeachers(
            network, num_teachers=TEACHERS, backend=backend, batch_size=BATCH, chunk_size=5
        )
        teachers.bind(make_shards("original"), num_classes=CLASSES, image_shape=SHAPE, device="cpu", seed=7)
        if is_broken:
            for stack in teachers.state_dict()["parameters"].values():
                stack[VICTIM] = float("nan")
        fakes = torch.rand(BATCH * CLASSES, *SHAPE, generator=torch.Generator().manual_seed(0))
        teachers.train(lambda labels: fakes, step=0)
        rows = [chunk.values for chunk in teachers.row_chunks(fakes[:6], torch.arange(6) % CLASSES)]
        return [*teachers.state_dict()["parameters"].values(), torch.cat(rows)]

    sound, broken = run(False), run(True)
    others = [t for t in range(TEACHERS) if t != VICTIM]
    assert all(torch.equal(old[others], new[others]) for old, new in zip(sound, broken, strict=True))
    assert broken[-1][VICTIM].isnan().all()


@pytest.mark.parametrize("backend", ["loop", "stacked"])
def test_a_teacher_without_records_abstains(backend):
    shards = make_shards("original")
    gap = TeacherShards(shards.images, shards.labels, shards.assignment % 4, TEACHERS)
    teachers = DiscriminatorTeachers("mlp", num_teachers=TEACHERS, backend=backend, batch_size=BATCH, chunk_size=2)
    teachers.bind(gap, num_classes=CLASSES, image_shape=SHAPE, device="cpu", seed=7)
    fakes = torch.rand(BATCH * CLASSES, *SHAPE)
    teachers.train(lambda labels: fakes, step=0)
    rows = torch.cat([chunk.values for chunk in teachers.row_chunks(fakes[:6], torch.arange(6) % CLASSES)])
    assert not rows[4].any()
    assert rows[:4].flatten(1).any(1).all()

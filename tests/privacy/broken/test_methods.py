"""Methods in which a record reaches further than the claim says, found by training them in two neighbouring worlds."""

from dataclasses import replace

import pytest
import torch

from lightning_dp.accounting.settings import PrivacySettings
from lightning_dp.auditing.method import MethodRun, audit_method
from lightning_dp.auditing.result import AuditResult, Verdict
from lightning_dp.errors import PrivacyProtocolError
from lightning_dp.gradients.discriminator_teachers import DiscriminatorTeachers
from lightning_dp.gradients.teachers import RowChunk, TeacherShards
from lightning_dp.mechanisms.adaptive import AdaptiveGaussian
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.topagg import TopAgg
from lightning_dp.mechanisms.von_mises_fisher import VonMisesFisher
from lightning_dp.modules.dpsgd import DPSGDClassifier
from lightning_dp.modules.moments import MomentsModule
from lightning_dp.modules.teacher_gan import TeacherEnsembleGAN
from lightning_dp.modules.vae import DPVAE
from lightning_dp.networks.class_gaussian import ClassGaussianGenerator
from tests.conftest import TinyData, tiny_generator
from tests.modules.test_dpsgd import TinyClassifier
from tests.modules.test_vae import tiny_vae

RECORD = 39  # the last of `TinyData`, which the audit changes


def audit(kind, relation, mechanism=Gaussian, warm_start=None, **options) -> AuditResult:
    noise = {"noise_multiplier": 8.0} if warm_start is None else {"target_epsilon": 5.0}

    def make() -> MethodRun:
        torch.manual_seed(0)
        return MethodRun(
            module=kind(),
            data=TinyData(),
            mechanism=mechanism(),
            privacy=PrivacySettings(neighboring_relation=relation, **noise),
            warm_start=None if warm_start is None else warm_start(samples=40, steps=3, num_coefficients=10),
        )

    return audit_method(make, **options)


# Teachers -------------------------------------------------------------------------------------------------------------


def gan(gan_class=TeacherEnsembleGAN, teachers_class=DiscriminatorTeachers, **options):
    def make():
        teachers = teachers_class(
            "mlp", num_teachers=4, batch_size=5, train_steps=1, pretrain_steps=2, chunk_size=1, backend="loop"
        )
        return gan_class(tiny_generator(), teachers, images_per_step=6, public_seed=0, **options)

    return make


class SharedAdam(DiscriminatorTeachers):
    """All teachers use the Adam slots of the first, as the published program does (flaw F1)."""

    def bind(self, *args, **options):
        super().bind(*args, **options)
        own = self._stacks.moments
        self._stacks.moments = lambda teachers: own(slice(0, teachers.stop - teachers.start))


class ShowsAMeanOfAll(DiscriminatorTeachers):
    """Every teacher subtracts the mean image of all records, fitted without privacy."""

    def _round_batch(self, teachers, fakes, step):
        samples, one_hot = super()._round_batch(teachers, fakes, step)
        samples[:, : one_hot.shape[1]] -= self._shards.images.float().mean(0) / 255
        return samples, one_hot


class SharedBatchNorm(DiscriminatorTeachers):
    """What teachers say is normalised over all of them."""

    def row_chunks(self, fakes, labels, judges=None):
        chunks = list(super().row_chunks(fakes, labels, judges))
        mean = torch.cat([chunk.values for chunk in chunks]).mean(0)
        for chunk in chunks:
            yield RowChunk(chunk.teacher_ids, chunk.values - mean, chunk.queries)


class OneBestTeacher(DiscriminatorTeachers):
    """The learning rate of all follows the worst teacher: a quantity over all of them, without noise."""

    def train(self, make_fakes, *, step):
        self.learning_rate = 1e-3 * (1 + float(self._shards.images.float().std() % 1))
        super().train(make_fakes, step=step)


class DuplicatedRecord(TeacherEnsembleGAN):
    """Shards wrap around, so that the last record sits with two teachers (flaw F2)."""

    def setup(self, stage):
        splits = self.trainer.datamodule.splits
        images = splits.train_images.clone()
        images[0] = images[RECORD]
        self.trainer.datamodule._splits = replace(splits, train_images=images)
        super().setup(stage)


class DealtByContent(TeacherEnsembleGAN):
    """Records are sorted by how bright they are before they are dealt to teachers."""

    def setup(self, stage):
        super().setup(stage)
        data = self.trainer.datamodule
        order = data.train_images.flatten(1).float().mean(1).argsort()
        assignment = torch.empty(40, dtype=torch.int64)
        assignment[order] = torch.arange(40) // 10
        shards = TeacherShards(data.train_images, data.train_labels, assignment, 4)
        self.teachers.bind(shards, num_classes=2, image_shape=(1, 8, 8), device="cpu", seed=0)


class LogsWithoutNoise(TeacherEnsembleGAN):
    """A raw number under a name that promises to be public."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.log("public/brightness", self.trainer.datamodule.train_images.float().mean())


class WritesPastTheDoor(TeacherEnsembleGAN):
    """The average that is published learns from records directly, where no optimizer is watched."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        for parameter in self.average.network.parameters():
            parameter.data.add_(1e-6 * self.trainer.datamodule.train_images.float().mean())


@pytest.mark.parametrize(
    "kind", [SharedAdam, ShowsAMeanOfAll, SharedBatchNorm, OneBestTeacher], ids=lambda k: k.__name__
)
def test_teachers_that_know_each_other_are_found(kind):
    found = audit(gan(teachers_class=kind), "replace_one")
    assert found.verdict is Verdict.VIOLATED
    assert found.measured["changed_rows"] > 1


@pytest.mark.parametrize("kind", [DuplicatedRecord, DealtByContent], ids=lambda kind: kind.__name__)
def test_a_record_with_two_teachers_is_found(kind):
    found = audit(gan(kind), "replace_one")
    assert found.verdict is Verdict.VIOLATED
    assert found.measured["changed_rows"] > 1


def test_a_raw_number_among_the_logs_is_found():
    found = audit(gan(LogsWithoutNoise), "replace_one")
    assert found.verdict is Verdict.VIOLATED
    assert "public/brightness" in found.summary


def test_what_is_written_past_the_door_is_found(monkeypatch):
    with pytest.raises(PrivacyProtocolError, match="changed outside a step"):
        audit(gan(WritesPastTheDoor, ema_decay=0.5), "replace_one")
    monkeypatch.setattr(WritesPastTheDoor, "check_published", lambda self: None)  # the guard asleep
    found = audit(gan(WritesPastTheDoor, ema_decay=0.5), "replace_one")
    assert found.verdict is Verdict.VIOLATED
    assert found.measured["changed_rows"] == 1  # the rows are right, what leaves is not


@pytest.mark.parametrize("mechanism", [Gaussian, lambda: TopAgg(top_k=4)], ids=["Gaussian", "TopAgg"])
@pytest.mark.parametrize("options", [{}, {"expected_judges": 2}], ids=["all judge", "some judge"])
def test_right_teachers_are_not(mechanism, options):
    found = audit(gan(**options), "replace_one", mechanism)
    assert found.verdict is Verdict.CONSISTENT, found.summary
    assert found.measured["changed_rows"] == 1


# Records --------------------------------------------------------------------------------------------------------------


def dpsgd(kind=DPSGDClassifier):
    return lambda: kind(TinyClassifier(), expected_batch_size=10, learning_rate=0.5, chunk_size=None)


class SubtractsTheBatchMean(DPSGDClassifier):
    """Every record is seen relative to the others that were drawn (batch normalisation of the input)."""

    def record_batch(self, ids):
        images, *rest = super().record_batch(ids)
        return (images - images.mean(0), *rest)


class ViewsAreRowsOfTheirOwn(DPSGDClassifier):
    """Two views of a record are clipped one by one and charged as one."""

    def record_rows(self, records):
        yield from super().record_rows(records)
        yield from super().record_rows(records)


class LogsTheBatchSize(DPSGDClassifier):
    def draw_records(self):
        return self._log(super().draw_records())

    def _log(self, drawn):
        return drawn

    def record_rows(self, records):
        self.log("public/batch_size", float(len(records)))
        yield from super().record_rows(records)


class MapsWithRecords(DPSGDClassifier):
    """The guard takes the function of `Released.map` at its word; this one has records in its hands."""

    def release(self, chunks, shape):
        brightness = self.trainer.datamodule.train_images.float().mean()
        return super().release(chunks, shape).map(lambda value: value * (1 + 1e-4 * brightness))


class LooksAtRecordsOnTheWay(TeacherEnsembleGAN):
    """And so what is back-propagated: the slope of the generator's images depends on records."""

    def backward_released(self, outputs, released):
        brightness = self.trainer.datamodule.train_images.float().mean()
        super().backward_released(outputs * (1 + 1e-4 * brightness), released)


class StepsAsRecordsSay(DPSGDClassifier):
    """The length of a step is private, and no gradient shows it."""

    def step_optimizer(self):
        brightness = float(self.trainer.datamodule.train_images.float().mean())
        for group in self.optimizers().param_groups:
            group["lr"] = 0.5 + 1e-4 * brightness
        super().step_optimizer()


class FollowsRawNorms(AdaptiveGaussian):
    """The clipping norm follows the norms of the records without noise."""

    def encode(self, rows, spec, context):
        encoded = super().encode(rows, spec, context)
        if len(rows):
            self._norm = float(rows.norm(dim=-1).median())
        return encoded

    def row_scaling(self, norms, spec):
        scaling = super().row_scaling(norms, spec)
        if len(norms):
            self._norm = float(norms.median())
        return scaling


class ViewsByPosition(DPSGDClassifier):
    """Views are drawn by a public seed and the position of a record, so those behind one that leaves get others."""

    def record_seed(self, purpose):
        return self.step_seed(purpose)


class LatentsByPosition(DPVAE):
    """The same of latent draws."""

    def record_seed(self, purpose):
        return self.step_seed(purpose)


class WeighsByPosition(MomentsModule):
    """Every other record of the file is left out of the sums."""

    def private_images(self):
        images = super().private_images().clone()
        images[::2] = 0
        return images


def with_views(kind=DPSGDClassifier):
    return lambda: kind(
        TinyClassifier(), expected_batch_size=10, learning_rate=0.5, views_per_record=2, max_shift=2, flip=True
    )


def vae(kind=DPVAE):
    def make():
        module = tiny_vae()
        module.__class__ = kind
        return module

    return make


def moments(kind=MomentsModule, **options):
    def make():
        generator = ClassGaussianGenerator((1, 8, 8), num_classes=2, num_coefficients=6, **options)
        return kind(generator, clip=2.0, centre=1.0)

    return make


class SlantsByTheMean(MomentsModule):
    """Images are made upright by what their slants differ from the mean slant of all."""

    def private_images(self):
        images = super().private_images()
        basis = self.generator.basis
        mean = int(basis.slants_in_steps(images.double()).sum())
        basis.slants_in_steps = lambda pixels: (type(basis).slants_in_steps(basis, pixels) - mean).clamp(-16, 16)
        return images


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
def test_a_slant_that_is_told_by_others_is_found(relation):
    assert audit(moments(slant=2.0), relation).verdict is Verdict.CONSISTENT
    found = audit(moments(SlantsByTheMean, slant=2.0), relation)
    assert found.verdict is Verdict.VIOLATED
    assert found.measured["changed_rows"] > 10


@pytest.mark.parametrize(
    ("make", "right", "wrong"),
    [
        (with_views, DPSGDClassifier, ViewsByPosition),
        (vae, DPVAE, LatentsByPosition),
        (moments, MomentsModule, WeighsByPosition),
    ],
    ids=["views", "latents", "sums"],
)
def test_what_a_position_decides_is_found_where_records_move_up(make, right, wrong):
    """A removal at the end of the file moves nobody, and finds none of these."""
    assert audit(make(right), "add_or_remove_one").verdict is Verdict.CONSISTENT
    found = audit(make(wrong), "add_or_remove_one")
    assert found.verdict is Verdict.VIOLATED
    assert "the first record gone" in found.summary
    assert found.measured["changed_rows"] > 10


@pytest.mark.parametrize(
    "mechanism", [lambda: TopAgg(top_k=4, votes="stochastic"), VonMisesFisher], ids=["coins", "directions"]
)
def test_secret_draws_of_a_mechanism_move_along(mechanism):
    found = audit(dpsgd(), "add_or_remove_one", mechanism)
    assert found.verdict is Verdict.CONSISTENT, found.summary


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (SubtractsTheBatchMean, "rows changed"),
        (LogsTheBatchSize, "public/batch_size"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_records_that_reach_further_are_found(kind, what):
    found = audit(dpsgd(kind), "add_or_remove_one")
    assert found.verdict is Verdict.VIOLATED
    assert what in found.summary


@pytest.mark.parametrize(
    ("make", "relation"),
    [
        (dpsgd(MapsWithRecords), "add_or_remove_one"),
        (gan(LooksAtRecordsOnTheWay), "replace_one"),
        (dpsgd(StepsAsRecordsSay), "add_or_remove_one"),
    ],
    ids=["map", "outputs", "learning rate"],
)
def test_what_the_door_takes_at_its_word_is_found(make, relation):
    """None of the three meets the guard; both worlds are handed the same released values, and end elsewhere."""
    found = audit(make, relation)
    assert found.verdict is Verdict.VIOLATED
    assert "differ" in found.summary


def test_a_record_with_two_rows_is_refused_by_the_door():
    with pytest.raises(PrivacyProtocolError, match="two rows"):
        audit(dpsgd(ViewsAreRowsOfTheirOwn), "add_or_remove_one")


def test_a_bound_that_follows_raw_norms_is_found():
    assert audit(dpsgd(), "add_or_remove_one", FollowsRawNorms).verdict is Verdict.VIOLATED


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one", "replace_special"])
@pytest.mark.parametrize("mechanism", [Gaussian, AdaptiveGaussian], ids=lambda kind: kind.__name__)
def test_right_records_are_not(relation, mechanism):
    found = audit(dpsgd(), relation, mechanism)
    assert found.verdict is Verdict.CONSISTENT, found.summary
    assert found.measured["changed_rows"] == 1


# Warm starts ----------------------------------------------------------------------------------------------------------


"""The last record is drawn in one of the two releases, and most records beside it."""

"""What the door refuses because it would be charged too little, whichever method hands it in."""

import dataclasses

import pytest
import pytorch_lightning as pl
import torch
from dp_accounting import NeighboringRelation

from callbacks import PrivateCheckpoint, RunFolder
from lightning_dp.accounting.claim import ClaimLevel
from lightning_dp.accounting.events import Sampling
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import ConfigurationError, PrivacyProtocolError
from lightning_dp.gradients.ranks import ALONE, Ranks
from lightning_dp.gradients.record_gradients import SummableRows
from lightning_dp.gradients.teachers import RowChunk
from lightning_dp.mechanisms.adaptive import AdaptiveGaussian
from lightning_dp.mechanisms.base import ContributionSpec, ReleasePlan
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.noise import NoiseSource
from lightning_dp.mechanisms.topagg import TopAgg
from lightning_dp.modules import release as release_module
from lightning_dp.modules.dpsgd import DPSGDClassifier
from lightning_dp.modules.release import ReleaseSession
from lightning_dp.modules.teacher_gan import TeacherEnsembleGAN
from tests.conftest import TinyData, callbacks_for, tiny_discriminator_gan, tiny_gan, trainer_for
from tests.modules.test_dpsgd import PRIVACY, tiny_dpsgd

REPLACE, ADD = NeighboringRelation.REPLACE_ONE, NeighboringRelation.ADD_OR_REMOVE_ONE
RECORDS = ContributionSpec.records(expected_batch_size=4, vector_dim=5)
TABLE = ContributionSpec.statistics(num_cells=3, vector_dim=5, rows_never_oppose=True)
TEACHERS = ContributionSpec.teachers(num_teachers=4, vectors_per_row=2, vector_dim=5)
CLASSES = ContributionSpec.class_wise_teachers(
    num_teachers=4, num_classes=2, images_per_class=2, vector_dim=5, single_record=False
)
FULL = Sampling(scheme="full")


def session(spec=RECORDS, relation=ADD, sampling=FULL, mechanism=None, noise=None, ledger_relation=None, ranks=ALONE):
    header = {"relation": (ledger_relation or relation).name.lower(), "unit": spec.unit}
    return ReleaseSession(
        mechanism=mechanism or Gaussian(),
        plan=ReleasePlan(spec=spec, relation=relation, noise_multiplier=1.0),
        ledger=PrivacyLedger(header, None),
        sampling=sampling,
        noise=noise or NoiseSource(),
        public_seed=0,
        may_release=lambda event, sampling: None,
        ranks=ranks,
    )


def release(chunks, shape, **options):
    door = options.pop("door", None) or session(**options)
    door.begin_step()
    return door.release(chunks, shape, torch.device("cpu"))


class Summed(SummableRows):
    """Rows that are never formed."""

    norm_bounds = property(lambda self: torch.ones(len(self.ids), dtype=torch.float64))

    def __init__(self, *ids, place=0):
        self.ids, self.place = torch.tensor(ids, dtype=torch.int64), place

    def add_weighted_sum(self, weights, total):
        total += weights.sum() / 5

    def row_chunks(self):
        yield rows(*self.ids.tolist(), queries=slice(self.place, self.place + 1))


def rows(*ids, queries=slice(0, 1), width=None):
    width = width or queries.stop - queries.start
    return RowChunk(torch.tensor(ids, dtype=torch.int64), torch.randn(len(ids), width, 5), queries)


class TestRows:
    @pytest.mark.parametrize(
        "chunks",
        [[rows(3, 1, 3)], [rows(0, 1), rows(1, 2)], [rows(7), rows(7)]],
        ids=["in one chunk", "in two", "alone"],
    )
    def test_a_record_with_two_rows_is_refused(self, chunks):
        """The broken version: records drawn with replacement, of which one moves the sum by two bounds."""
        with pytest.raises(PrivacyProtocolError, match="two rows"):
            release(chunks, (1, 5))

    def test_a_record_in_two_cells_of_a_table_is_refused(self):
        with pytest.raises(PrivacyProtocolError, match="two rows"):
            release([rows(0, 1), rows(1, queries=slice(2, 3))], (3, 5), spec=TABLE)

    def test_a_row_over_all_cells_of_a_table_is_refused(self):
        with pytest.raises(PrivacyProtocolError, match="at most 1 vectors within 3"):
            release([rows(0, 1, queries=slice(0, 3))], (3, 5), spec=TABLE)

    def test_one_vector_spread_over_several_images_is_refused(self):
        """Broadcast by the addition, it would count as many times as there are images."""
        with pytest.raises(PrivacyProtocolError, match="shape"):
            release([rows(0, 1, queries=slice(0, 2), width=1)], (2, 5), spec=TEACHERS, relation=REPLACE)

    @pytest.mark.parametrize("shape", [(2, 5), (1, 6)])
    def test_a_release_of_another_shape_is_refused(self, shape):
        door = session()
        with pytest.raises(PrivacyProtocolError, match="as planned"):
            release([rows(0)], shape, door=door)
        assert len(door.ledger) == 0

    def test_a_teacher_with_a_row_for_each_label_passes(self):
        chunks = [rows(0, 1, queries=slice(0, 2)), rows(1, 3, queries=slice(2, 4))]
        assert release(chunks, (4, 5), spec=CLASSES, relation=REPLACE).number == 1

    def test_rows_in_any_order_pass(self):
        assert release([rows(5, 2), rows(9, 0)], (1, 5)).number == 1

    def test_nothing_passes(self):
        assert release([], (1, 5)).number == 1


class TestPlans:
    def test_a_plan_under_another_relation_than_the_ledgers_is_refused(self):
        """The broken version charges half of the sensitivity to a ledger that claims replace-one."""
        with pytest.raises(PrivacyProtocolError, match="ledger's relation replace_one"):
            session(relation=ADD, ledger_relation=REPLACE)

    def test_sampled_replace_one_wants_half_of_the_sensitivity_for_an_absence(self):
        """Rows that never oppose each other are sqrt 2 bounds apart, and one bound from nothing: more than half."""
        sampled = Sampling(scheme="poisson", rate=0.1)
        with pytest.raises(ConfigurationError, match="record's absence"):
            session(spec=TABLE, relation=REPLACE, sampling=sampled)
        session(spec=TABLE, relation=ADD, sampling=sampled)
        session(spec=TABLE, relation=REPLACE)
        session(spec=RECORDS, relation=REPLACE, sampling=sampled)

    def test_options_changed_in_mid_run_are_charged_as_they_are(self):
        """The broken version goes on charging the thresholded votes while noisy ones leave."""
        mechanism = TopAgg(top_k=2, charge="ternary")
        door = session(spec=TEACHERS, relation=REPLACE, mechanism=mechanism)
        release([rows(0, 1, queries=slice(0, 2))], (2, 5), door=door)
        mechanism.charge, mechanism.output = "gaussian", "votes"
        release([rows(0, 1, queries=slice(0, 2))], (2, 5), door=door)
        assert [event.kind for event, _ in door.ledger.counts()] == ["rounded_ternary", "rounded_gaussian"]

    def test_two_ledgers_cannot_share_noise(self):
        """Both have a release 1; the broken version draws the same noise for both, and their difference is exact."""
        noise = NoiseSource()
        release([rows(0)], (1, 5), noise=noise)
        with pytest.raises(PrivacyProtocolError, match="NoiseSource of its own"):
            release([rows(0)], (1, 5), noise=noise)

    def test_a_norm_that_fell_to_nothing_makes_no_nan_of_a_flat_record(self):
        mechanism = AdaptiveGaussian(initial_norm=1e-100, adaptation_rate=100.0)
        door = session(mechanism=mechanism)
        for _ in range(5):
            flat = RowChunk(torch.arange(3), torch.zeros(3, 1, 5), slice(0, 1))
            assert release([flat], (1, 5), door=door).value.isfinite().all()
        assert mechanism.max_grad_norm >= 1e-100


def fit(tmp_path, module, callbacks=None, extra=(), **options):
    own = callbacks if callbacks is not None else callbacks_for()
    trainer_for(tmp_path, [*own, *extra], 4, **options).fit(module, datamodule=TinyData())
    return own[1]


class TestRuns:
    def test_images_added_in_mid_run_are_refused(self, tmp_path):
        class Grows(TeacherEnsembleGAN):
            """The bug: twice as many images from the second step on, at the price of the first."""

            def training_step(self, batch, batch_idx):
                self.images_per_step = 6 if batch_idx == 0 else 12
                super().training_step(batch, batch_idx)

        module = tiny_discriminator_gan()
        module.__class__ = Grows
        with pytest.raises(PrivacyProtocolError, match=r"Expected a release of shape \(6, 64\), as planned"):
            fit(tmp_path, module)

    def test_a_rate_that_is_changed_after_the_sampler_was_made_is_refused(self, tmp_path):
        """The bug: sampled at one rate, charged at a smaller one."""

        class Shrinks(DPSGDClassifier):
            def on_fit_start(self):
                self.expected_batch_size = 1

        module = tiny_dpsgd()
        module.__class__ = Shrinks
        with pytest.raises(PrivacyProtocolError, match="changed between set-up"):
            fit(tmp_path, module, callbacks_for(Gaussian(), **PRIVACY))

    def test_records_drawn_with_replacement_are_refused(self, tmp_path):
        class Bootstrap(DPSGDClassifier):
            def draw_records(self):
                return torch.tensor([4, 4, 9])

        module = tiny_dpsgd()
        module.__class__ = Bootstrap
        with pytest.raises(PrivacyProtocolError, match="two rows"):
            fit(tmp_path, module, callbacks_for(Gaussian(), **PRIVACY))

    def test_a_charge_below_what_rows_send_needs_words_in_the_claim(self, tmp_path):
        class Silent(TeacherEnsembleGAN):
            @property
            def unverified(self):
                return ()

        honest = tiny_discriminator_gan(accounting="per_image")
        assert fit(tmp_path, honest).claim().level is ClaimLevel.UNVERIFIED
        module = tiny_discriminator_gan(accounting="per_image")
        module.__class__ = Silent
        with pytest.raises(ConfigurationError, match="charges less than its rows send"):
            fit(tmp_path, module)

    def test_a_specs_undercharge_is_a_field_and_no_default(self):
        assert not any(spec.is_undercharged for spec in (RECORDS, TABLE, TEACHERS, CLASSES))
        assert dataclasses.replace(TEACHERS, is_undercharged=True) != TEACHERS


class EditsTheGenerator(pl.Callback):
    """The bug: a last touch from the records, after the last step and before what is released is written."""

    def on_train_end(self, trainer, pl_module):
        with torch.no_grad():
            next(pl_module.generator.parameters()).add_(trainer.datamodule.train_images.float().mean() / 255)


@pytest.mark.parametrize("is_edited", [False, True])
def test_networks_edited_after_the_last_step_are_not_published(tmp_path, is_edited):
    own = callbacks_for()
    folder = RunFolder(path=tmp_path, privatizer=own[0], evaluation=None, config={}, title="tiny")
    if not is_edited:
        fit(tmp_path, tiny_gan(), own, extra=[folder])
        assert (tmp_path / "release" / "generator.safetensors").exists()
        return
    with pytest.raises(PrivacyProtocolError, match="changed outside a step"):
        fit(tmp_path, tiny_gan(), own, extra=[EditsTheGenerator(), folder])
    assert not (tmp_path / "release").exists()
    assert not (tmp_path / "claim.json").exists()


class TestWhatBelongsToARecord:
    """Ids are positions in a file: a record that leaves it moves those behind it up."""

    def drawn(self, module):
        module._round = 3
        return module.record_seed(0)

    def test_its_draws_are_secret_and_new_at_every_start(self, tmp_path):
        """With public draws, one record less at the front moved the sum of 40 by four bounds, for they all changed."""
        module, twin = tiny_dpsgd(public_seed=5), tiny_dpsgd(public_seed=5)
        assert self.drawn(module) != self.drawn(twin)
        before = self.drawn(module)
        fit(tmp_path, module, callbacks_for(Gaussian(), **PRIVACY))
        assert self.drawn(module) != before

    def test_steps_and_purposes_have_draws_of_their_own(self):
        module = tiny_dpsgd()
        seeds = set()
        for step in range(5):
            module._round = step
            seeds |= {module.record_seed(purpose) for purpose in range(3)}
        assert len(seeds) == 15

    def test_the_key_is_in_no_checkpoint(self, tmp_path):
        module = tiny_dpsgd(max_shift=1)
        own = callbacks_for(Gaussian(), **PRIVACY)
        checkpoint = PrivateCheckpoint(path=tmp_path / "private" / "last.ckpt", accountant=own[1], every_n_releases=1)
        fit(tmp_path, module, own, extra=[checkpoint], enable_checkpointing=True)
        assert module._record_key not in checkpoint.path.read_bytes()

    def test_an_insecure_seed_fixes_it(self, tmp_path):
        keys = []
        for _ in range(2):
            module = tiny_dpsgd()
            fit(tmp_path, module, callbacks_for(Gaussian(), **PRIVACY, insecure_seed=3))
            keys.append(module._record_key)
        assert keys[0] == keys[1]

    def test_the_views_of_a_run_follow_the_secret(self):
        module, images = tiny_dpsgd(max_shift=3), torch.rand(6, 1, 8, 8)
        first = module._views(images, torch.arange(6))
        assert torch.equal(first, module._views(images, torch.arange(6)))
        module._record_key = bytes(16)
        assert not torch.equal(first, module._views(images, torch.arange(6)))


def test_tiny_gan_passes(tmp_path):
    assert fit(tmp_path, tiny_gan()).claim().level is ClaimLevel.PROVED


def test_rows_that_are_never_formed_are_counted_too():
    release([Summed(1, 2, place=2), Summed(3, place=0)], (3, 5), spec=TABLE)
    for chunks in ([Summed(1, 2), Summed(2, place=1)], [Summed(1), rows(1, queries=slice(2, 3))]):
        with pytest.raises(PrivacyProtocolError, match="two rows"):
            release(chunks, (3, 5), spec=TABLE)
    for place in (-1, 3):
        with pytest.raises(PrivacyProtocolError, match="within 3"):
            release([Summed(1, place=place)], (3, 5), spec=TABLE)


def test_processes_with_two_ciphers_do_not_release_together(monkeypatch):
    """They would add different noise to one sum; what they agree on before a release names the cipher."""

    class Listening(Ranks):
        def together(self, number, subject, seen=0):
            subjects.append(subject)
            return super().together(number, subject, seen)

    subjects = []
    for cipher in ("AES-128", "ChaCha20", "AES-128"):
        monkeypatch.setattr(release_module, "CIPHER", cipher)
        release([rows(1, 2)], (1, 5), ranks=Listening())
    assert subjects[0] == subjects[2] != subjects[1]

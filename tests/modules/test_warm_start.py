"""A warm start is one release more, in the same ledger and the same budget; what it teaches is post-processing."""

from functools import partial

import pytest
import torch

from callbacks import GradientPrivatizer, PrivacyAccountant
from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.accounting.claim import ClaimLevel
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import ConfigurationError, PrivacyProtocolError
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.no_privacy import NoPrivacy
from lightning_dp.mechanisms.topagg import TopAgg
from lightning_dp.modules import base
from lightning_dp.modules.base import PrivateModule
from lightning_dp.modules.imitation import energy_distance, imitate
from lightning_dp.modules.release import PublicSamples
from lightning_dp.modules.semi_dual import SemiDualSinkhorn
from lightning_dp.modules.semi_dual_warm_start import SemiDualWarmStart
from lightning_dp.modules.teacher_gan import TeacherEnsembleGAN
from lightning_dp.modules.warm_start import MomentsWarmStart
from lightning_dp.networks.class_gaussian import ClassGaussianGenerator
from tests.conftest import TinyData, settings, tiny_gan, tiny_generator, trainer_for
from tests.modules.test_dpgan import tiny_dpgan
from tests.modules.test_dpsgd import tiny_dpsgd
from tests.modules.test_semi_dual import tiny_semi_dual
from tests.modules.test_sinkhorn import tiny_sinkhorn
from tests.modules.test_vae import tiny_vae

STEPS = 4


def warm_start(**options) -> MomentsWarmStart:
    return MomentsWarmStart(**{"samples": 40, "steps": 3, "num_coefficients": 10, **options})


def by_transport(**options) -> SemiDualWarmStart:
    small = {"samples": 40, "steps": 3, "num_coefficients": 10, "releases": 3, "expected_batch_size": 8.0}
    return SemiDualWarmStart(**{**small, "images_per_class": 2, "budget": 0.2, **options})


def upright(**options) -> MomentsWarmStart:
    return warm_start(slant=4.0, **options)


KINDS = pytest.mark.parametrize(
    "make_warm", [warm_start, upright, by_transport], ids=["moments", "upright", "semi_dual"]
)


def fit(tmp_path, module, mechanism=None, warm=None, ledger_path=None, **privacy):
    accountant = PrivacyAccountant(privacy=settings(**privacy), ledger_path=ledger_path)
    privatizer = GradientPrivatizer(
        mechanism=mechanism or TopAgg(top_k=4), accountant=accountant, warm_start=warm or warm_start()
    )
    trainer_for(tmp_path, [privatizer, accountant], STEPS).fit(module, datamodule=TinyData())
    return accountant


def learned(module):
    return {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize(
    ("make", "mechanism", "relation", "make_warm"),
    [
        (tiny_gan, TopAgg(top_k=4), "replace_one", warm_start),
        (tiny_sinkhorn, Gaussian(), "add_or_remove_one", warm_start),
        (tiny_semi_dual, Gaussian(), "add_or_remove_one", warm_start),
        (tiny_vae, Gaussian(), "add_or_remove_one", warm_start),
        (tiny_dpgan, Gaussian(), "add_or_remove_one", warm_start),
        (tiny_gan, TopAgg(top_k=4), "replace_one", by_transport),
        (tiny_vae, Gaussian(), "replace_special", by_transport),
    ],
)
def test_both_kinds_of_release_stand_in_one_ledger_within_one_budget(
    tmp_path, caplog, make, mechanism, relation, make_warm
):
    caplog.set_level("INFO")
    warm = make_warm()
    accountant = fit(tmp_path, make(), mechanism, warm, neighboring_relation=relation, target_epsilon=3.0)
    assert "is lost" not in caplog.text
    entries, counts = accountant.ledger.entries, accountant.ledger.counts()
    first, own = entries[: warm.num_releases], entries[warm.num_releases :]
    assert (len(first), len(own)) == (3 if make_warm is by_transport else 1, STEPS)
    assert len({(entry.event, entry.sampling) for entry in first}) == 1
    assert first[0].event not in [entry.event for entry in own]
    assert (first[0].sampling.rate == 1.0) == (make_warm is warm_start)
    spent = compute_epsilon(counts, delta=1e-5, relation=relation).epsilon
    assert 0.99 * 3 <= spent <= 3
    alone = {key: count for key, count in counts.items() if key[0] == first[0].event}
    assert compute_epsilon(alone, delta=1e-5, relation=relation).epsilon == pytest.approx(0.2 * 3, rel=1e-2)
    assert accountant.claim().level == "PROVED"
    assert "Gaussian (warm start)" in accountant.claim().statement()


FLOATING = "the gap between real-valued noise and the floating-point sampler"


@pytest.mark.parametrize(
    ("make", "mechanism", "relation"),
    [
        (tiny_gan, TopAgg(top_k=4), "replace_one"),  # whole noise is its default
        (tiny_vae, Gaussian(noise="rounded_gaussian"), "add_or_remove_one"),
        (tiny_gan, TopAgg(top_k=4, noise="discrete_gaussian"), "replace_one"),
    ],
    ids=["default", "asked for", "discrete"],
)
def test_its_noise_is_exact_where_that_of_the_method_is(tmp_path, monkeypatch, make, mechanism, relation):
    """The broken twin draws its own in floating point, and the claim of the whole run cannot say that gap is closed."""
    options = {"neighboring_relation": relation, "target_epsilon": 3.0, "accountant": "rdp"}  # the quickest
    accountant = fit(tmp_path, make(), mechanism, **options)
    first = accountant.ledger.entries[0].event
    assert first.is_exact
    assert first.kind == "rounded_gaussian"  # the cheaper of both exact laws
    assert FLOATING not in accountant.claim().not_covered
    with monkeypatch.context() as patch:
        patch.setattr("callbacks.gradient_privatizer._stand_in", lambda *_: Gaussian())
        assert FLOATING in fit(tmp_path, make(), mechanism, **options).claim().not_covered
    floating = type(mechanism)(**{**({"top_k": 4} if make is tiny_gan else {}), "noise": "gaussian"})
    assert FLOATING in fit(tmp_path, make(), floating, **options).claim().not_covered


def test_a_run_that_forgets_the_first_release_is_refused(tmp_path, monkeypatch):
    """The broken twin plans as if the warm start were free: the last release would cross the budget."""
    monkeypatch.setattr(GradientPrivatizer, "_plan_warm_start", free_of_charge)
    monkeypatch.setattr(TeacherEnsembleGAN, "on_train_batch_end", goes_on)
    with pytest.raises(PrivacyProtocolError, match="cross the budget"):
        fit(tmp_path, tiny_gan())


def free_of_charge(self, module):
    self._warm = self.warm_start.plan_release(module, self.accountant.privacy, Gaussian())
    return {}


def goes_on(self, *_):
    self.trainer.should_stop = False


@KINDS
def test_it_is_made_once(tmp_path, monkeypatch, make_warm):
    """A run that starts anew with its ledger (it died before the first checkpoint) goes on without another one."""
    path = tmp_path / "ledger.jsonl"

    def dies(self, batch, batch_idx):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(TeacherEnsembleGAN, "training_step", dies)
        with pytest.raises(RuntimeError, match="killed"):
            fit(tmp_path, tiny_gan(), warm=make_warm(), ledger_path=path)
    planned = make_warm().num_releases
    assert len(PrivacyLedger.read(path)) == planned
    entries = fit(tmp_path, tiny_gan(), warm=make_warm(), ledger_path=path).ledger.entries
    assert len(entries) == STEPS + planned
    assert len([entry for entry in entries if entry.event == entries[0].event]) == planned


def test_a_warm_start_that_dies_half_way_is_charged_as_planned(tmp_path, monkeypatch):
    """What it released stays charged and is not made again; the claim is that of the whole plan."""
    path, steps = tmp_path / "ledger.jsonl", []

    def dies(self, batch, batch_idx, real=SemiDualSinkhorn.training_step):
        steps.append(1)
        if len(steps) == 3:
            raise RuntimeError("killed")
        real(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SemiDualSinkhorn, "training_step", dies)
        with pytest.raises(RuntimeError, match="killed"):
            fit(tmp_path, tiny_gan(), warm=by_transport(), ledger_path=path)
    assert len(PrivacyLedger.read(path)) == 2
    accountant = fit(tmp_path, tiny_gan(), warm=by_transport(), ledger_path=path)
    assert len(accountant.ledger) == STEPS + 2
    assert accountant.claim().epsilon == pytest.approx(settings().target_epsilon, rel=1e-2)


class MakesOneMore(SemiDualWarmStart):
    """One release beyond what was planned and calibrated."""

    def join_run(self, module, *, seed):
        super().join_run(module, seed=seed)
        self.method.planned_releases += 1


def test_more_releases_than_planned_are_refused(tmp_path):
    warm = MakesOneMore(samples=40, releases=3, num_coefficients=10, expected_batch_size=8.0, images_per_class=2)
    with pytest.raises(PrivacyProtocolError, match="would cross the budget"):  # whose rest is the method's own
        fit(tmp_path, tiny_gan(), warm=warm, neighboring_relation="replace_special")


def of_gaussians(make) -> PrivateModule:
    """A method that trains the generator that a warm start by moments fits."""
    module = make()
    module.generator = ClassGaussianGenerator((1, 8, 8), num_classes=2, num_coefficients=10, slant=4.0)
    return module


@pytest.mark.parametrize("make", [tiny_gan, tiny_semi_dual])
def test_a_generator_of_class_gaussians_learns_on_from_the_moments(make, tmp_path, monkeypatch):
    begun = []

    def look(self, samples, real=base.PrivateModule.take_warm_start, **options):
        real(self, samples, **options)
        begun.append(self.generator.means.detach().clone())

    monkeypatch.setattr(base.PrivateModule, "take_warm_start", look)
    module = of_gaussians(make)
    accountant = fit(tmp_path, module, Gaussian(), upright(), neighboring_relation="replace_special")
    assert accountant.claim().level == ClaimLevel.PROVED
    assert len(accountant.ledger) == 1 + STEPS
    assert not torch.equal(module.generator.means, begun[0])


@pytest.mark.parametrize("other", [{"slant": 2.0}, {"num_coefficients": 9}, {"num_components": 2}, {"window": 6}])
def test_class_gaussians_that_mean_something_else_are_refused(other, tmp_path):
    module, fitted = tiny_gan(), {"num_classes": 2, "num_coefficients": 10, "slant": 4.0}
    module.generator = ClassGaussianGenerator((1, 8, 8), **{**fitted, **other})
    with pytest.raises(ConfigurationError, match=f"generator.{next(iter(other))}=.*as the warm start fits it"):
        fit(tmp_path, module, warm=upright())


@pytest.mark.parametrize(
    ("make", "make_warm"),
    [
        *((make, by_transport) for make in (tiny_gan, tiny_semi_dual, tiny_dpgan)),
        *((partial(of_gaussians, make), upright) for make in (tiny_gan, tiny_semi_dual)),
    ],
)
def test_the_method_begins_where_the_release_left_its_own_generator(make, make_warm, tmp_path, monkeypatch):
    begun = []

    def look(self, samples, real=base.PrivateModule.take_warm_start, **options):
        real(self, samples, **options)
        begun.append((self.generator.state_dict(), samples.source.state_dict()))
        raise RuntimeError("seen")

    monkeypatch.setattr(base.PrivateModule, "take_warm_start", look)
    module = make()
    before = {name: value.clone() for name, value in module.generator.state_dict().items()}
    with pytest.raises(RuntimeError, match="seen"):
        fit(tmp_path, module, Gaussian(), make_warm(), neighboring_relation="replace_special")
    mine, theirs = begun[0]
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    assert not all(torch.equal(before[name], value) for name, value in theirs.items())


@KINDS
def test_what_is_learned_before_the_first_release_is_a_function_of_what_was_released(tmp_path, monkeypatch, make_warm):
    """With the release replaced by zeros, other records teach the same: nothing reaches the samples beside it."""
    taught = []
    monkeypatch.setattr(
        base.PrivateModule, "take_warm_start", lambda self, samples, **_: taught.append(samples.images.clone())
    )
    monkeypatch.setattr(
        Gaussian, "release", lambda self, total, plan, *_, **__: self.decode(torch.zeros_like(total), plan, 1, 0)
    )
    for data_seed in (0, 1):
        torch.manual_seed(0)
        accountant = PrivacyAccountant(privacy=settings())
        privatizer = GradientPrivatizer(mechanism=TopAgg(top_k=4), accountant=accountant, warm_start=make_warm())
        trainer_for(tmp_path, [privatizer, accountant], 1).fit(tiny_gan(), datamodule=TinyData(data_seed=data_seed))
    assert torch.equal(*taught)


@KINDS
def test_without_privacy_it_is_made_without_noise(tmp_path, make_warm):
    accountant = fit(tmp_path, tiny_gan(), NoPrivacy(), make_warm())
    assert len(accountant.ledger) == STEPS + make_warm().num_releases
    assert accountant.claim().level == "NONPRIVATE"


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (tiny_dpsgd, {"mechanism": Gaussian(), "neighboring_relation": "add_or_remove_one"}, "no warm start"),
        (tiny_gan, {"target_epsilon": None, "noise_multiplier": 5.0}, "share of privacy.target_epsilon"),
    ],
)
def test_what_cannot_be_started_warmly_is_refused_before_a_record_is_read(tmp_path, make, options, words):
    with pytest.raises(ConfigurationError, match=words):
        fit(tmp_path, make(), **options)


@pytest.mark.parametrize(
    "option", [{"budget": 0.0}, {"budget": 1.0}, {"steps": 0}, {"samples": 0}, {"learning_rate": 0}]
)
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ConfigurationError, match="warm_start"):
        warm_start(**option)


def test_options_of_transport_out_of_range_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"warm_start\.releases >= 1"):
        by_transport(releases=0)
    with pytest.raises(ConfigurationError, match=r"warm_start\.expected_batch_size <= 40"):
        fit(tmp_path, tiny_gan(), warm=by_transport(expected_batch_size=41))


def test_a_module_at_work_takes_no_warm_start(tmp_path):
    module = tiny_gan()
    fit(tmp_path, module)
    with pytest.raises(PrivacyProtocolError, match="before the first release"):
        module.take_warm_start(
            PublicSamples(torch.zeros(2, 1, 8, 8), torch.arange(2)), steps=1, learning_rate=1, seed=0
        )


def samples_of_bars() -> PublicSamples:
    """A bright left half for one label, a bright right half for the other."""
    images = torch.full((40, 1, 8, 8), 0.1)
    images[:20, :, :, :4] = 0.9
    images[20:, :, :, 4:] = 0.9
    return PublicSamples(images, torch.arange(40) // 20)


@pytest.mark.parametrize("make", [tiny_gan, tiny_sinkhorn, tiny_semi_dual, tiny_vae, tiny_dpgan])
def test_every_generator_learns_from_samples(make):
    torch.manual_seed(0)
    module, samples = make(), samples_of_bars()

    def distance():
        images, labels = module.released_generator().sample(40, seed=0)
        groups = [(images[labels == k].flatten(1), samples.images[samples.labels == k].flatten(1)) for k in (0, 1)]
        return sum(float(energy_distance(a[None], b[None])) for a, b in groups)

    before = distance()
    module.learn_from_samples(samples, steps=150, learning_rate=0.02, seed=0)
    assert distance() < before - 0.5


def test_contrast_and_distortion_reach_the_samples(tmp_path, monkeypatch):
    """What is public may be added to the samples; the release, its price and its noise stay the same."""
    taught, events = [], []
    monkeypatch.setattr(
        base.PrivateModule, "take_warm_start", lambda self, samples, **_: taught.append(samples.images.clone())
    )
    monkeypatch.setattr(Gaussian, "release", lambda self, total, plan, *_, **__: total)
    for options in ({}, {"gain": 1.5}, {"distortion": (10.0, 0.1, 0.1, 1.0)}):
        accountant = fit(tmp_path, tiny_gan(), warm=warm_start(**options))
        events.append(accountant.ledger.entries[0].event)
    assert events[0] == events[1] == events[2]
    torch.testing.assert_close(taught[1], (1.5 * taught[0]).clamp(0, 1))
    assert not torch.allclose(taught[2], taught[0], atol=0.05)


def test_labels_that_were_never_drawn_are_left_alone():
    generator = tiny_generator()
    bars = samples_of_bars()
    imitate(generator, PublicSamples(bars.images[:20], bars.labels[:20]), steps=2, learning_rate=0.01, seed=0)

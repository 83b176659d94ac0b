import copy
import json

import pytest
import torch
import torch.nn.functional as F
from dp_accounting import NeighboringRelation
from torch import nn

from callbacks import EvaluateGenerator, RunFolder, SampleGrid
from lightning_dp.accounting.accountants import compute_epsilon
from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.poisson import PoissonSampler
from lightning_dp.mechanisms.adaptive import AdaptiveGaussian
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.no_privacy import NoPrivacy
from lightning_dp.mechanisms.topagg import TopAgg
from lightning_dp.modules.dpsgd import DPSGDClassifier
from lightning_dp.modules.published import load_classifier, load_generator
from lightning_dp.networks.classifier import Classifier
from lightning_dp.networks.scattering import ScatteringClassifier
from tests.conftest import TinyData, callbacks_for, trainer_for
from tests.contracts.records import clean_sum, moves


class TinyClassifier(Classifier):
    """Two linear layers on 8 x 8 images."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.width, self.image_shape, self.num_classes = width, (1, 8, 8), 2
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 2))

    def forward(self, images):
        return self.body(images)


class BrightData(TinyData):
    """Two classes that differ on one half of the image, so that a classifier can learn them."""

    def read(self):
        splits = super().read()
        for images, labels in (
            (splits.train_images, splits.train_labels),
            (splits.test_images, splits.test_labels),
        ):
            images.floor_divide_(4)
            images[labels == 1, :, :, 4:] += 150
        return splits


# Given noise: calibrating it takes seconds.
PRIVACY = {"neighboring_relation": "add_or_remove_one", "target_epsilon": None, "noise_multiplier": 8.0}


def tiny_dpsgd(**options) -> DPSGDClassifier:
    torch.manual_seed(0)
    defaults = {"expected_batch_size": 10, "learning_rate": 0.5, "chunk_size": 3}
    return DPSGDClassifier(TinyClassifier(), **{**defaults, **options})


def train(tmp_path, module=None, mechanism=None, data=None, max_steps=6, callbacks=(), **privacy):
    own = callbacks_for(mechanism or Gaussian(max_grad_norm=1.0), **{**PRIVACY, **privacy})
    module = module or tiny_dpsgd()
    trainer = trainer_for(tmp_path, [*own, *callbacks], max_steps)
    trainer.fit(module, datamodule=data or BrightData())
    return module, own[1]


MECHANISMS = [
    Gaussian(max_grad_norm=0.5),
    Gaussian(max_grad_norm=0.5, clipping="per_layer"),
    Gaussian(max_grad_norm=0.5, clipping="automatic", stability=0.01),
    AdaptiveGaussian(initial_norm=0.3, quantile_share=0.2),
    TopAgg(top_k=7, output="votes"),
    Gaussian(max_grad_norm=0.5, noise="rounded_gaussian"),
    Gaussian(max_grad_norm=0.5, clipping="automatic", noise="discrete_gaussian"),
]
NAMES = ["flat", "per layer", "automatic", "adaptive", "votes", "rounded", "discrete"]


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
@pytest.mark.parametrize("mechanism", MECHANISMS, ids=NAMES)
@pytest.mark.parametrize("views", [1, 3])
def test_one_record_moves_the_sum_no_further_than_the_event_says(mechanism, relation, views):
    module = tiny_dpsgd(views_per_record=views, max_shift=1)
    found = moves(module, TinyData, torch.tensor([0, 3, 5, 18, 19, 30]), mechanism, relation=relation)
    bound = mechanism.l2_sensitivity(module.contribution_spec(), NeighboringRelation[relation.upper()])
    assert 0 < max(found) <= bound * (1 + 1e-9)


def on_wavelets(**options) -> DPSGDClassifier:
    torch.manual_seed(0)
    network = ScatteringClassifier((1, 8, 8), num_classes=2, orientations=4)
    nn.init.normal_(network.head.weight, std=0.1)
    return DPSGDClassifier(network, **{"expected_batch_size": 10, "learning_rate": 0.5, "chunk_size": 3, **options})


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
def test_kept_features_move_with_their_record(relation):
    """Rows from kept features are those of the images, and a record that leaves or changes moves its own row alone."""
    ids, mechanism = torch.tensor([0, 3, 5, 18, 19, 30]), Gaussian(max_grad_norm=0.5)
    found = moves(on_wavelets(keep_features=True), TinyData, ids, mechanism, relation=relation)
    torch.testing.assert_close(
        found, moves(on_wavelets(), TinyData, ids, mechanism, relation=relation), rtol=1e-4, atol=0
    )
    bound = mechanism.l2_sensitivity(on_wavelets().contribution_spec(), NeighboringRelation[relation.upper()])
    assert 0 < max(found) <= bound * (1 + 1e-9)


def test_kept_features_train_the_same_network_and_stay_out_of_checkpoints(tmp_path):
    kept, other = (
        train(tmp_path, on_wavelets(keep_features=keep), NoPrivacy(), insecure_seed=3)[0] for keep in (True, False)
    )
    torch.testing.assert_close(kept.network.head.weight, other.network.head.weight, rtol=1e-4, atol=1e-5)
    assert not torch.equal(kept.network.head.weight, on_wavelets().network.head.weight)
    assert kept._kept[1].shape == (40, 9 * 4)
    assert kept.state_dict().keys() == other.state_dict().keys()


def test_views_drawn_in_the_order_of_the_batch_would_be_caught():
    """The broken twin: a record that leaves shifts everybody else's views, so far more than its own row moves."""

    class InOrder(DPSGDClassifier):
        def _views(self, images, ids):
            return super()._views(images, torch.arange(len(ids)))

    module = tiny_dpsgd(views_per_record=1, max_shift=3, chunk_size=50)
    module.__class__ = InOrder
    mechanism = Gaussian(max_grad_norm=1e-3)
    found = moves(module, TinyData, torch.arange(30), mechanism, relation="add_or_remove_one")
    bound = mechanism.l2_sensitivity(module.contribution_spec(), NeighboringRelation.ADD_OR_REMOVE_ONE)
    assert max(found) > 1.2 * bound


def test_dividing_by_the_realised_batch_would_be_caught():
    """The broken twin, on records that all say the same: the mean jumps where the sum moves by one row."""
    module, mechanism = tiny_dpsgd(), Gaussian(max_grad_norm=1.0)
    data, ids = TinyData(), torch.tensor([0, 0, 0, 1])
    mean = [clean_sum(module, data, part, mechanism) / len(part) for part in (ids, ids[:-1])]
    sums = [clean_sum(module, data, part, mechanism) for part in (ids, ids[:-1])]
    assert (sums[0] - sums[1]).norm() <= 1.0
    expected_size_bound = 1.0 / len(ids)
    assert (mean[0] - mean[1]).norm() > 1.2 * expected_size_bound


@pytest.mark.parametrize("mechanism", [*MECHANISMS, NoPrivacy()], ids=[*NAMES, "none"])
def test_every_mechanism_trains(tmp_path, mechanism):
    module = tiny_dpsgd()
    before = copy.deepcopy(module.network.state_dict())
    module, accountant = train(tmp_path, module, mechanism)
    assert len(accountant.ledger) == 6
    after = module.network.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert all(not torch.equal(before[name], value) for name, value in after.items())


def test_empty_batches_release_noise_and_are_charged(tmp_path, monkeypatch):
    monkeypatch.setattr(PoissonSampler, "draw", lambda self: torch.zeros(0, dtype=torch.int64))
    module = tiny_dpsgd()
    before = copy.deepcopy(module.network.state_dict())
    module, accountant = train(tmp_path, module)
    assert len(accountant.ledger) == 6
    assert all(not torch.equal(before[name], value) for name, value in module.network.state_dict().items())


def test_the_ledger_holds_poisson_sampling_at_the_rate_that_was_drawn(tmp_path):
    module, accountant = train(tmp_path)
    (entry,) = set(accountant.ledger.counts())
    assert entry[1].scheme == "poisson"
    assert entry[1].executed
    assert entry[1].rate == module._sampler.rate == 10 / 40
    claim = accountant.claim()
    assert claim.level == "PROVED"
    assert claim.relation == "add_or_remove_one"
    assert claim.epsilon == pytest.approx(compute_epsilon({entry: 6}, delta=1e-5, relation="add_or_remove_one").epsilon)


def test_replace_one_is_proved_too(tmp_path):
    _, accountant = train(tmp_path, neighboring_relation="replace_one")
    ((event, _),) = accountant.ledger.counts()
    assert event.l2_sensitivity == 2.0
    assert accountant.claim().level == "PROVED"


@pytest.mark.parametrize("gradients", ["ghost", "materialize", "functorch"])
def test_without_noise_and_bound_training_is_plain_training(tmp_path, gradients):
    """The same batches, by one backward pass through the summed loss: equal bit for bit after the float32 release."""
    module, plain = tiny_dpsgd(momentum=0.5, gradients=gradients).double(), TinyClassifier().double()
    plain.load_state_dict(module.network.state_dict())
    data = BrightData()
    train(tmp_path, module, NoPrivacy(), data, insecure_seed=5)
    sampler = PoissonSampler(40, 0.25, insecure_seed=5)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5, momentum=0.5)
    for _ in range(6):
        ids = sampler.draw()
        images = data.train_images[ids].double() / 255
        loss = F.cross_entropy(plain(images), data.train_labels[ids], reduction="sum")
        gradients = torch.autograd.grad(loss / 10, list(plain.parameters()))
        for parameter, gradient in zip(plain.parameters(), gradients, strict=True):
            parameter.grad = gradient.float().double()
        optimizer.step()
    for mine, theirs in zip(module.network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("gradients", ["ghost", "materialize", "functorch"])
def test_a_bound_that_nobody_reaches_changes_no_bit(gradients):
    sums = [
        clean_sum(tiny_dpsgd(gradients=gradients), TinyData(), torch.arange(12), mechanism)
        for mechanism in (NoPrivacy(), Gaussian(max_grad_norm=1e9))
    ]
    assert torch.equal(*sums)


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=NAMES)
def test_how_gradients_are_made_changes_nothing(mechanism):
    sums = []
    for gradients in ("functorch", "ghost", "materialize", "auto"):
        module = tiny_dpsgd(gradients=gradients, views_per_record=2, max_shift=1).double()
        sums.append(clean_sum(module, TinyData(), torch.arange(12), mechanism).double())
    for found in sums[1:]:
        torch.testing.assert_close(found, sums[0], rtol=1e-4, atol=1e-5)


def test_chunk_size_changes_nothing_but_speed(tmp_path):
    networks = []
    for chunk_size in (1, 50, None):
        module = tiny_dpsgd(chunk_size=chunk_size, views_per_record=2, max_shift=1).double()
        train(tmp_path, module, insecure_seed=5)
        networks.append(torch.cat([p.detach().flatten() for p in module.network.parameters()]))
    for found in networks[1:]:
        torch.testing.assert_close(found, networks[0], rtol=1e-6, atol=1e-7)


def test_it_learns_what_can_be_learnt(tmp_path):
    judge = EvaluateGenerator()
    train(tmp_path, tiny_dpsgd(learning_rate=1.0), NoPrivacy(), max_steps=40, callbacks=[judge])
    assert judge.result.metrics() == {"accuracy": 1.0}


def test_noise_destroys_learning(tmp_path):
    """At a fixed noise secret: a network that noise has drawn separates the two classes by luck now and then."""
    judge = EvaluateGenerator()
    train(tmp_path, max_steps=40, callbacks=[judge], noise_multiplier=1e3, insecure_seed=1)
    assert judge.result.metrics()["accuracy"] < 0.9


def test_the_average_is_what_is_published_and_judged(tmp_path):
    module, _ = train(tmp_path, tiny_dpsgd(ema_decay=0.9))
    assert module.released_model() is module.average.network
    assert not torch.equal(module.average.network.body[1].weight, module.network.body[1].weight)


def test_noise_and_batches_do_not_follow_the_global_seed(tmp_path):
    weights = []
    for _ in range(2):
        module = tiny_dpsgd()
        torch.manual_seed(7)
        train(tmp_path, module, NoPrivacy())
        weights.append(module.network.body[1].weight.detach().clone())
    assert not torch.equal(*weights)


class TestRunFolder:
    def run(self, tmp_path):
        own = callbacks_for(Gaussian(), **PRIVACY)
        judge = EvaluateGenerator()
        folder = RunFolder(path=tmp_path, privatizer=own[0], evaluation=judge, config={}, title="tiny")
        grid = SampleGrid(path=tmp_path / "samples.png")
        module = tiny_dpsgd(ema_decay=0.5)
        trainer_for(tmp_path, [folder, *own, judge, grid], 6).fit(module, datamodule=BrightData())
        return module, folder

    def test_a_classifier_is_released_with_its_card_and_no_samples(self, tmp_path):
        module, _ = self.run(tmp_path)
        assert {path.name for path in (tmp_path / "release").iterdir()} == {"classifier.json", "classifier.safetensors"}
        assert not (tmp_path / "samples.png").exists()
        card = json.loads((tmp_path / "run_card.json").read_text())
        assert card["model"]["classifier"] == "TinyClassifier"
        assert set(card["evaluation"]) == {"accuracy", "num_test", "wall_time_s"}
        assert card["evaluation"]["num_test"] == 20
        assert card["sampler"] == {"scheme": "poisson", "rate": 0.25, "executed": True}
        assert "Quality of the classifier" in (tmp_path / "run_card.html").read_text()
        network, claim = load_classifier(tmp_path)
        images = torch.randint(0, 256, (9, 1, 8, 8), dtype=torch.uint8)
        assert torch.equal(network.predict(images), module.average.network.predict(images))
        assert claim["level"] == "PROVED"

    def test_the_table_ends_with_its_accuracy(self, tmp_path):
        from rich.console import Console

        from lightning_dp.evaluation.report import metrics_table

        _, folder = self.run(tmp_path)
        console = Console(record=True, width=120)
        console.print(metrics_table(folder.card))
        assert "accuracy, test" in console.export_text()

    def test_it_cannot_be_sampled(self, tmp_path):
        module, _ = self.run(tmp_path)
        with pytest.raises(ConfigurationError, match="trains no generator"):
            module.released_generator()
        with pytest.raises(ConfigurationError, match="It released a classifier"):
            load_generator(tmp_path)


def test_a_resumed_run_draws_new_batches_and_keeps_its_average_and_norm(tmp_path):
    def callbacks():
        return callbacks_for(AdaptiveGaussian(), tmp_path / "ledger.jsonl", **PRIVACY)

    first, own = tiny_dpsgd(ema_decay=0.9), callbacks()
    trainer = trainer_for(tmp_path, own, max_steps=6)
    trainer.fit_loop.epoch_loop.max_steps = 3  # interrupted half-way through its plan
    trainer.fit(first, datamodule=BrightData())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    reached = own[0].mechanism.max_grad_norm
    again, own = tiny_dpsgd(ema_decay=0.9), callbacks()
    seen = []
    begin = own[0].on_train_batch_start
    own[0].on_train_batch_start = lambda *step: (seen.append(own[0].mechanism.max_grad_norm), begin(*step))
    trainer_for(tmp_path, own, max_steps=6).fit(
        again, datamodule=BrightData(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    assert seen[0] == reached != 0.1
    assert len(own[1].ledger) == 6
    assert again.average.num_updates == again._round == 6
    assert again._sampler is not first._sampler


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"expected_batch_size": 0}, "expected_batch_size > 0"),
        ({"chunk_size": 0}, "chunk_size > 0"),
        ({"learning_rate": float("nan")}, "learning_rate > 0"),
        ({"momentum": 1.0}, "momentum < 1"),
        ({"optimizer": "adam", "momentum": 0.9}, "ignored by adam"),
        ({"views_per_record": 4}, "average equal views"),
        ({"max_shift": -1}, "max_shift >= 0"),
        ({"final_learning_rate_share": 0.0}, "final_learning_rate_share"),
        ({"ema_decay": 1.0}, "ema_decay < 1"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigurationError, match=words):
        tiny_dpsgd(**options)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (lambda: tiny_dpsgd(expected_batch_size=41), "<= 40, the number of records"),
        (lambda: DPSGDClassifier(Wrong(), expected_batch_size=10), "the data are"),
        (lambda: frozen(), "no parameter to train"),
    ],
    ids=["batch", "shape", "frozen"],
)
def test_data_that_do_not_fit_are_refused(tmp_path, module, words):
    with pytest.raises(ConfigurationError, match=words):
        train(tmp_path, module())


class Wrong(TinyClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 3


def frozen() -> DPSGDClassifier:
    module = tiny_dpsgd()
    module.network.requires_grad_(False)
    return module

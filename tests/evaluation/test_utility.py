import inspect

import numpy as np
import pytest
import torch

from lightning_dp.errors import ConfigurationError
from lightning_dp.evaluation import utility
from lightning_dp.evaluation.utility import CLASSIFIER_NAMES, TrainingPlan, downstream_accuracy, fit_classifier

FAST = TrainingPlan(mlp_epochs=4, cnn_epochs=3, batch_size=16, learning_rate=3e-3)


def fit(name, images, labels, *, num_classes=3, plan=FAST, seed=0):
    return fit_classifier(name, images, labels, num_classes=num_classes, plan=plan, seed=seed)


@pytest.mark.parametrize("name", CLASSIFIER_NAMES)
@pytest.mark.parametrize("selection", ["last", "synthetic_validation"])
def test_learns_what_can_be_learnt(toy, name, selection):
    plan = TrainingPlan(**{**vars(FAST), "selection": selection})
    predictor = fit(name, *toy(300, 0), plan=plan)
    assert downstream_accuracy(predictor, *toy(90, 1)) > 0.95


@pytest.mark.parametrize("name", CLASSIFIER_NAMES)
def test_labels_without_meaning_teach_nothing(toy, name):
    images, labels = toy(300, 0)
    shuffled = labels[torch.randperm(300, generator=torch.Generator().manual_seed(5))]
    assert downstream_accuracy(fit(name, images, shuffled), *toy(300, 1)) < 0.6


@pytest.mark.parametrize("name", CLASSIFIER_NAMES)
def test_same_seed_same_predictor_and_global_streams_untouched(toy, name):
    images, labels = toy(100, 0)
    hard = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = fit(name, images, labels)(hard)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])
    torch.rand(7)  # moves the global stream, which must not matter
    assert torch.equal(first, fit(name, images, labels)(hard))
    if name != "logistic":  # convex: the seed decides nothing
        assert not torch.equal(first, fit(name, images, labels, seed=1)(hard))


def test_fitting_cannot_see_test_data():
    assert not [name for name in inspect.signature(fit_classifier).parameters if "test" in name]


def epoch_chosen(monkeypatch, judge, images, labels, plan):
    """Train with validation accuracies that `judge` dictates per epoch; return the predictions of the chosen epoch."""
    epochs = iter(range(plan.mlp_epochs))
    real_predict, hard = utility._predict, torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(3))

    def dictated(network, part):
        right = labels_of(part)
        return right if next(epochs) == judge else (right + 1) % 3

    def labels_of(part):
        return torch.stack([labels[(images == one).flatten(1).all(1)][0] for one in part])

    monkeypatch.setattr(utility, "_predict", dictated)
    predictor = fit("mlp", images, labels, plan=plan)
    monkeypatch.setattr(utility, "_predict", real_predict)
    return predictor(hard)


def test_validation_takes_the_best_epoch_and_last_takes_the_last(toy, monkeypatch):
    images, labels = toy(60, 0)
    plan = TrainingPlan(mlp_epochs=3, batch_size=16, selection="synthetic_validation", learning_rate=0.05)
    chosen = [epoch_chosen(monkeypatch, judge, images, labels, plan) for judge in range(3)]
    assert not torch.equal(chosen[0], chosen[2])
    hard = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    stopped = TrainingPlan(**{**vars(plan), "mlp_epochs": 1})
    assert torch.equal(chosen[0], fit("mlp", images, labels, plan=stopped)(hard))


@pytest.mark.parametrize("name", CLASSIFIER_NAMES)
@pytest.mark.parametrize("selection", ["last", "synthetic_validation"])
def test_degenerate_sets_give_a_number(toy, name, selection):
    images, labels = toy(40, 0)
    plan = TrainingPlan(**{**vars(FAST), "selection": selection})
    test_set = toy(30, 1)
    missing = fit(name, images[labels != 1], labels[labels != 1], plan=plan)
    assert downstream_accuracy(missing, *test_set) <= 0.7
    one_class = fit(name, images, torch.full_like(labels, 2), plan=plan)
    assert set(one_class(test_set[0]).tolist()) == {2}
    constant = fit(name, torch.full_like(images, 0.5), labels, plan=plan)
    assert 0 <= downstream_accuracy(constant, *test_set) <= 1
    single = fit(name, images[:1], labels[:1], plan=plan)
    assert 0 <= downstream_accuracy(single, *test_set) <= 1


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 10, 12), (1, 28, 28)])
def test_any_image_shape(shape):
    images, labels = torch.rand(6, *shape), torch.arange(6) % 2
    for name in CLASSIFIER_NAMES:
        assert fit(name, images, labels, num_classes=2)(images).shape == (6,)


def test_too_small_for_the_cnn():
    with pytest.raises(ConfigurationError, match=r"sides of at least 4 pixels.*Leave 'cnn' out"):
        fit("cnn", torch.rand(6, 1, 3, 3), torch.arange(6) % 2)


def test_unknown_and_repeated_names():
    with pytest.raises(ConfigurationError, match=r"logistic, mlp, cnn, got 'logisitc'.*Did you mean 'logistic'"):
        fit("logisitc", torch.rand(6, 1, 8, 8), torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ConfigurationError, match="each classifier once"):
        utility.check_classifiers(["cnn", "cnn"])
    with pytest.raises(ConfigurationError, match="at least one synthetic image"):
        fit("cnn", torch.rand(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("mlp_epochs", 0),
        ("cnn_epochs", -1),
        ("batch_size", 0),
        ("logistic_iterations", 0),
        ("learning_rate", float("nan")),
        ("selection", "test"),
        ("validation_fraction", 1.0),
    ],
)
def test_wrong_settings_are_refused(setting, value):
    with pytest.raises(ConfigurationError, match=setting):
        TrainingPlan(**{setting: value})


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_one_pass_of_adam_steps_as_adam_does(name, monkeypatch):
    """Channels-last weights included: the pass walks over memory, whatever order it lies in."""
    networks, real_adam = [], torch.optim.Adam

    def seen(parameters, *, fused, **options):
        networks.append(list(parameters))
        return real_adam(networks[-1], fused=fused and len(networks) == 1, **options)

    monkeypatch.setattr(torch.optim, "Adam", seen)
    images = torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(64) % 3
    for _ in range(2):
        fit(name, images, labels)
    for ours, theirs in zip(*networks, strict=True):
        # On the mean: where a gradient is next to nothing, its rounding decides a whole step of a thousandth.
        assert (ours - theirs).abs().mean() < 1e-5

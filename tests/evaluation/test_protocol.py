import dataclasses
import json

import pytest
import torch

from lightning_dp.errors import ConfigurationError
from lightning_dp.evaluation import protocol as module
from lightning_dp.evaluation.protocol import EvaluationProtocol, EvaluationResult, evaluate_samples, quantise
from lightning_dp.evaluation.utility import TrainingPlan

PLAN = TrainingPlan(mlp_epochs=2, cnn_epochs=1, batch_size=16)
SMALL = EvaluationProtocol(num_samples=60, num_reference=40, training=PLAN)


@pytest.fixture(scope="module")
def sets(toy):
    images, labels = toy(60, 0)
    test_images, test_labels = toy(45, 1)
    return images, labels, quantise(test_images), test_labels


@pytest.fixture(scope="module")
def result(sets):
    return evaluate_samples(*sets, SMALL)


def test_result_states_numbers_sizes_extractor_and_protocol(result):
    assert result.fid >= 0
    assert 0 <= result.precision <= 1
    assert 0 <= result.recall <= 1
    assert set(result.accuracy) == {"logistic", "mlp", "cnn"}
    assert (result.num_samples, result.num_reference, result.num_test) == (60, 40, 45)
    assert result.fid_extractor == "digits-fashion-cnn"
    assert result.protocol_hash == SMALL.hash
    assert result.wall_time_s > 0
    assert any("covariance is singular" in text for text in result.warnings)  # 40 images, 128 features


def test_result_round_trips_through_json(result):
    assert EvaluationResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    with pytest.raises(ConfigurationError, match="Expected the fields"):
        EvaluationResult.from_dict({"fid": 1.0})
    assert result.metrics()["accuracy/cnn"] == result.accuracy["cnn"]


def test_same_inputs_same_numbers_and_global_stream_untouched(sets, result):
    before = torch.get_rng_state()
    again = evaluate_samples(*sets, SMALL)
    assert torch.equal(before, torch.get_rng_state())
    assert dataclasses.replace(again, wall_time_s=0) == dataclasses.replace(result, wall_time_s=0)


def test_order_of_samples_by_class_does_not_skew_the_subset(toy):
    images, labels = toy(300, 0)
    order = labels.argsort()
    few = EvaluationProtocol(num_samples=60, num_reference=40, classifiers=())
    found = evaluate_samples(images[order], labels[order], quantise(images), labels, few)
    assert not [text for text in found.warnings if "label" in text]


def predictions_used(monkeypatch, sets, plan, fit):
    """Evaluate and return what the fitted classifier predicts for the test images."""
    seen = []
    monkeypatch.setattr(module, "fit_classifier", fit)
    monkeypatch.setattr(module, "downstream_accuracy", lambda predictor, x, _: seen.append(predictor(x)) or 0.0)
    evaluate_samples(*sets, dataclasses.replace(SMALL, classifiers=("mlp",), training=plan))
    return seen[0]


@pytest.mark.parametrize("selection", ["last", "synthetic_validation"])
def test_test_labels_choose_nothing(monkeypatch, sets, selection):
    """Shuffled test labels must leave the chosen model as it is; a selection on test accuracy would change it."""
    plan = dataclasses.replace(PLAN, selection=selection)
    images, labels, test_images, test_labels = sets
    shuffled = test_labels.roll(1)
    honest = module.fit_classifier
    right = predictions_used(monkeypatch, sets, plan, honest)
    assert torch.equal(right, predictions_used(monkeypatch, (images, labels, test_images, shuffled), plan, honest))


def test_the_check_catches_selection_on_test_data(monkeypatch, sets):
    images, labels, test_images, test_labels = sets
    honest, pixels = module.fit_classifier, test_images.float() / 255

    def selecting(truth):
        def fit(name, x, y, *, num_classes, plan, seed):
            models = [honest(name, x, (y + i) % 3, num_classes=num_classes, plan=plan, seed=i) for i in range(3)]
            return max(models, key=lambda model: float((model(pixels) == truth).float().mean()))

        return fit

    shuffled = test_labels.roll(1)
    right = predictions_used(monkeypatch, sets, PLAN, selecting(test_labels))
    wrong = predictions_used(monkeypatch, (images, labels, test_images, shuffled), PLAN, selecting(shuffled))
    assert not torch.equal(right, wrong)


def test_only_the_test_split_is_an_argument():
    """A training record cannot enter: the call takes synthetic samples and a test split, and no datamodule."""
    names = list(evaluate_samples.__annotations__)
    assert names == ["images", "labels", "test_images", "test_labels", "protocol", "device", "return"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_samples", 61),
        ("num_reference", 41),
        ("neighbours", 5),
        ("classifiers", ("cnn",)),
        ("seed", 1),
        ("training", dataclasses.replace(PLAN, cnn_epochs=2)),
        ("training", dataclasses.replace(PLAN, selection="synthetic_validation")),
    ],
)
def test_every_setting_enters_the_hash(field, value):
    assert dataclasses.replace(SMALL, **{field: value}).hash != SMALL.hash


def test_hash_is_stable_and_covers_extractor_and_code(monkeypatch):
    assert SMALL.hash == EvaluationProtocol(**{**vars(SMALL), "classifiers": list(SMALL.classifiers)}).hash
    before = SMALL.hash
    monkeypatch.setattr(module.load_extractor("digits-fashion-cnn").__class__, "preprocessing", "another")
    changed = SMALL.hash
    monkeypatch.setattr(module, "_VERSION", 99)
    assert len({before, changed, SMALL.hash}) == 3


def test_quick_preset_is_smaller_and_can_be_overridden():
    quick = EvaluationProtocol.quick(seed=3)
    assert (quick.num_samples, quick.seed) == (2_000, 3)
    assert EvaluationProtocol().num_samples == 10_000


def test_missing_class_and_constant_images_give_numbers_and_say_so(sets):
    images, labels, test_images, test_labels = sets
    found = evaluate_samples(torch.full_like(images, 0.5), labels * 0, test_images, test_labels, SMALL)
    assert any("label 1, 2" in text for text in found.warnings)
    assert any("equal" in text for text in found.warnings)
    assert found.accuracy["cnn"] == pytest.approx(1 / 3)


def test_label_beyond_the_test_classes_is_a_wrong_answer_not_a_crash(sets):
    images, labels, test_images, test_labels = sets
    found = evaluate_samples(images, labels + 3, test_images, test_labels, SMALL)
    assert found.accuracy["logistic"] == 0


def test_samples_are_judged_as_a_viewer_sees_them(sets, result):
    """Rounding to 256 levels first: a float and its PNG give the same numbers."""
    images, labels, test_images, test_labels = sets
    rounded = evaluate_samples(quantise(images).float() / 255, labels, test_images, test_labels, SMALL)
    assert dataclasses.replace(rounded, wall_time_s=0) == dataclasses.replace(result, wall_time_s=0)


def test_diverged_generators_get_one_clear_line(sets):
    images, labels, test_images, test_labels = sets
    broken = images.clone()
    broken[3, 0, 0, 0] = torch.nan
    with pytest.raises(ConfigurationError, match=r"got 1 of 60 with NaN or infinity\. The generator diverged"):
        evaluate_samples(broken, labels, test_images, test_labels, SMALL)
    with pytest.raises(ConfigurationError, match=r"in \[0, 1\], got values from -1 to"):
        evaluate_samples(images - 1 - images.min(), labels, test_images, test_labels, SMALL)


def test_wrong_inputs_get_one_clear_line(sets):
    images, labels, test_images, test_labels = sets
    cases = [
        ((images[:59], labels[:59], test_images, test_labels), "at least num_samples=60 synthetic images, got 59"),
        ((images, labels[:59], test_images, test_labels), r"synthetic labels, integers >= 0 of shape \(60,\)"),
        ((images, labels.float(), test_images, test_labels), "synthetic labels, integers"),
        ((images, labels - 1, test_images, test_labels), "minimum -1"),
        ((images, labels[:0], test_images, test_labels), "60 synthetic labels, got none"),
        ((images, labels, test_images.float(), test_labels), "test images, uint8"),
        ((quantise(images), labels, test_images, test_labels), r"synthetic images, float in \[0, 1\]"),
        ((images[..., :7], labels, test_images, test_labels), r"shape \(1, 8, 8\), got \(1, 8, 7\)"),
        ((images, labels, test_images[:3], test_labels[:3]), "more than neighbours=3 test images, got 3"),
        ((images, labels, test_images[:0], test_labels[:0]), "test images, uint8.*N >= 1"),
    ]
    for arguments, message in cases:
        with pytest.raises(ConfigurationError, match=message):
            evaluate_samples(*arguments, SMALL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extractor": "inceptoin"}, "Did you mean 'inception'"),
        ({"extractor_weights": "x.pth"}, "Expected no extractor_weights"),
        ({"classifiers": ("svm",)}, "Expected classifiers out of"),
        ({"neighbours": 0}, "neighbours >= 1"),
        ({"num_samples": 3}, "num_samples > neighbours=3"),
        ({"num_reference": 0}, "num_reference > neighbours=3"),
    ],
)
def test_wrong_protocols_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        EvaluationProtocol(**settings)

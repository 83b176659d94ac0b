import pytest
import torch

from lightning_dp.errors import ConfigurationError
from lightning_dp.evaluation import features
from lightning_dp.evaluation.features import EXTRACTOR_NAMES, load_extractor, to_gray


def test_shipped_weights_have_the_stated_checksum_and_tell_digits_apart():
    extractor = load_extractor()
    assert extractor.weights_sha256 == features.ASSET_SHA256
    assert extractor.describe()["name"] == "digits-fashion-cnn"
    images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    images[0, 0, 4:24, 13:15] = 255  # a one
    images[1, 0, 4:24, 8:20] = 255  # a dress
    vectors = extractor(images)
    assert vectors.shape == (2, 128)
    assert vectors.dtype == torch.float32
    assert not vectors.requires_grad
    assert (vectors[0] - vectors[1]).norm() > 5


def test_batching_changes_nothing():
    extractor = load_extractor()
    images = torch.randint(0, 256, (7, 1, 28, 28), dtype=torch.uint8)
    torch.testing.assert_close(extractor(images, batch_size=2), extractor(images))


def test_altered_weights_are_refused(monkeypatch):
    monkeypatch.setattr(features, "ASSET_SHA256", "0" * 64)
    with pytest.raises(ConfigurationError, match=r"Expected the weights .* SHA-256 0000.*got 61dc"):
        load_extractor()


def test_other_shapes_are_turned_gray_and_resized():
    extractor = load_extractor()
    rgb = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert extractor(rgb).shape == (2, 128)
    assert extractor(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)).shape == (1, 128)


def test_gray_28_passes_untouched_and_white_stays_white():
    images = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    torch.testing.assert_close(to_gray(images, 28), images.float() / 255)
    white = torch.full((1, 3, 40, 30), 255, dtype=torch.uint8)
    torch.testing.assert_close(to_gray(white, 28), torch.ones(1, 1, 28, 28))


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 28, 28),
        torch.zeros(2, 2, 28, 28, dtype=torch.uint8),
        torch.zeros(2, 28, 28, dtype=torch.uint8),
        torch.zeros(0, 1, 28, 28, dtype=torch.uint8),
    ],
)
def test_wrong_input_is_refused(images):
    with pytest.raises(ConfigurationError, match="Expected uint8 images of shape"):
        load_extractor()(images)


def test_unknown_name_lists_choices_and_nearest():
    with pytest.raises(ConfigurationError, match=r"digits-fashion-cnn, inception, got 'incpetion'.*mean 'inception'"):
        load_extractor("incpetion")
    assert set(EXTRACTOR_NAMES) == {"digits-fashion-cnn", "inception"}


def test_weights_that_would_be_ignored_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="Expected no extractor_weights"):
        load_extractor(weights=tmp_path / "x.pth")


def test_loading_leaves_the_global_stream_alone():
    before = torch.get_rng_state()
    load_extractor()(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))
    assert torch.equal(before, torch.get_rng_state())

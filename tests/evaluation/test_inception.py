import hashlib

import pytest
import torch
import torchmetrics.image.fid
from torch import nn

from lightning_dp.errors import ConfigurationError
from lightning_dp.evaluation import features
from lightning_dp.evaluation.features import INCEPTION_FILE, Inception, load_extractor
from lightning_dp.evaluation.protocol import EvaluationProtocol, evaluate_samples

WIDTH = 16  # of the stub; the real network has 2048, for which the FID of a test would take seconds


class StubNetwork(nn.Module):
    """Stands for torch-fidelity's network: takes uint8 RGB, refuses weights of another layout."""

    def __init__(self, path):
        super().__init__()
        self.project = nn.Linear(3, WIDTH)
        self.load_state_dict(torch.load(path, weights_only=True))

    def forward(self, images):
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        return self.project(images.float().mean(dim=(2, 3)) / 255)


class StubMetric:
    def __init__(self, feature, feature_extractor_weights_path):
        assert feature == 2048
        self.inception = StubNetwork(feature_extractor_weights_path)


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(torchmetrics.image.fid, "FrechetInceptionDistance", StubMetric)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.pth"
    linear = nn.Linear(3, WIDTH)
    torch.save({f"project.{name}": value for name, value in linear.state_dict().items()}, path)
    return path


def test_runs_frozen_on_gray_and_rgb_images(stub, weights):
    extractor = load_extractor("inception", weights=weights)
    gray = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    assert extractor(gray).shape == (3, WIDTH)
    torch.testing.assert_close(extractor(gray), extractor(gray.repeat(1, 3, 1, 1)))
    assert not extractor(gray).requires_grad
    assert extractor.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_evaluates_under_its_own_name_and_hash(stub, weights, tmp_path):
    images, labels = torch.rand(12, 1, 8, 8), torch.arange(12) % 3
    protocol = EvaluationProtocol(
        extractor="inception", extractor_weights=str(weights), num_samples=12, num_reference=12, classifiers=()
    )
    result = evaluate_samples(images, labels, (images * 255).to(torch.uint8), labels, protocol)
    assert result.fid_extractor == "inception"
    assert result.protocol_hash == protocol.hash
    moved = tmp_path / "elsewhere.pth"
    moved.write_bytes(weights.read_bytes())
    same = EvaluationProtocol(**{**vars(protocol), "extractor_weights": str(moved)})
    assert same.hash == protocol.hash  # the content counts, not the path
    state = torch.load(moved, weights_only=True)
    torch.save({name: value + 1 for name, value in state.items()}, moved)
    assert same.hash != protocol.hash


def test_finds_weights_in_the_cache_of_torch(stub, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(ConfigurationError, match=f"no file at .*{INCEPTION_FILE}.*extractor_weights"):
        load_extractor("inception")
    cached = tmp_path / "hub" / "checkpoints" / INCEPTION_FILE
    cached.parent.mkdir(parents=True)
    cached.write_bytes(weights.read_bytes())
    assert isinstance(load_extractor("inception"), Inception)


def test_missing_file_is_one_clear_line(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no file at .*absent\.pth") as caught:
        load_extractor("inception", weights=tmp_path / "absent.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no weights at all"])
def test_file_that_holds_no_weights(stub, tmp_path, content):
    path = tmp_path / "bad.pth"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"torch-fidelity's layout, got .*bad\.pth"):
        load_extractor("inception", weights=path)


def test_weights_of_another_layout(stub, tmp_path):
    path = tmp_path / "other.pth"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(ConfigurationError, match="torch-fidelity's layout"):
        load_extractor("inception", weights=path)


def test_missing_extra_names_the_install_line(weights, monkeypatch):
    def refuse(**_):
        raise ModuleNotFoundError("torch-fidelity is not installed.")

    monkeypatch.setattr(torchmetrics.image.fid, "FrechetInceptionDistance", refuse)
    with pytest.raises(ConfigurationError, match=r"pip install 'lightning-dp\[fid\]'"):
        features.load_extractor("inception", weights=weights)


def test_real_network_with_a_file_of_the_right_layout(tmp_path, monkeypatch):
    """Random weights in the published layout, through the real torchmetrics and torch-fidelity (extra `fid`)."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with monkeypatch.context() as patch:  # the constructor insists on weights; none are needed to write some
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path / INCEPTION_FILE
    torch.save(network.state_dict(), path)
    extractor = load_extractor("inception", weights=path)
    images = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        expected = network(images.expand(-1, 3, -1, -1))[0]
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-4)

"""Feature extractors by name: the space in which fidelity is measured, and the one thing an FID must never hide.

Two numbers are comparable only if extractor, weights and preprocessing agree, so an extractor states all three
(`describe`), and they enter the protocol's hash.
"""

import difflib
import hashlib
import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import final

import torch
from safetensors.torch import load
from torch import Tensor, nn

from lightning_dp.errors import ConfigurationError
from lightning_dp.networks.classifiers import FeatureClassifier, build_unset

DEFAULT_EXTRACTOR = "digits-fashion-cnn"
ASSET = "digits_fashion_cnn.safetensors"
ASSET_SHA256 = "61dc58d16b133a1fbe7f7bcc878aee847f9015421a61a269fb0d60fb3f7bbdad"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
_INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what common image tools use for gray


class FeatureExtractor(ABC):
    """A frozen map from images to feature vectors.

    Attributes:
        name: The name that selects it, printed beside every number it produces.
        feature_dim: Length of a feature vector.
        preprocessing: What happens to an image before the network, in words.
        weights_sha256: Checksum of the weights file.
    """

    name: str
    feature_dim: int
    preprocessing: str
    weights_sha256: str

    def describe(self) -> dict[str, str | int]:
        """Return all that decides the features: name, length, preprocessing and weights."""
        return {
            "name": self.name,
            "feature_dim": self.feature_dim,
            "preprocessing": self.preprocessing,
            "weights_sha256": self.weights_sha256,
        }

    @torch.no_grad()
    def __call__(self, images: Tensor, *, batch_size: int = 500) -> Tensor:
        """Return features, float32 (N, feature_dim), of images, uint8 (N, C, H, W) with C 1 or 3.

        Raises:
            ConfigurationError: Another type or shape, or no image.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
            raise ConfigurationError(
                "Expected uint8 images of shape (N, 1 or 3, H, W) with N >= 1 for the feature extractor, "
                f"got dtype={images.dtype}, shape={tuple(images.shape)}."
            )
        return torch.cat([self._features(part).float() for part in images.split(batch_size)])

    @abstractmethod
    def _features(self, images: Tensor) -> Tensor:
        """Return the features of one batch of checked uint8 images."""


def to_gray(images: Tensor, side: int) -> Tensor:
    """Return uint8 or float images of 0..255 as gray float images in [0, 1] of the given side.

    Gray 28x28 images pass unchanged (divided by 255); others are turned gray by BT.601 weights and resized bilinearly
    with antialiasing.

    Args:
        images: (N, 1 or 3, H, W).
        side: Height and width wanted.

    Returns: float32, (N, 1, side, side).
    """
    pixels = images.float() / 255
    if pixels.shape[1] == 3:
        weights = torch.tensor(_LUMA, device=pixels.device).view(1, 3, 1, 1)
        pixels = (pixels * weights).sum(dim=1, keepdim=True)
    if pixels.shape[-2:] != (side, side):
        pixels = nn.functional.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
    return pixels


@final
class DigitsFashionCNN(FeatureExtractor):
    """The default: a small classifier of digits and clothing that ships with the package.

    Its features fit gray 28x28 images of digits and clothing; others are turned gray and resized first, which makes a
    number, not a good one. An FID in this space is *not* comparable with an Inception FID.

    Guarantee: none is needed for public data. The weights were trained on the public MNIST and Fashion-MNIST training
    sets; where one of them stands in for private data, the weights are a public component of the *measurement* (they
    never reach the generator), and no number measured with them may choose between models of a private run.

    Args:
        device: Where to run.

    Raises:
        ConfigurationError: The shipped weights were altered.
    """

    name = DEFAULT_EXTRACTOR
    feature_dim = FeatureClassifier.feature_dim
    preprocessing = "uint8 / 255; RGB to BT.601 gray; bilinear antialiased resize to 28x28 unless already so"

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        stored = resources.files("lightning_dp.evaluation").joinpath("assets", ASSET).read_bytes()
        self.weights_sha256 = hashlib.sha256(stored).hexdigest()
        if self.weights_sha256 != ASSET_SHA256:
            raise ConfigurationError(
                f"Expected the weights {ASSET} with SHA-256 {ASSET_SHA256}, got {self.weights_sha256}. "
                "Install the package again, or set ASSET_SHA256 after retraining."
            )
        network = build_unset(lambda: FeatureClassifier(num_classes=20))
        assert isinstance(network, FeatureClassifier)
        network.load_state_dict({name: value.float() for name, value in load(stored).items()})
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._network = network.eval().requires_grad_(False).to(device)
        self._device = torch.device(device)

    def _features(self, images: Tensor) -> Tensor:
        features: Tensor = self._network.features(to_gray(images.to(self._device), side=28))
        return features


@final
class Inception(FeatureExtractor):
    """The 2048 pool features of the TensorFlow 2015 Inception network, as every published FID uses.

    Runs torch-fidelity's port through torchmetrics (extra `fid`). Weights are never downloaded here: they come from
    `weights`, else from torch's own cache folder. Gray images are repeated to three channels; the network resizes to
    299x299 as TensorFlow did.

    Args:
        weights: Path of the weights file (torch-fidelity's layout), or None for torch's cache folder.
        device: Where to run. About 0.2 s an image on one CPU core: meant for a GPU.

    Raises:
        ConfigurationError: The extra is not installed, or the weights are missing or of another layout.
    """

    name = "inception"
    feature_dim = 2048
    preprocessing = "uint8; gray repeated to 3 channels; resized to 299x299 inside the network (TensorFlow 1 bilinear)"

    def __init__(self, *, weights: str | Path | None = None, device: torch.device | str = "cpu") -> None:
        path = _inception_weights(weights)
        self._network = _load_inception(path).to(device)
        self._device = torch.device(device)
        self.weights_sha256 = _file_sha256(path)

    def _features(self, images: Tensor) -> Tensor:
        pixels = images.to(self._device)
        features: Tensor = self._network(pixels.expand(-1, 3, -1, -1).contiguous())
        return features.reshape(len(images), -1)


def _inception_weights(weights: str | Path | None) -> Path:
    """Return the path of the weights file, which must exist."""
    cache = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    path = Path(weights).expanduser() if weights is not None else cache
    if not path.is_file():
        raise ConfigurationError(
            f"Expected Inception weights for extractor='inception', got no file at {path}. Fetch {_INCEPTION_URL}, "
            f"then give its path as extractor_weights or put it at {cache}."
        )
    return path


def _load_inception(path: Path) -> nn.Module:
    """Return torch-fidelity's network, frozen, with the weights of the file."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except (ImportError, AttributeError, RuntimeError) as error:  # the last two: a torchvision of another torch build
        raise ConfigurationError(_no_extra(error)) from error
    try:
        metric = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(path))
    except ImportError as error:
        raise ConfigurationError(_no_extra(error)) from error
    except (RuntimeError, KeyError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigurationError(
            f"Expected Inception weights in torch-fidelity's layout, got {path} ({_first_line(error)}). "
            f"Fetch {_INCEPTION_URL}."
        ) from error
    network: nn.Module = metric.inception
    return network.eval().requires_grad_(False)


def _no_extra(error: Exception) -> str:
    return (
        "Expected torch-fidelity >= 0.4 and a torchvision that matches torch for extractor='inception', got "
        f"{type(error).__name__}: {_first_line(error).rstrip('.')}. Install them with: pip install 'lightning-dp[fid]'."
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@lru_cache(maxsize=4)
def _sha256_at(path: Path, size: int, modified_ns: int) -> str:
    """Checksum a large file once per version of it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_sha256(path: Path) -> str:
    status = os.stat(path)
    return _sha256_at(path, status.st_size, status.st_mtime_ns)


_EXTRACTORS: dict[str, Callable[..., FeatureExtractor]] = {
    DigitsFashionCNN.name: lambda *, weights, device: DigitsFashionCNN(device=device),
    Inception.name: Inception,
}
EXTRACTOR_NAMES = tuple(_EXTRACTORS)


def check_extractor(name: str, weights: str | Path | None = None) -> None:
    """Refuse a name that is not in the table, and weights that would be ignored.

    Raises:
        ConfigurationError: With the choices and the nearest match.
    """
    if name not in _EXTRACTORS:
        near = difflib.get_close_matches(name, EXTRACTOR_NAMES, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigurationError(f"Expected an extractor out of {', '.join(EXTRACTOR_NAMES)}, got {name!r}.{hint}")
    if weights is not None and name != Inception.name:
        raise ConfigurationError(
            f"Expected no extractor_weights for extractor={name!r}, which ships with its own, got {weights}. "
            "Leave it out, or choose extractor='inception'."
        )


def load_extractor(
    name: str = DEFAULT_EXTRACTOR, *, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """Return the extractor of that name.

    Args:
        name: One of `EXTRACTOR_NAMES`.
        weights: A weights file, for `inception` only.
        device: Where it runs.

    Returns: The frozen extractor.

    Raises:
        ConfigurationError: Unknown name, missing extra, or missing or altered weights.
    """
    check_extractor(name, weights)
    return _EXTRACTORS[name](weights=weights, device=device)

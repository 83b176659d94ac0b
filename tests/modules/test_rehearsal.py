"""What a run would stumble over at its first step is said before its ledger is opened and a record is read."""

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.failing_layer import FailingLayer
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.no_privacy import NoPrivacy
from lightning_dp.modules.dpsgd import DPSGDClassifier
from lightning_dp.networks.classifier import Classifier
from lightning_dp.networks.scattering import ScatteringClassifier
from tests.conftest import TinyData, callbacks_for, trainer_for

PRIVACY = {"neighboring_relation": "add_or_remove_one", "target_epsilon": None, "noise_multiplier": 8.0}


class Around(Classifier):
    """A classifier around any network of a user."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.image_shape, self.num_classes = body, (1, 8, 8), 2

    def forward(self, images):
        return self.body(images)


class Recurrent(nn.Module):
    """Reads an image line by line."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.head = nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, images):
        return self.head(self.memory(images.squeeze(1))[0][:, -1])


class Looking(nn.Sequential):
    """Decides by the values of an image."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), Cap(), nn.Linear(64, 2))


class Cap(nn.Module):
    def forward(self, values):
        return values.clamp(max=float(values.mean()))


class Wordy(nn.Module):
    """Returns what libraries of language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 2)

    def forward(self, images):
        return SimpleNamespace(logits=self.head(images.flatten(1)))


class ByHand(nn.Module):
    """Uses parameters of its own, in no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.offset = nn.Parameter(torch.randn(64, 2) / 8), nn.Parameter(torch.zeros(2))

    def forward(self, images):
        return images.flatten(1) @ self.slope + self.offset


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 2))


def classifier(network, **options) -> DPSGDClassifier:
    return DPSGDClassifier(network, **{"expected_batch_size": 10, "learning_rate": 0.5, **options})


def train(tmp_path, module, data=None, mechanism=None, **given):
    own = callbacks_for(mechanism or Gaussian(max_grad_norm=1.0), ledger_path=tmp_path / "ledger.jsonl", **PRIVACY)
    trainer_for(tmp_path, own, 2).fit(module, **(given or {"datamodule": data or TinyData()}))
    return own[1]


FAILING = {
    "looks at values": (Looking, ["at body.1 (Cap) of Around: ", "torch.func.vmap knows"]),
    "random": (
        lambda: nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 2)),
        ["at body.1 (Dropout) of Around: it draws random numbers", "leave it out"],
    ),
    "no logits": (Wordy, ["of the loss of Around: object of type 'types.SimpleNamespace' has no len"]),
    "sizes": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(63, 2)), ["at body.1 (Linear) of Around: "]),
}


@pytest.mark.parametrize(("make", "words"), FAILING.values(), ids=FAILING)
@pytest.mark.parametrize("gradients", ["auto", "functorch"])
def test_the_layer_is_named_and_nothing_is_released(tmp_path, make, words, gradients):
    with pytest.raises(ConfigurationError) as error:
        train(tmp_path, classifier(Around(make()), gradients=gradients))
    for word in words:
        assert word in str(error.value)
    assert "Nothing was released." in str(error.value)
    assert not (tmp_path / "ledger.jsonl").exists()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "make", [ByHand, Recurrent, lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 2), nn.ReLU(inplace=True))]
)
def test_what_is_unusual_trains(tmp_path, make):
    assert "PROVED" in train(tmp_path, classifier(Around(make()))).claim().statement()


def test_a_lack_of_memory_is_told_elsewhere():
    network = perceptron()
    with pytest.raises(RuntimeError, match="can't allocate memory"), FailingLayer(network):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in network.modules())


@pytest.mark.parametrize("keep_features", [False, True])
def test_it_reads_no_record(keep_features):
    network = ScatteringClassifier((1, 8, 8), 2) if keep_features else Around(perceptron())
    module = classifier(network, keep_features=keep_features)
    module.describe_data(TinyData())
    module.rehearse()  # without a trainer, who knows the data


def test_networks_that_cannot_be_published_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"got Sequential. Derive a class of your own from Classifier"):
        train(tmp_path, classifier(perceptron()))


class OwnLoader(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.rand(40, 1, 8, 8), torch.arange(40) % 2), batch_size=8, shuffle=True)


def test_batches_of_a_loader_are_refused(tmp_path):
    """They are no Poisson samples, so an accountant of those would state too little."""
    with pytest.raises(ConfigurationError, match=r"got OwnLoader\. Batches of a loader are not the Poisson samples"):
        train(tmp_path, classifier(Around(perceptron())), data=OwnLoader())
    with pytest.raises(ConfigurationError, match="Pass the data as a datamodule"):
        train(tmp_path, classifier(Around(perceptron())), train_dataloaders=OwnLoader().train_dataloader())


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("gradients", ["ghost", "functorch"])
def test_compiled_networks_train_as_they_are_written(tmp_path, gradients):
    plain, compiled = perceptron(), torch.compile(perceptron(), backend="eager")
    for number, network in enumerate((plain, compiled)):
        module = classifier(Around(network), gradients=gradients, expected_batch_size=40)
        train(tmp_path / str(number), module, mechanism=NoPrivacy())
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_module_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"got torch\.compile of DPSGDClassifier"):
        train(tmp_path, torch.compile(classifier(Around(perceptron())), backend="eager"))

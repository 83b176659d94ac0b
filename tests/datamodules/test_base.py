"""What base.py promises: public sizes before reading, records in memory once, a loader of step numbers only."""

import pickle
import warnings

import pytest
import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentParser
from torch import nn

import datamodules
from datamodules.base import ImageDataModule, ImageSplits, StepTicks
from datamodules.catalogue import DatasetFacts
from lightning_dp.errors import ConfigurationError, DataError

FACTS = DatasetFacts(name="Toy", num_train=12, num_test=4, image_shape=(1, 2, 2), num_classes=3)


def toy_splits(**changed) -> ImageSplits:
    parts = {
        "train_images": torch.arange(48, dtype=torch.uint8).reshape(12, 1, 2, 2),
        "train_labels": torch.arange(12) % 3,
        "test_images": torch.zeros(4, 1, 2, 2, dtype=torch.uint8),
        "test_labels": torch.arange(4) % 3,
    }
    return ImageSplits(**{**parts, **changed})


class Toy(ImageDataModule):
    facts = FACTS
    splits_to_read = toy_splits()
    reads = 0

    def read(self):
        self.reads += 1
        return self.splits_to_read


class CountTicks(pl.LightningModule):
    """Records the ticks it is given; one optimiser step each."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        assert isinstance(batch, int)
        return self.weight**2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder, max_steps, **more):
    return pl.Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"enable_checkpointing": False, **more},
    )


def test_public_sizes_are_known_before_reading():
    module = Toy(num_train=5)
    assert (module.num_records, module.num_classes, module.image_shape, module.name) == (5, 3, (1, 2, 2), "Toy")
    assert module.reads == 0
    with pytest.raises(RuntimeError, match=r"Expected Toy\.setup\(\) before"):
        _ = module.train_images


def test_setup_reads_once_for_all_stages():
    module = Toy()
    for stage in ("fit", "test", None):
        module.setup(stage)
    assert module.reads == 1
    assert module.train_images is Toy.splits_to_read.train_images


def test_fingerprint_tells_public_facts_and_no_record(monkeypatch):
    """A hash of the records would let whoever knows all but one of them test guesses of that one."""
    before = Toy().fingerprint
    pixels = toy_splits().train_images.clone()
    pixels[3, 0, 1, 1] += 1
    monkeypatch.setattr(Toy, "splits_to_read", toy_splits(train_images=pixels))
    module = Toy()
    module.setup()
    assert module.fingerprint == before
    assert Toy(num_train=5).fingerprint != before
    monkeypatch.setattr(Toy, "published_checksums", ("0123",))
    assert Toy().fingerprint != before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_images": torch.zeros(12, 1, 2, 2)}, "Expected uint8 images .* got torch.float32"),
        ({"train_images": torch.zeros(12, 2, 2, dtype=torch.uint8)}, r"train split of Toy, got .*\(12, 2, 2\)"),
        ({"train_images": torch.zeros(11, 1, 2, 2, dtype=torch.uint8)}, r"got .*\(11, 1, 2, 2\)"),
        ({"train_labels": torch.zeros(11, dtype=torch.int64)}, r"Expected int64 labels of shape=\(12,\)"),
        ({"test_labels": torch.zeros(4)}, "test split of Toy, got torch.float32"),
        ({"train_labels": torch.arange(12)}, r"Expected labels 0\.\.2 in the train split of Toy, got others\."),
        ({"test_labels": torch.arange(4) - 1}, r"Expected labels 0\.\.2 in the test split of Toy, got others\."),
    ],
)
def test_records_must_agree_with_the_facts(monkeypatch, changed, message):
    monkeypatch.setattr(Toy, "splits_to_read", toy_splits(**changed))
    with pytest.raises(DataError, match=message):
        Toy().setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train": 0}, "got num_train=0"),
        ({"num_train": 13}, r"num_train <= 12 \(records in Toy\), got num_train=13"),
        ({"steps_per_epoch": 0}, "got steps_per_epoch=0"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        Toy(**arguments)


def test_pickle_keeps_the_records():
    module = Toy(num_train=6, steps_per_epoch=7)
    module.setup()
    copy = pickle.loads(pickle.dumps(module))
    assert torch.equal(copy.train_images, module.train_images)
    assert (copy.fingerprint, len(copy.train_dataloader())) == (module.fingerprint, 7)


def test_ticks_are_step_numbers():
    ticks = StepTicks(3)
    assert (len(ticks), list(ticks), list(ticks)) == (3, [0, 1, 2], [0, 1, 2])


def test_trainer_sees_ticks_and_says_nothing_about_workers(tmp_path):
    model, module = CountTicks(), Toy(steps_per_epoch=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, 6).fit(model, datamodule=module)
    assert model.seen == [0, 1, 2, 3, 0, 1]
    assert not [w for w in caught if "worker" in str(w.message) or "dataloader" in str(w.message)]


class SaveEveryStep(pl.Callback):
    """Leaves step_N.ckpt after every step, as a run that is killed later would."""

    def on_train_batch_end(self, trainer, *args):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/step_{trainer.global_step}.ckpt")


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_resume_goes_on_at_the_next_tick(tmp_path, stop):
    trainer(tmp_path, 7, callbacks=[SaveEveryStep()]).fit(CountTicks(), datamodule=Toy(steps_per_epoch=4))
    resumed, run = CountTicks(), trainer(tmp_path, 10)
    run.fit(resumed, datamodule=Toy(steps_per_epoch=4), ckpt_path=tmp_path / f"step_{stop}.ckpt")
    assert run.global_step == 10
    assert resumed.seen == [step % 4 for step in range(stop, 10)]


def test_constructor_arguments_are_flags():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    for name in ("MNIST", "FashionMNIST", "EmbeddedDigits"):
        getattr(datamodules, name)  # the command line finds short names among imported classes
    config = parser.parse_args(["--data", "MNIST", "--data.root", "/d", "--data.num_train", "600"])
    module = parser.instantiate(config).data
    assert (module.name, module.root, module.num_records, module.steps_per_epoch) == ("MNIST", "/d", 600, 100)
    assert config.data.class_path == "datamodules.MNIST"
    embedded = parser.instantiate(parser.parse_args(["--data=EmbeddedDigits", "--data.steps_per_epoch=9"])).data
    assert (embedded.name, embedded.steps_per_epoch) == ("EmbeddedDigits", 9)


def test_every_listed_name_exists():
    for name in datamodules.__all__:
        assert getattr(datamodules, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = datamodules.Nothing

"""The release folder holds the generator's parameters and its public description, and nothing of the private side."""

import io
import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from safetensors import safe_open

from datamodules import EmbeddedDigits
from lightning_dp.cli import main
from lightning_dp.cli.run_dirs import make_run_dir
from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.noise import NoiseSource
from lightning_dp.modules.published import load_generator, save_released
from tests.cli.runs import TINY
from tests.conftest import tiny_generator

WINDOW = 64  # bytes; too many to agree by chance

WITH_TRAINED_TEACHERS = (
    *("--model.teachers", "DiscriminatorTeachers", "--model.teachers.network", "mlp"),
    *("--model.teachers.num_teachers", "4", "--model.teachers.batch_size", "5"),
    *("--model.repulsion", "0", "--model.ema_decay", "0.5", "--trainer.max_steps", "3", "--evaluate", "false"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose teachers have parameters and optimizer states, and the noise secrets it used."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    secrets = []
    draw = NoiseSource.whole

    def spying(self, *args, **options):
        secrets.append(self.export_secret())
        return draw(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoiseSource, "whole", spying)
        flags = ["fit", "--config", str(TINY), "--run_dir", str(folder), *WITH_TRAINED_TEACHERS]
        assert main(flags) == 0
    return folder, set(secrets)


@pytest.fixture(scope="module")
def private_bytes(trained):
    """Byte windows of everything private: images, labels, teachers, optimizer states, random states, noise secrets."""
    folder, secrets = trained
    checkpoint = torch.load(folder / "private" / "last.ckpt", weights_only=True, map_location="cpu")
    data = EmbeddedDigits(num_train=200)
    data.setup()
    states = [*tensors(checkpoint["teachers"]), *tensors(checkpoint["optimizer_states"])]
    assert len(states) > 10
    images, labels = data.train_images, data.train_labels
    arrays = [images, images.float() / 255, labels, labels.to(torch.uint8), torch.get_rng_state(), *states]
    return [*(w for array in arrays for w in windows(array)), *secrets]


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors(inner)


def windows(tensor):
    """Cut a tensor's bytes into windows, those left out that hold hardly anything (a black margin)."""
    data = tensor.detach().contiguous().numpy().tobytes()
    for start in range(0, max(1, len(data) - WINDOW + 1), WINDOW):
        part = data[start : start + WINDOW]
        if len(part) == WINDOW and len(set(part)) > 8:
            yield part


def found(folder, private):
    """Return the files that hold a private window."""
    contents = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return sorted({name for name, data in contents.items() if any(window in data for window in private)})


def all_keys(value):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from all_keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from all_keys(inner)


class TestContents:
    def test_two_files(self, trained):
        names = {path.name for path in (trained[0] / "release").iterdir()}
        assert names == {"generator.json", "generator.safetensors"}

    def test_keys_are_exactly_the_generators_parameters(self, trained):
        generator, _ = load_generator(trained[0])
        with safe_open(trained[0] / "release" / "generator.safetensors", "pt") as file:
            assert file.metadata() in (None, {})
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        expected = {name: tuple(p.shape) for name, p in generator.named_parameters()}
        assert {name: tuple(value.shape) for name, value in stored.items()} == expected
        assert {value.dtype for value in stored.values()} == {torch.float32}

    def test_the_weights_file_has_no_room_for_more(self, trained):
        """Header and parameters fill the file to the byte, so nothing hides behind them."""
        data = (trained[0] / "release" / "generator.safetensors").read_bytes()
        header = int.from_bytes(data[:8], "little")
        generator, _ = load_generator(trained[0])
        assert len(data) == 8 + header + 4 * sum(p.numel() for p in generator.parameters())

    def test_the_description_holds_public_keys_only(self, trained):
        facts = json.loads((trained[0] / "release" / "generator.json").read_text())
        assert set(facts) == {"format", "class", "options", "claim"}
        for word in ("teacher", "optimizer", "rng", "seed", "raw", "state_dict", "secret", "ledger", "loss"):
            assert not [key for key in all_keys(facts) if word in key.lower()]

    def test_it_is_the_moving_average_that_is_released(self, trained):
        generator, _ = load_generator(trained[0])
        state = torch.load(trained[0] / "private" / "last.ckpt", weights_only=True)["state_dict"]
        for name, value in generator.named_parameters():
            assert torch.equal(value, state[f"average.network.{name}"])


class TestScan:
    def test_nothing_private_is_in_the_release_folder(self, trained, private_bytes):
        assert len(private_bytes) > 1000
        assert found(trained[0] / "release", private_bytes) == []

    def test_the_scan_finds_what_is_planted(self, trained, private_bytes, tmp_path):
        """The broken twins: a teacher, an optimizer state, an image, or labels in a file of the folder."""
        checkpoint = torch.load(trained[0] / "private" / "last.ckpt", weights_only=True)
        data = EmbeddedDigits(num_train=200)
        data.setup()
        planted = {
            "teacher": next(t for t in tensors(checkpoint["teachers"]) if t.numel() > 100).numpy().tobytes(),
            "optimizer": next(t for t in tensors(checkpoint["optimizer_states"]) if t.numel() > 100).numpy().tobytes(),
            "image": data.train_images[7].numpy().tobytes(),
            "labels": data.train_labels.numpy().tobytes(),
        }
        for name, content in planted.items():
            folder = shutil.copytree(trained[0] / "release", tmp_path / name)
            with (folder / "generator.safetensors").open("ab") as file:
                file.write(b"\0" * 3 + content)
            assert found(folder, private_bytes) == ["generator.safetensors"], name

    def test_a_buffer_is_refused_when_it_is_saved(self, tmp_path):
        generator = tiny_generator()
        generator.register_buffer("running_mean", torch.zeros(3))
        with pytest.raises(ConfigurationError, match="running_mean"):
            save_released(tmp_path / "release", generator, {})
        assert not (tmp_path / "release").exists()

    def test_the_private_checkpoint_is_needed_to_resume(self, trained):
        checkpoint = torch.load(trained[0] / "private" / "last.ckpt", weights_only=True)
        assert list(tensors(checkpoint["teachers"]))
        assert checkpoint["round"] == 3
        assert checkpoint["callbacks"]["PrivacyAccountant"]["ledger"]["runs"][0]["count"] == 3

    def test_the_noise_secret_is_in_no_file(self, trained):
        folder, secrets = trained
        assert secrets
        for path in folder.rglob("*"):
            if not path.is_file():
                continue
            data = path.read_bytes()
            if zipfile.is_zipfile(io.BytesIO(data)):
                with zipfile.ZipFile(io.BytesIO(data)) as archive:
                    data += b"".join(archive.read(name) for name in archive.namelist())
            for secret in secrets:
                assert secret not in data, path
                assert secret.hex().encode() not in data, path


def test_samples_come_from_the_copied_folder_alone(cli, trained, tmp_path):
    shutil.copytree(trained[0] / "release", tmp_path / "elsewhere")
    flags = ("--num", "20", "--seed", "5", "--out")
    assert cli("sample", trained[0], *flags, tmp_path / "here.npz").code == 0
    assert cli("sample", tmp_path / "elsewhere", *flags, tmp_path / "there.npz").code == 0
    here, there = np.load(tmp_path / "here.npz"), np.load(tmp_path / "there.npz")
    assert (here["images"] == there["images"]).all()
    assert here["images"].std() > 0


def test_only_the_owner_enters_the_private_folder(finished_run):
    assert (finished_run / "private").stat().st_mode & 0o777 == 0o700


def test_a_private_folder_that_was_open_is_shut(tmp_path):
    (tmp_path / "run" / "private").mkdir(parents=True, mode=0o755)
    make_run_dir(tmp_path / "run")
    assert (tmp_path / "run" / "private").stat().st_mode & 0o777 == 0o700


def test_whoever_reads_the_claim_reads_the_weights(finished_run):
    """The release is public: its two files have the permissions of any new file."""
    facts, weights = (finished_run / "release" / f"generator.{kind}" for kind in ("json", "safetensors"))
    plain = finished_run / "claim.json"
    assert weights.stat().st_mode == facts.stat().st_mode == plain.stat().st_mode

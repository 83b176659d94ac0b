"""A stranger's mistakes: each ends in one line that names the way out, with exit code 2, before anything is written."""

import math

import pytest
import yaml

from datamodules import EmbeddedDigits
from lightning_dp.mechanisms.base import Mechanism
from tests.cli.runs import TINY, changed


class Unfinished(Mechanism):
    """A mechanism whose author was called away."""

    kinds = frozenset({"teacher"})

    def row_bound(self, spec):
        return 1.0

    def encode(self, rows, spec, context):
        return 0 * rows


class Untyped(Unfinished):
    """A mechanism with an option of no type."""

    def __init__(self, limit):
        self.limit = limit

    def decode(self, noisy, plan, release_number, public_seed):
        return noisy


MISTAKES = {
    # names
    "mechanism": (["--mechanism", "TopAg"], ["choose from", "NoPrivacy", "Did you mean TopAgg?"]),
    "mechanism=": (["--mechanism=gausian"], ["choose from", "NoPrivacy", "Did you mean Gaussian?"]),
    "mechanism.class_path": (["--mechanism.class_path", "TopAg"], ["choose from", "Gaussian", "Did you mean TopAgg?"]),
    "mechanism by path": (["--mechanism", "lightning_dp.mechanisms.topagg.TopAg"], ["choose from", "mean TopAgg?"]),
    "mechanism null": (["--mechanism", "null"], ["choose from", "Gaussian", "NoPrivacy", "TopAgg"]),
    "mechanism half written": (["--mechanism", f"{__name__}.Unfinished"], ["as --mechanism yet", "implement decode."]),
    "the same by its name": (["--mechanism", "Unfinished"], ["Unfinished cannot be used as", "implement decode."]),
    "mechanism of another kind": (
        ["--mechanism", "EnergyTeachers"],
        ["choose from", "Gaussian", "NoPrivacy", "TopAgg"],
    ),
    "warm start": (
        ["--warm_start", "moment"],
        ["from moments, semi_dual, ", "MomentsWarmStart", "Did you mean moments?"],
    ),
    "mechanism with an option without a type": (
        ["--mechanism", f"{__name__}.Untyped"],
        ["Untyped cannot be used as --mechanism yet: give its option 'limit' a type hint"],
    ),
    "model": (["--model", "TeacherEnsembleGA"], ["TeacherEnsembleGAN", "Did you mean TeacherEnsembleGAN?"]),
    "data": (["--data", "EmbededDigits"], ["EmbeddedDigits", "FashionMNIST", "Did you mean EmbeddedDigits?"]),
    "teachers": (["--model.teachers", "EnergyTeacher"], ["--model.teachers", "Did you mean EnergyTeachers?"]),
    "generator": (["--model.generator", "DCTGenerato"], ["MLPGenerator", "Did you mean DCTGenerator?"]),
    "basis": (["--model.basis", "LowFreqDCT"], ["Did you mean LowFrequencyDCT?"]),
    # options and flags
    "option": (["--mechanism.top_kk", "3"], ["'top_kk' of TopAgg", "rotate", "Did you mean top_k?"]),
    "option of another mechanism": (
        ["--mechanism", "Gaussian", "--mechanism.top_k", "3"],
        ["of Gaussian", "max_grad_"],
    ),
    "nested option": (["--model.generator.widht", "3"], ["of DCTGenerator", "Did you mean width?"]),
    "flag": (["--mechanizm", "TopAgg"], ["Unknown flag --mechanizm", "Did you mean --mechanism?"]),
    "flag of a group": (["--privacy.epsilon", "3"], ["Did you mean --privacy.target_epsilon?"]),
    "the way of gradients": (["--privacy.gradients", "ghost"], ["Did you mean --model.gradients?"]),
    "a physical batch": (["--privacy.max_physical_batch=64"], ["Did you mean --model.chunk_size?"]),
    "shortened flag": (["--privacy.target_eps", "3"], ["Unknown flag", "Did you mean --privacy.target_epsilon?"]),
    "help of nothing": (["--mechanism.help", "TopAg"], ["Unknown --mechanism 'TopAg'", "Did you mean TopAgg?"]),
    "flag without its group": (["--epsilon", "3"], ["mean --privacy.target_epsilon or --dataset_budget.epsilon?"]),
    "flag of a method": (["--batch_size", "3"], ["Unknown flag --batch_size", "--model.NAME", "--model.help"]),
    "seed, which never means known noise": (["--seed", "3"], ["Did you mean --seed_everything?"]),
    "two mechanisms": (
        ["--mechanism", "TopAgg", "--mechanism", "Gaussian"],
        ["twice, as TopAgg and as Gaussian"],
    ),
    "two budgets": (["--privacy.target_epsilon", "1", "--privacy.target_epsilon=9"], ["given twice, as 1 and as 9"]),
    "no value": (["--privacy.target_delta", "-1e-5"], ["value after --privacy.target_delta", "target_delta=VALUE"]),
    "unlike any flag": (["--xyzzy", "3"], ["Unknown flag --xyzzy", "--help"]),
    "stray word": (["TopAgg"], ["Unexpected argument 'TopAgg'", "--config"]),
    "optimizer": (["--optimizer", "SGD"], ["Unknown flag --optimizer"]),
    # values
    "epsilon -1": (["--privacy.target_epsilon", "-1"], ["target_epsilon > 0", "got target_epsilon=-1.0"]),
    "epsilon 0": (["--privacy.target_epsilon", "0"], ["target_epsilon > 0"]),
    "epsilon nan": (["--privacy.target_epsilon", "nan"], ["privacy.target_epsilon", "finite number", "got nan"]),
    "epsilon .nan": (["--privacy.target_epsilon", ".nan"], ["finite privacy.target_epsilon > 0", "nan"]),
    "epsilon inf": (["--privacy.target_epsilon", ".inf"], ["finite privacy.target_epsilon", "inf"]),
    "epsilon in words": (["--privacy.target_epsilon", "ten"], ["privacy.target_epsilon", "finite number", "got ten"]),
    "delta 0": (["--privacy.target_delta", "0"], ["0 < privacy.target_delta < 1", "got target_delta=0"]),
    "delta 1": (["--privacy.target_delta", "1"], ["0 < privacy.target_delta < 1", "got target_delta=1"]),
    "delta nan": (["--privacy.target_delta", "nan"], ["privacy.target_delta", "finite number"]),
    "delta .nan": (["--privacy.target_delta", ".nan"], ["0 < privacy.target_delta < 1", "nan"]),
    "noise -1": (["--privacy.noise_multiplier", "-1"], ["noise_multiplier > 0", "NoPrivacy for a run without noise"]),
    "noise 0": (["--privacy.noise_multiplier", "0"], ["noise_multiplier > 0", "NoPrivacy for a run without noise"]),
    "noise nan": (["--privacy.noise_multiplier", "nan"], ["privacy.noise_multiplier", "finite number", "got nan"]),
    "noise .nan": (["--privacy.noise_multiplier", ".nan"], ["finite privacy.noise_multiplier", "nan"]),
    "whole number": (["--trainer.max_steps", "many"], ["trainer.max_steps", "whole number", "got many"]),
    "not null": (["--model.learning_rate", "nan"], ["model.learning_rate to be a finite number, got nan"]),
    "or null": (["--mechanism.top_k", "x"], ["mechanism.top_k to be a whole number or null, got x"]),
    "betas": (["--model.betas", "[2,3]"], ["model.betas to be two numbers in [0, 1)", "betas=[2.0, 3.0]"]),
    "one beta": (["--model.betas", "[0.9]"], ["model.betas to be a list of 2, got [0.9]"]),
    "betas in words": (["--model.betas", "many"], ["model.betas to be a list, got many"]),
    "choice": (["--model.partition", "hsah"], ["model.partition", "permutation, hash", "Did you mean hash?"]),
    "unknown relation": (["--privacy.neighboring_relation", "replace_two"], ["add_or_remove_one, replace_one"]),
    "relation without a proof": (
        ["--privacy.neighboring_relation", "add_or_remove_one"],
        ["no proof", "replace_one, replace_special", "stable record ids", "batch size"],
    ),
    "class-wise batch": (["--model.images_per_step", "25"], ["multiple of the 10 classes", "images_per_step=25"]),
    "records": (["--data.num_train", "4001"], ["num_train <= 4000", "num_train=4001"]),
    "teachers beyond records": (["--model.teachers.num_teachers", "201"], ["num_records=200", "fewer teachers"]),
    "classifier": (["--evaluation.classifiers", "[svm]"], ["logistic, mlp, cnn", "got svm"]),
    "extractor": (["--evaluation.extractor", "inceptio"], ["Did you mean 'inception'?"]),
    "extractor not at hand": (
        ["--evaluation.extractor", "inception", "--evaluation.extractor_weights", "nowhere.pth"],
        ["Inception weights", "no file at nowhere.pth"],
    ),
    "checkpoint_every": (["--checkpoint_every", "0"], ["checkpoint_every >= 1"]),
    "evaluate_every": (["--evaluate_every", "0"], ["evaluate_every >= 1", "evaluate_every=0"]),
    # settings that fight each other
    "noise beyond the budget": (
        ["--privacy.noise_multiplier", "50", "--trainer.max_steps", "100000"],
        ["Contradictory settings", "allows 3142 releases", "max_steps=100000", "Drop one of the three"],
    ),
    "noise too small": (["--privacy.noise_multiplier", "0.01"], ["too small", "Raise the noise or the target"]),
    "nothing given": (["--privacy.target_epsilon", "null"], ["--privacy.target_epsilon or --privacy.noise_multiplier"]),
    "no length": (["--trainer.max_steps", "-1"], ["add --trainer.max_steps", "--privacy.noise_multiplier"]),
    "epochs": (["--trainer.max_epochs", "3"], ["--trainer.max_steps"]),
    "no steps": (["--trainer.max_steps", "0"], ["trainer.max_steps >= 1", "got 0"]),
    "noise without a bound": (
        ["--privacy.noise_multiplier", "1e-200", "--privacy.target_epsilon", "null"],
        ["noise_multiplier=1e-200", "no finite epsilon"],
    ),
    "min_steps": (["--trainer.min_steps", "30"], ["--trainer.max_steps"]),
    # what would spoil the guarantee, or be ignored
    "gradient clipping": (["--trainer.gradient_clip_val", "1"], ["gradient_clip_val=1", "leave it out"]),
    "accumulation": (["--trainer.accumulate_grad_batches", "2"], ["accumulate_grad_batches=2", "set it to 1"]),
    "averaged gradients": (
        ["--trainer.devices", "2", "--trainer.strategy", "ddp"],
        ["trainer.strategy=private_ddp", "got DDPStrategy", "averages"],
    ),
    "batch statistics of all processes": (
        ["--trainer.devices", "2", "--trainer.sync_batchnorm", "true"],
        ["trainer.sync_batchnorm", "Leave it out"],
    ),
    "double precision": (["--trainer.precision", "64-true"], ["trainer.precision 32-true or bf16-mixed"]),
    "no checkpoints": (["--trainer.enable_checkpointing", "false"], ["no way to resume", "--checkpoint_every"]),
    "barebones": (["--trainer.barebones", "true"], ["no way to resume"]),
    "seed": (["--seed_everything", "-1"], ["0 <= seed_everything < 2**32", "-1"]),
    "option of a callback": (
        ["--trainer.callbacks", "{class_path: callbacks.SampleGrid, init_args: {path: x, per_class: 0}}"],
        ["per_class"],
    ),
    "another checkpoint": (
        ["--trainer.callbacks", "{class_path: ModelCheckpoint, init_args: {dirpath: x, every_n_train_steps: 1}}"],
        ["ModelCheckpoint", "outside private/", "private/last.ckpt"],
    ),
    "raw numbers online": (["--telemetry.raw", "true", "--wandb", "online"], ["without noise", "--wandb offline"]),
    "logger": (["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "x"], ["trainer.logger", "leave it out"]),
    "accelerator": (["--trainer.accelerator", "gpux"], ["gpux", "cpu"]),
    "no device": (["--trainer.devices", "0"], ["--trainer.devices", "cpu and 1"]),
    # networks of other sizes than the data
    "generator of another size": (
        ["--model.generator.image_shape", "[3,32,32]"],
        ["model.generator is for images (3, 32, 32)", "--model.generator.image_shape '[1, 28, 28]'"],
    ),
    "basis of another size": (
        ["--model.basis.image_shape", "[1,32,32]"],
        ["model.basis is for images (1, 32, 32)", "--model.basis.image_shape '[1, 28, 28]'"],
    ),
    "two networks of another size": (
        ["--model.generator.image_shape", "[3,32,32]", "--model.basis.image_shape", "[1,32,32]"],
        ["--model.generator.image_shape '[1, 28, 28]' --model.basis.image_shape '[1, 28, 28]'"],
    ),
    # what would not fit the memory
    "images": (["--model.images_per_step", "1000000000"], ["GB", "for model.images_per_step=1000000000. Lower that"]),
    "pool": (["--model.pool_per_class", "1000000000000"], ["GB", "for model.pool_per_class=1000000000000"]),
    # what Lightning would replace in silence
    "half precision": (["--trainer.precision", "16-mixed"], ["32-true or bf16-mixed", "precision=16-mixed"]),
    # resuming
    "nothing to resume": (["--ckpt_path", "last"], ["found no ledger", "--run_dir"]),
    "no such checkpoint": (["--ckpt_path", "nowhere.ckpt"], ["--ckpt_path nowhere.ckpt"]),
    "no checkpoint": (["--ckpt_path", str(TINY)], ["checkpoint of a run (RUN/private/last.ckpt)", "tiny.yaml"]),
}


@pytest.mark.parametrize(("flags", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_on_the_command_line(fit, tmp_path, monkeypatch, flags, words):
    def read(self):
        raise AssertionError("records were read before the mistake was found")

    monkeypatch.setattr(EmbeddedDigits, "read", read)
    line = fit(*flags).error()
    for word in words:
        assert word in line
    assert not (tmp_path / "run").exists()


IN_THE_FILE = {
    "mechanism misspelt": ("mechanism/class_path", "TopAg", ["choose from", "Gaussian", "mean TopAgg?"]),
    "mechanism misspelt, short": ("mechanism", "NoPrivaci", ["choose from", "Gaussian", "Did you mean NoPrivacy?"]),
    "mechanism missing": ("mechanism", ..., ["Missing: mechanism (", "NoPrivacy", "TopAgg", "--mechanism"]),
    "mechanism null": ("mechanism", None, ["Missing: mechanism (", "Gaussian", "NoPrivacy"]),
    "mechanism under another key": ("mechanizm", {"class_path": "TopAgg"}, ["'mechanizm", "Did you mean mechanism?"]),
    "mechanism's option beside init_args": ("mechanism/top_k", 3, ["mechanism", "class_path", "init_args"]),
    "mechanism's option": ("mechanism/init_args/topk", 3, ["'topk' of TopAgg", "Did you mean top_k?"]),
    "model misspelt": ("model/class_path", "TeacherGAN", ["choose from", "Did you mean TeacherEnsembleGAN?"]),
    "model missing": ("model", ..., ["Missing: model", "TeacherEnsembleGAN"]),
    "data misspelt": ("data/class_path", "MNISST", ["EmbeddedDigits", "FashionMNIST", "Did you mean MNIST?"]),
    "nested option": ("model/init_args/teachers/init_args", {"num_teacher": 3}, ["Did you mean num_teachers?"]),
    "teachers missing": ("model/init_args/teachers", ..., ["Missing: model.teachers"]),
    "relation missing": ("privacy/neighboring_relation", ..., ["Missing: privacy.neighboring_relation"]),
    "privacy option": ("privacy/epsilon", 3, ["privacy.epsilon", "Did you mean target_epsilon?"]),
    "trainer option": ("trainer/max_step", 3, ["trainer.max_step", "Did you mean max_steps?"]),
    "epsilon NaN": ("privacy/target_epsilon", math.nan, ["finite privacy.target_epsilon", "nan"]),
    "epsilon in words": ("privacy/target_epsilon", "ten", ["privacy.target_epsilon", "finite number", "ten"]),
    "noise NaN": ("privacy/noise_multiplier", math.nan, ["finite privacy.noise_multiplier", "nan"]),
    "delta NaN": ("privacy/target_delta", math.nan, ["0 < privacy.target_delta < 1", "nan"]),
    "top_k in words": ("mechanism/init_args/top_k", "all", ["mechanism.top_k", "whole number", "all"]),
    "top_k beyond the vector": ("mechanism/init_args/top_k", 17, ["mechanism.top_k <= 16", "top_k=17"]),
}


@pytest.mark.parametrize(("path", "value", "words"), IN_THE_FILE.values(), ids=IN_THE_FILE)
def test_a_mistake_in_the_configuration(cli, tmp_path, path, value, words):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(changed(path, value)))
    line = cli("fit", "--config", file, "--run_dir", tmp_path / "run").error()
    for word in words:
        assert word in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1,\nb: }", ["no valid YAML", "line 2"]),
        (b"- 1\n- 2\n", ["'key: value' lines"]),
        (b"", ["'key: value' lines", "empty"]),
        (b"\xff\xfe\x00", ["no text file"]),
    ],
    ids=["broken", "list", "empty", "binary"],
)
def test_a_configuration_that_is_none(cli, tmp_path, content, words):
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    line = cli("fit", "--config", file).error()
    for word in words:
        assert word in line


@pytest.mark.parametrize("path", ["mechanism", "privacy", "mechanism/init_args"])
def test_a_setting_given_twice_is_refused(cli, tmp_path, path):
    """YAML would keep the last one and drop the other without a word."""
    file, last, lines = tmp_path / "config.yaml", path.rpartition("/")[2], TINY.read_text().splitlines()
    if path == "mechanism":
        lines.insert(lines.index("mechanism:"), "mechanism: NoPrivacy")
    elif path == "privacy":
        lines += ["privacy:", "  neighboring_relation: replace_one", "  target_epsilon: 100"]
    else:
        lines.insert(lines.index("mechanism:") + 1, "  init_args: {top_k: 2}")
    file.write_text("\n".join(lines))
    for flag in (["--config", file], [f"--config={file}"], ["-c", file]):
        line = cli("fit", *flag).error()
        assert f"'{last}' twice" in line
        assert "config.yaml, line" in line


def test_an_empty_setting_of_any_name_is_refused(cli, tmp_path):
    """The parser drops it without a word, so a misspelt one would pass."""
    file = tmp_path / "config.yaml"
    file.write_text(TINY.read_text().replace("evaluation:\n", "evaluation:\n  num_sampels: {}\n"))
    assert "under 'num_sampels', got none" in cli("fit", "--config", file).error()


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("trainer", 3, "'key: value' lines under trainer, got 3"),
        ("evaluation", None, "'key: value' lines under evaluation"),
        ("privacy/target_delta", None, "Expected privacy.target_delta to have a value, got null"),
        ("evaluation/num_samples", None, "Expected evaluation.num_samples to have a value, got null"),
    ],
)
def test_a_file_that_gives_no_value_is_refused(cli, tmp_path, path, value, words):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(changed(path, value)))
    assert words in cli("fit", "--config", file).error()


COMMANDS = {
    "unknown command": (["fitt"], ["choose from fit, sample, evaluate, account, ", "Did you mean fit?"]),
    "fit of nothing": (["fit"], ["Missing", "--config FILE", "configuration"]),
    "no configuration": (["fit", "--config", "nowhere.yaml"], ["nowhere.yaml", "configs/experiment"]),
    "configuration is a folder": (["fit", "--config", "."], ["configuration file", "configs/experiment"]),
    "samples nowhere": (["evaluate", "nowhere.npz", "--data", "EmbeddedDigits"], ["nothing at nowhere.npz"]),
    "samples against nothing": (["evaluate", "x", "--data", "EmbedDigits"], ["Did you mean EmbeddedDigits?"]),
    "sample": (["sample", "."], ["generator.json", "folder of a run"]),
    "sample nowhere": (["sample", "nowhere"], ["nowhere/release/generator.json", "folder of a run"]),
    "sample of nothing": (["sample"], ["Missing: run"]),
    "sample none": (["sample", ".", "--num", "0"], ["--num >= 1"]),
    "sample some": (["sample", ".", "--num", "some"], ["num", "whole number", "got some"]),
    "sample flag": (["sample", ".", "--nmu", "3"], ["Unknown flag --nmu", "Did you mean --num?"]),
    "evaluate": (["evaluate", "."], ["Expected a run folder", "--data NAME"]),
    "evaluate option": (["evaluate", ".", "--evaluation.num_sampels", "3"], ["mean --evaluation.num_samples?"]),
    "account": (["account", "."], ["ledger.jsonl", "folder of a run"]),
    "account nowhere": (["account", "nowhere"], ["nowhere/ledger.jsonl", "folder of a run"]),
    "data": (["data"], ["lightning-dp data fetch NAME"]),
    "data get": (["data", "get", "mnist"], ["lightning-dp data fetch NAME", "'get'"]),
    "data fetch nothing": (["data", "fetch"], ["Missing: name"]),
    "data fetch nmist": (["data", "fetch", "nmist"], ["mnist, fashion", "Did you mean 'mnist'?"]),
}


@pytest.mark.parametrize(("arguments", "words"), COMMANDS.values(), ids=COMMANDS)
def test_a_mistake_in_a_command(cli, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    line = cli(*arguments).error()
    for word in words:
        assert word in line
    assert list(tmp_path.iterdir()) == []


def test_a_short_name_in_a_file_is_told_its_class(cli, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(changed("warm_start", "semi_dual")))
    error = cli("fit", "--config", path, "--run_dir", tmp_path / "run").error()
    assert "got 'semi_dual'; in a file, write class_path: SemiDualWarmStart under it" in error

"""Flags that make a run of any shipped configuration small: for audits that train it many times, and for tests."""

from collections.abc import Mapping
from typing import Any

SMALL_DATA = ("--data", "EmbeddedDigits", "--data.num_train", "100")
"""A hundred embedded digits, which have the shape and the labels of MNIST and Fashion-MNIST."""

_WARM_START = ("--warm_start.samples", "50", "--warm_start.steps", "2", "--warm_start.num_coefficients", "10")
_BY_TRANSPORT = (
    *("--warm_start.releases", "2", "--warm_start.expected_batch_size", "5"),
    *("--warm_start.images_per_class", "2"),
)

_TEACHERS = {
    "EnergyTeachers": ("--model.pool_per_class", "5"),
    "DiscriminatorTeachers": (
        *("--model.teachers.num_teachers", "4", "--model.teachers.batch_size", "5"),
        *("--model.teachers.train_steps", "1", "--model.teachers.pretrain_steps", "1"),
    ),
}
_RECORDS = ("--model.expected_batch_size", "5")
_MODELS = {
    "TeacherEnsembleGAN": ("--model.images_per_step", "10"),
    # Trained so long that one record turns a vote of its teacher.
    "PATEGAN": (
        *("--model.images_per_step", "10"),
        *("--model.teachers.train_steps", "5", "--model.teachers.pretrain_steps", "30"),
    ),
    "DPSGDClassifier": _RECORDS,
    "DPVAE": _RECORDS,
    "DP2VAE": _RECORDS,
    "DPGAN": (*_RECORDS, "--model.generator.width", "8", "--model.critic.width", "8"),
    "DPSinkhorn": (*_RECORDS, "--model.images_per_step", "5"),
    "SemiDualSinkhorn": (*_RECORDS, "--model.images_per_class", "2"),
    "DPMERF": ("--model.num_frequencies", "20", "--model.train_steps", "2"),
}


def smaller_model(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the flags that shrink the model of a configuration; none for a method that is not ours.

    Args:
        config: A configuration of a whole run.
    """
    model = config["model"]
    options = model.get("init_args", {})
    flags: tuple[str, ...] = ()
    teachers = options.get("teachers")
    if teachers is not None:
        flags = _TEACHERS.get(teachers["class_path"].rpartition(".")[2], ())
        if options["generator"]["class_path"] == "GSWGANGenerator":
            flags = (*flags, "--model.generator.width", "8")
        if "teachers_per_round" in teachers.get("init_args", {}):
            flags = (*flags, "--model.teachers.teachers_per_round", "2")
    flags = (*flags, *_MODELS.get(model["class_path"].rpartition(".")[2], ()))
    if (options.get("generator") or {}).get("class_path", "").endswith("ClassGaussianGenerator"):
        flags = (*flags, "--model.generator.num_coefficients", "10")  # as many as a small warm start
    if (options.get("network") or {}).get("class_path") == "WideResNet":
        flags = (*flags, "--model.network.depth", "10", "--model.network.width", "1")
    if options.get("views_per_record", 1) > 1:
        flags = (*flags, "--model.views_per_record", "2")
    if "expected_judges" in options:
        flags = (*flags, "--model.expected_judges", "2")
    last = dict(zip(flags[::2], flags[1::2], strict=True))  # a flag may stand once; the method's counts
    return tuple(part for pair in last.items() for part in pair)


def smaller_warm_start(kind: str) -> tuple[str, ...]:
    """Return the flags of a warm start of a moment.

    Args:
        kind: Its short name, or its class.
    """
    return (*_WARM_START, *(_BY_TRANSPORT if kind.rpartition(".")[2] in ("semi_dual", "SemiDualWarmStart") else ()))


def small_data(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the flags of small data on which every record takes part early: five for each of four trained teachers.

    Args:
        config: A configuration of a whole run.
    """
    teachers = config["model"].get("init_args", {}).get("teachers") or {}
    is_trained = str(teachers.get("class_path", "")).endswith("DiscriminatorTeachers")
    return (*SMALL_DATA[:-1], "20") if is_trained else SMALL_DATA

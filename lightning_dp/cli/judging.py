"""``lightning-dp evaluate FILE --data NAME``: samples that another program made, under the same protocol."""

import json
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lightning_dp.cli.parsing import check_class_names, one_line, parse
from lightning_dp.errors import ConfigurationError


def is_about_files(arguments: list[str]) -> bool:
    """Tell whether samples are to be judged that no run of ours made: a data set is named for them.

    Args:
        arguments: The command line after ``evaluate``.
    """
    return any(argument.partition("=")[0] == "--data" for argument in arguments)


def evaluate_files(arguments: list[str]) -> int:
    """Judge samples of any program, an .npz file or a folder per class, against the test split of a data set.

    Args:
        arguments: The command line after ``evaluate``.
    """
    from rich.console import Console

    from datamodules import ImageDataModule
    from datamodules.own import read_samples
    from lightning_dp.cli import plugins  # noqa: F401  (names of data sets)
    from lightning_dp.evaluation.protocol import EvaluationProtocol, evaluate_samples
    from lightning_dp.evaluation.report import quality_table

    roots: dict[str, type] = {"data": ImageDataModule}
    parser = ArgumentParser(
        prog="lightning-dp evaluate",
        exit_on_error=False,
        allow_abbrev=False,
        description=(evaluate_files.__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("samples", type=str, help="An .npz file with images and labels, or a folder per class.")
    parser.add_subclass_arguments(ImageDataModule, "data", required=True, help="Whose test split they are held to.")
    parser.add_class_arguments(EvaluationProtocol, "evaluation")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    check_class_names(arguments, roots)
    given: Any = parse(parser, arguments)
    data: ImageDataModule = one_line(lambda: parser.instantiate_classes(given), roots).data
    images, labels = read_samples(Path(given.samples), data.image_shape)
    parser.set_defaults({"evaluation.num_samples": min(len(images), given.evaluation.num_samples)})
    options: Any = parse(parser, arguments)
    protocol: EvaluationProtocol = one_line(lambda: parser.instantiate_classes(options), roots).evaluation
    if int(labels.max()) >= data.num_classes:
        raise ConfigurationError(
            f"Expected labels 0..{data.num_classes - 1} in {given.samples}, as in {data.name}, got {int(labels.max())}."
        )
    data.setup("test")
    result = evaluate_samples(images.float() / 255, labels, data.test_images, data.test_labels, protocol)
    if options.json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        Console().print(quality_table(f"{given.samples} against {data.name}", result.to_dict()))
    return 0

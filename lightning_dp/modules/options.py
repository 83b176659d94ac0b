"""Checks of a method's options: each refuses, in one line, what it cannot work with."""

import math
from typing import Protocol

from lightning_dp.errors import ConfigurationError
from lightning_dp.modules.base import PublicFacts


class _SeesImages(Protocol):
    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def num_classes(self) -> int: ...


def check_images(data: PublicFacts, network: _SeesImages, *, who: str, mend: str) -> None:
    """Refuse data whose images a network does not fit.

    Args:
        data: Public facts of the data.
        network: What makes or takes images.
        who: Subject and verb of the error ("The generator makes").
        mend: The options to change.

    Raises:
        ConfigurationError: Shape or number of labels differ.
    """
    if data.image_shape != network.image_shape or data.num_classes != network.num_classes:
        raise ConfigurationError(
            f"{who} images {network.image_shape} of {network.num_classes} classes, but the data are "
            f"{data.image_shape} of {data.num_classes}; change {mend}."
        )


def check_positive(**values: float) -> None:
    """Refuse options of a model that are not finite and positive.

    Raises:
        ConfigurationError: Naming the first one.
    """
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigurationError(f"Expected a finite model.{name} > 0, got {name}={value}.")


def check_share(**values: float) -> None:
    """Refuse options of a model that are not in (0, 1].

    Raises:
        ConfigurationError: Naming the first one.
    """
    for name, value in values.items():
        if not 0 < value <= 1:
            raise ConfigurationError(f"Expected 0 < model.{name} <= 1, got {name}={value}.")


def check_decay(**values: float) -> None:
    """Refuse options of a model that are not in [0, 1).

    Raises:
        ConfigurationError: Naming the first one.
    """
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ConfigurationError(f"Expected 0 <= model.{name} < 1, got {name}={value}.")


def check_betas(betas: tuple[float, float]) -> None:
    """Refuse betas that Adam does not take.

    Raises:
        ConfigurationError: Not two numbers in [0, 1).
    """
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigurationError(f"Expected model.betas to be two numbers in [0, 1), got betas={list(betas)}.")

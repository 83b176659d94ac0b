"""Checks of a method's options: each refuses, in one line, what it cannot work with."""

import math

from lightning_dp.errors import ConfigurationError


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

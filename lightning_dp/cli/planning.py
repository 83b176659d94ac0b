"""Plans a run without making it: parses the request as ``fit`` does, calibrates the noise, reads no record."""

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from typing_extensions import override

from callbacks import GradientPrivatizer
from lightning_dp.accounting.settings import PrivacyBudget
from lightning_dp.benchmark.plan import CellPlan
from lightning_dp.cli.fit import FitCLI


class PlanCLI(FitCLI):
    """The parser of ``fit`` that stops where the trainer would be built: no run folder, no logger, no data.

    Args:
        args: Command-line arguments after ``fit``.

    Attributes:
        privatizer: The planned mechanism and accountant.
        budget: Noise and length.

    Raises:
        ConfigurationError: What ``fit`` would refuse before it reads a record.
    """

    privatizer: GradientPrivatizer
    budget: PrivacyBudget

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        self.privatizer, self.budget = self.plan_privacy()
        return None  # type: ignore[return-value]  # nothing is trained


def plan_cli(request: Path, *flags: str) -> PlanCLI:
    """Return model, data and plan of a run from the file of its request.

    Args:
        request: Configuration of a whole run.
        flags: Flags over it.

    Raises:
        ConfigurationError: The settings do not fit together, or the pair has no proof.
    """
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # "Seed set to 1", once a request
    return PlanCLI(["--config", str(request), *flags])


def plan_request(request: Path) -> CellPlan:
    """Return the plan of a run from the file of its request.

    Args:
        request: Configuration of a whole run.

    Raises:
        ConfigurationError: The settings do not fit together, or the pair has no proof.
    """
    cli = plan_cli(request)
    is_private = cli.privatizer.mechanism.is_private
    return CellPlan(
        resolved=cli.resolved(),
        is_private=is_private,
        noise_multiplier=cli.budget.noise_multiplier if is_private else None,
        num_releases=cli.budget.num_releases,
        header=cli.privatizer.public_header(cli.model, cli.datamodule, cli.budget),
    )

"""``lightning-dp fit``: one run from one configuration, with the mechanism and the budget as flags."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import yaml
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from callbacks import (
    EvaluateGenerator,
    GradientPrivatizer,
    PrivacyAccountant,
    PrivateCheckpoint,
    ReleaseProgress,
    RunFolder,
    SampleGrid,
)
from callbacks.private_ddp import STRATEGY
from callbacks.run_folder import GRID_FILE, LAST_CHECKPOINT, LEDGER_FILE, PRIVATE_FOLDER
from datamodules import ImageDataModule
from lightning_dp.accounting.budget_request import DatasetBudgetSettings, RunRequest
from lightning_dp.accounting.dataset_budget import DatasetBudget
from lightning_dp.accounting.plan import parse_plan
from lightning_dp.accounting.settings import PrivacyBudget, PrivacySettings
from lightning_dp.cli.loggers import finish, make_loggers
from lightning_dp.cli.parsing import check_values, one_line
from lightning_dp.cli.processes import process_number
from lightning_dp.cli.run_dirs import drop_if_empty, drop_refused, is_unused, make_run_dir, resolve_run
from lightning_dp.cli.short_help import ALL, is_short, shorten
from lightning_dp.cli.trainer_flags import given_callbacks, refuse_own
from lightning_dp.errors import ConfigurationError
from lightning_dp.evaluation.protocol import EvaluationProtocol
from lightning_dp.evaluation.report import RunCard
from lightning_dp.gradients.free_memory import no_more_than_free
from lightning_dp.mechanisms.base import Mechanism
from lightning_dp.modules.base import PrivateModule
from lightning_dp.modules.step_memory import check_judging_memory, check_memory
from lightning_dp.modules.warm_start import WarmStart
from lightning_dp.networks.generator import Generator

CONFIG_FILE = "config.yaml"

ROOTS: dict[str, type] = {
    "mechanism": Mechanism,
    "model": PrivateModule,
    "data": ImageDataModule,
    "warm_start": WarmStart,
}
"""Flags that name a class, and what it must be."""

_TRAINER_DEFAULTS = {
    "accelerator": "auto",
    "devices": 1,
    "max_epochs": -1,
    "log_every_n_steps": 1,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class FitCLI(LightningCLI):
    """Parses a configuration and its overriding flags, and builds trainer, callbacks and run folder.

    Args:
        args: Command-line arguments after ``fit``.

    Attributes:
        run_dir: The run folder.
        run_folder: The callback that holds the run card after `run`.
    """

    def __init__(self, args: list[str]) -> None:
        self.run_dir = Path()
        self.run_folder: RunFolder
        self._ckpt_path: Path | None = None
        self._is_ours = self._was_there = False
        self._has_short_help = is_short(args)
        super().__init__(
            PrivateModule,
            ImageDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            run=False,
            args=["--help" if argument == ALL else argument for argument in args],
            save_config_callback=None,
            seed_everything_default=1,
            trainer_defaults=_TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False, "prog": "lightning-dp fit"},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the flags that every run has besides model, data and trainer."""
        parser.add_subclass_arguments(Mechanism, "mechanism", required=True, help="How private rows become a release.")
        parser.add_class_arguments(PrivacySettings, "privacy")
        parser.add_class_arguments(DatasetBudgetSettings, "dataset_budget")
        parser.add_subclass_arguments(
            WarmStart, "warm_start", required=False, help="What is released first, to learn from samples of it."
        )
        parser.add_class_arguments(EvaluationProtocol, "evaluation")
        parser.add_argument(
            "--telemetry.raw",
            type=bool,
            default=False,
            help="Log numbers without noise, into private/ and never online; the claim is then CONDITIONAL.",
        )
        parser.add_argument("--name", type=str, default="run", help="Name of the experiment.")
        parser.add_argument("--run_dir", type=str | None, default=None, help="Run folder (default: runs/NAME/TIME).")
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="'last', or a private checkpoint, to resume from."
        )
        parser.add_argument("--checkpoint_every", type=int, default=100, help="Releases between private checkpoints.")
        parser.add_argument("--evaluate", type=bool, default=True, help="Judge the released samples at the end.")
        parser.add_argument(
            "--evaluate_every", type=int | None, default=None, help="Also judge samples every so many releases."
        )
        parser.add_argument(
            "--wandb",
            type=Literal["auto", "online", "offline", "disabled"],
            default="auto",
            help="auto logs online when logged in, else offline.",
        )
        parser.add_argument("--wandb_project", type=str, default="lightning-dp", help="W&B project.")
        parser.add_argument("--wandb_group", type=str | None, default=None, help="W&B group of a comparison.")
        if self._has_short_help:
            shorten(parser, ROOTS)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; a mistake is one line."""
        one_line(lambda: super(FitCLI, self).parse_arguments(parser, args), ROOTS, parser)
        check_values(parser, self.config)
        if not 0 <= int(self.config.seed_everything) < 2**32:
            raise ConfigurationError(f"Expected 0 <= seed_everything < 2**32, got {self.config.seed_everything}.")

    def instantiate_classes(self) -> None:
        """Build everything; what a constructor refuses is one line."""
        try:
            with ExitStack() as self._building:
                self._building.enter_context(no_more_than_free())
                one_line(super().instantiate_classes, ROOTS)
        except MisconfigurationException as error:
            raise ConfigurationError(
                f"{error} Mend --trainer.accelerator and --trainer.devices (cpu and 1 are always there)."
            ) from None

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Plan the run from public facts, build callbacks, loggers and the trainer, then make the run folder."""
        self._building.close()  # networks are built
        options = self.config_init
        privatizer, budget = self.plan_privacy()
        self.run_dir, self._ckpt_path = resolve_run(options.name, options.run_dir, options.ckpt_path)
        try:
            return self._trainer_of(privatizer, budget, **kwargs)
        except BaseException:
            if options.run_dir is None and options.ckpt_path is None and not process_number():
                drop_if_empty(self.run_dir)
            raise

    def _trainer_of(self, privatizer: GradientPrivatizer, budget: PrivacyBudget, **kwargs: Any) -> pl.Trainer:
        options = self.config_init
        if options.dataset_budget.folder is not None and options.ckpt_path is None and not process_number():
            # Refused here, nothing is left behind; what counts is the reservation when the ledger opens.
            asked = self.budget_request(privatizer, budget)
            DatasetBudget(Path(options.dataset_budget.folder)).check(options.dataset_budget, [asked])
        plain = self.resolved()
        own = self._callbacks(privatizer, plain)
        given: dict[str, Any] = {"callbacks": [*given_callbacks(options.trainer), *own], "logger": False}
        if options.trainer.strategy == "auto" and _wants_many(options.trainer):
            given["strategy"] = STRATEGY
        if options.trainer.logger is not False and not (_wants_many(options.trainer) and process_number()):
            # Numbers without noise lie beside the teachers, where other users cannot read, and stay on this machine.
            raw = options.telemetry.raw
            given["logger"] = make_loggers(
                self.run_dir,
                plain,
                name=options.name,
                mode="offline" if raw and options.wandb == "auto" else options.wandb,
                project=options.wandb_project,
                group=options.wandb_group,
                folder=self.run_dir / PRIVATE_FOLDER if raw else self.run_dir,
            )
        trainer = super().instantiate_trainer(**given, **kwargs)
        privatizer.check_trainer(trainer)
        check_memory(self.model, options.mechanism, trainer.strategy.root_device, processes=trainer.world_size)
        if options.evaluate and self.model.makes_images:
            check_judging_memory(self.datamodule.image_shape, options.evaluation.num_samples)
        self._read_early()
        if trainer.is_global_zero:
            self._is_ours, self._was_there = is_unused(self.run_dir), self.run_dir.exists()
            make_run_dir(self.run_dir)
            (self.run_dir / CONFIG_FILE).write_text(yaml.safe_dump(plain, sort_keys=False))
        return trainer

    def _read_early(self) -> None:
        """Read the data before anything is written: what is wrong with them leaves no folder and no W&B run."""
        if type(self.datamodule).prepare_data is pl.LightningDataModule.prepare_data:  # nothing to fetch first
            self.datamodule.setup("fit")

    def plan_privacy(self) -> tuple[GradientPrivatizer, PrivacyBudget]:
        """Fix noise and length from public facts: contradictory settings end here, before a record is read.

        Returns: The planned mechanism and accountant, and what was decided.

        Raises:
            ConfigurationError: Settings that do not fit together, or a pair without a proof.
        """
        options = self.config_init
        refuse_own(options.trainer)
        self.model.public_seed = self.seed
        privatizer = GradientPrivatizer(
            mechanism=options.mechanism,
            accountant=PrivacyAccountant(privacy=options.privacy, dataset_budget=options.dataset_budget),
            public_seed=self.seed,
            warm_start=options.get("warm_start"),
            raw_telemetry=options.telemetry.raw,
        )
        max_steps = options.trainer.max_steps
        budget = privatizer.plan_run(self.model, self.datamodule, None if max_steps < 0 else max_steps)
        return privatizer, budget

    def budget_request(self, privatizer: GradientPrivatizer, budget: PrivacyBudget) -> RunRequest:
        """Return what a planned run will ask of the budget of its data set.

        Args:
            privatizer: As `plan_privacy` returned it.
            budget: As `plan_privacy` returned it.
        """
        header = privatizer.public_header(self.model, self.datamodule, budget)
        run = self.config_init.dataset_budget.reservation or "planned"
        return RunRequest(run=run, name=str(self.run_dir), header=header, needed=parse_plan(header["planned"]))

    def resolved(self) -> dict[str, Any]:
        """Return the configuration with every default filled in, as plain values."""
        plain: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        if plain["dataset_budget"]["folder"] is None:
            del plain["dataset_budget"]  # nothing in it
        return plain

    def _callbacks(self, privatizer: GradientPrivatizer, config: dict[str, Any]) -> list[Callback]:
        options, accountant = self.config_init, privatizer.accountant
        accountant.ledger_path = self.run_dir / LEDGER_FILE
        every, evaluation = options.evaluate_every, None
        if options.evaluate:
            evaluation = EvaluateGenerator(protocol=options.evaluation, every_n_releases=every)
            if isinstance(self.model.released_model(), Generator):
                _ = options.evaluation.hash  # an extractor that is not at hand is missed before the budget is spent
        self.run_folder = RunFolder(
            path=self.run_dir, privatizer=privatizer, evaluation=evaluation, config=config, title=options.name
        )
        checkpoint = PrivateCheckpoint(
            path=self.run_dir / PRIVATE_FOLDER / LAST_CHECKPOINT,
            accountant=accountant,
            every_n_releases=options.checkpoint_every,
        )
        own: list[Callback] = [privatizer, accountant]
        own += [evaluation] if evaluation is not None else []
        own += [SampleGrid(path=self.run_dir / GRID_FILE, every_n_releases=every), self.run_folder, checkpoint]
        own += [ReleaseProgress(accountant=accountant)] if options.trainer.enable_progress_bar is not False else []
        return own

    @property
    def seed(self) -> int:
        """The public seed of the run."""
        return int(self.config.seed_everything)

    def run(self) -> RunCard | None:
        """Train to the end of the budget and return the run card; None on another process than the first.

        Raises:
            ConfigurationError: The run is refused after all; nothing is left in a folder that was unused.
            KeyboardInterrupt: The run was interrupted; the message says how to go on.
        """
        try:
            self._fit()
        except ConfigurationError:
            if self._is_ours:
                drop_refused(self.run_dir, was_there=self._was_there)
                if self.config_init.run_dir is None:
                    drop_if_empty(self.run_dir)
            raise
        if self.run_folder.card is None:
            if not self.trainer.is_global_zero and not self.trainer.interrupted:
                return None
            raise KeyboardInterrupt(
                f"The run in {self.run_dir} was interrupted; go on with the same command and --run_dir {self.run_dir} "
                "--ckpt_path last."
            )
        return self.run_folder.card

    def _fit(self) -> None:
        """Train; what Lightning, or a checkpoint, refuses is one line."""
        try:
            self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self._ckpt_path, weights_only=True)
        except SystemExit:
            pass  # Lightning ends the process on Ctrl-C; the message below is the run's last word
        except MisconfigurationException as error:
            raise ConfigurationError(str(error)) from None
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            first = next(iter(str(error).splitlines()[1:]), "").strip()
            raise ConfigurationError(
                f"The checkpoint {self._ckpt_path} holds another network ({first}) Resume with the settings of its run."
            ) from None
        finally:
            finish(self.trainer.loggers)


def _wants_many(trainer: Any) -> bool:
    """Tell whether more than one process may be asked for."""
    return trainer.devices not in (1, "1") or trainer.num_nodes > 1

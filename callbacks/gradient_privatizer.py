"""Attaches a mechanism to a method: checks the trainer, fixes the plan, opens the door."""

import logging
import math
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
from typing_extensions import override

from callbacks.privacy_accountant import PrivacyAccountant
from callbacks.private_ddp import ranks_of
from callbacks.refusals import refuse_coupled_records, refuse_settings
from lightning_dp.accounting.composition import Counts
from lightning_dp.accounting.coverage import default_not_covered
from lightning_dp.accounting.events import ReleaseEvent, Sampling, relation_name
from lightning_dp.accounting.plan import plan_header
from lightning_dp.accounting.settings import PrivacyBudget, resolve_budget
from lightning_dp.errors import ConfigurationError, PrivacyProtocolError
from lightning_dp.mechanisms.base import Mechanism, NoiseLaw, ReleasePlan
from lightning_dp.mechanisms.noise import NoiseSource
from lightning_dp.modules.base import PrivateModule
from lightning_dp.modules.public_facts import PublicFacts, check_facts
from lightning_dp.modules.release import ReleaseSession
from lightning_dp.modules.step_memory import check_memory
from lightning_dp.modules.warm_start import WarmPlan, WarmStart
from lightning_dp.wording import counted

_logger = logging.getLogger(__name__)

_RAW_LOGS = "the logs of this run staying private: telemetry.raw put numbers without noise into them"


class GradientPrivatizer(pl.Callback):
    """Gives a PrivateModule the one door through which private gradients leave.

    Args:
        mechanism: How rows become one release.
        accountant: The callback that keeps the ledger.
        public_seed: Seed of public randomness (rotations, projections); not of the noise.
        warm_start: What is released first, for the method to learn from samples of it; None begins from nothing.
        raw_telemetry: Log numbers computed from private rows without noise, under raw/. No bound covers the logs, so
            the claim is CONDITIONAL on their staying private, and W&B online is refused.
    """

    def __init__(
        self,
        *,
        mechanism: Mechanism,
        accountant: PrivacyAccountant,
        public_seed: int = 0,
        warm_start: WarmStart | None = None,
        raw_telemetry: bool = False,
    ) -> None:
        self.mechanism = mechanism
        self.accountant = accountant
        self.public_seed = public_seed
        self.warm_start = warm_start
        self.raw_telemetry = raw_telemetry
        self._warm: WarmPlan | None = None
        self.plan: ReleasePlan | None = None
        self._own: tuple[ReleaseEvent, Sampling] | None = None
        self._session: ReleaseSession | None = None

    def plan_run(self, module: PrivateModule, data: PublicFacts, max_steps: int | None) -> PrivacyBudget:
        """Fix noise and length from public facts alone; the command line calls it before any data are read.

        Args:
            module: The method.
            data: Public facts of the data.
            max_steps: Planned number of releases, None where open.

        Raises:
            ConfigurationError: Settings that do not fit together, or a pair without a proof.
        """
        settings = self.accountant.privacy
        check_facts(data)
        module.describe_data(data)
        spec = module.contribution_spec()
        self.mechanism.check(spec)
        refuse_coupled_records(module)
        # The length of a run without privacy is that of the private run which the same settings describe.
        priced = self.mechanism if self.mechanism.is_private else _stand_in()

        def make_event(noise_multiplier: float) -> ReleaseEvent:
            plan = ReleasePlan(spec=spec, relation=settings.relation, noise_multiplier=noise_multiplier)
            return priced.step_event(plan)

        spec.alternatives(settings.relation)
        if spec.is_undercharged and not module.unverified:
            raise ConfigurationError(
                f"{type(module).__name__} charges less than its rows send, and its claim does not say so; say it in "
                "PrivateModule.unverified, or charge all vectors of a row."
            )
        if not self.mechanism.is_private and settings.target_epsilon is None and settings.noise_multiplier is None:
            settings = replace(settings, noise_multiplier=1.0)  # nothing reads it: max_steps alone is the length
        before = self._plan_warm_start(module)
        budget = resolve_budget(
            settings,
            make_event=make_event,
            sampling=module.sampling,
            max_steps=max_steps,
            before=before if self.mechanism.is_private else None,
        )
        if not self.mechanism.is_private:  # as long as the private run; nothing prices what comes first
            num_before = sum(before.values())
            budget = replace(budget, num_releases=budget.num_releases + num_before, num_before=num_before)
        if self.mechanism.is_private and not math.isfinite(budget.epsilon):
            raise ConfigurationError(
                f"privacy.noise_multiplier={budget.noise_multiplier:g} is so small that no finite epsilon holds. "
                "Raise it, or use --mechanism NoPrivacy."
            )
        self.plan = ReleasePlan(spec=spec, relation=settings.relation, noise_multiplier=budget.noise_multiplier)
        return budget

    def _plan_warm_start(self, module: PrivateModule) -> Counts:
        """Return what the warm start will release."""
        if self.warm_start is None:
            return {}
        if not module.can_warm_start:
            raise ConfigurationError(f"{type(module).__name__} has no warm start; leave --warm_start out.")
        # Sums want the Gaussian mechanism; its noise is exact if that of all other releases is, else no claim says so.
        noise: NoiseLaw = "gaussian" if self.mechanism.noise == "gaussian" else "rounded_gaussian"
        mechanism = _stand_in(noise, self.warm_start.row_bound) if self.mechanism.is_private else self.mechanism
        self._warm = self.warm_start.plan_release(module, self.accountant.privacy, mechanism)
        return {(self._warm.event, self._warm.sampling): self._warm.num_releases}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, PrivateModule):
            raise ConfigurationError(
                f"GradientPrivatizer needs a PrivateModule, got {type(pl_module).__name__}: its gradients would leave "
                "without a release. Derive the model from lightning_dp.modules.PrivateModule."
            )
        if pl_module._compiler_ctx is not None:
            raise ConfigurationError(
                f"Expected a module as it was written, got torch.compile of {type(pl_module).__name__}, which would "
                "compile its releases too. Make a new one, and compile the networks that it is given."
            )
        self.check_trainer(trainer)
        self.mechanism.forget()  # of an earlier run; a checkpoint of this one is loaded after set-up
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data is None:
            raise ConfigurationError(
                "Pass the data as a datamodule, trainer.fit(model, datamodule=data), one of datamodules: batches of a "
                "loader are not the Poisson samples that a claim is about, so methods draw records themselves."
            )
        budget = self.plan_run(pl_module, data, None if trainer.max_steps < 0 else trainer.max_steps)
        check_memory(pl_module, self.mechanism, trainer.strategy.root_device, processes=trainer.world_size)
        pl_module.logs_raw = self.raw_telemetry
        pl_module.rehearse()
        pl_module.planned_releases = budget.num_own
        pl_module.insecure_seed = self.accountant.privacy.insecure_seed
        pl_module.ranks = ranks_of(trainer.strategy)
        header = self.public_header(pl_module, data, budget)
        self._own = own = (self.mechanism.step_event(self._plan), pl_module.sampling)
        self.accountant.open(budget, header, next_release=own, ranks=pl_module.ranks)
        plan = f"Privacy: {counted(budget.num_releases, 'release')} of {self._mechanism_name}"
        if not self.mechanism.is_private:
            _logger.info(f"{plan}, which bounds nothing: the run is not private.")
            return
        budgeted = f"budget epsilon={budget.epsilon:.4g} at delta={budget.delta:g}, {header['relation']}"
        if header["unverified"] or header["conditional_on"]:
            budgeted = f"no epsilon can be stated; it rests on {[*header['unverified'], *header['conditional_on']][0]}"
        _logger.info(
            f"{plan}, noise multiplier {budget.noise_multiplier:.4g} (noise std "
            f"{self.mechanism.noise_std(self._plan):.4g}), {budgeted}."
        )

    def public_header(self, module: PrivateModule, data: PublicFacts, budget: PrivacyBudget) -> dict[str, Any]:
        """Return the public facts of a planned run, as the header of its ledger holds them.

        Args:
            module: The method.
            data: Public facts of the data.
            budget: What `plan_run` returned.
        """
        settings, planned = self.accountant.privacy, self._planned(module, budget)
        return {
            "relation": relation_name(settings.relation),
            "unit": self._plan.spec.unit,
            "mechanism": self._mechanism_name,
            "target_delta": settings.target_delta,
            "accountant": settings.accountant,
            "unverified": [
                *["that noise is secret: privacy.insecure_seed fixes it"] * (settings.insecure_seed is not None),
                *module.unverified,
            ],
            "conditional_on": [*module.conditional_on, *[_RAW_LOGS] * self.raw_telemetry],
            "plan": module.public_plan(),
            "planned": plan_header(planned),
            **({"not_covered": [*default_not_covered(planned), *module.not_covered]} if module.not_covered else {}),
            "dataset": data.name,
            "num_records": data.num_records,
            "fingerprint": data.fingerprint,
        }

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # After a checkpoint has been loaded: the noise secret is fresh, whatever was resumed.
        if not isinstance(pl_module, PrivateModule):
            raise PrivacyProtocolError("GradientPrivatizer was moved to another module after setup.")
        noise = NoiseSource(insecure_seed=self.accountant.privacy.insecure_seed)
        noise.adopt_secret(pl_module.ranks.first(noise.export_secret))

        def open_session(mechanism: Mechanism, plan: ReleasePlan, sampling: Sampling) -> ReleaseSession:
            return ReleaseSession(
                mechanism=mechanism,
                plan=plan,
                ledger=self.accountant.ledger,
                sampling=sampling,
                noise=noise,
                public_seed=self.public_seed,
                may_release=self.accountant.check_release,
                ranks=pl_module.ranks,
                log_raw=pl_module.log if self.raw_telemetry else None,
            )

        # Once: after a crash its release stays charged, and what it taught is in the checkpoint or lost.
        if self.warm_start is not None and self._warm is not None and not len(self.accountant.ledger):
            self.warm_start.warm_up(pl_module, self._warm, open_session, seed=self.public_seed)
            made = self._warm.num_releases
            _logger.info(f"Warm start made: {made} release{'s' * (made > 1)}, and samples to learn from.")
        session = open_session(self.mechanism, self._plan, pl_module.sampling)
        if (session.event, session.sampling) != self._own:
            raise PrivacyProtocolError(
                f"Expected releases as planned, {self._own}, got {(session.event, session.sampling)}: options of model "
                "or mechanism were changed between set-up and the start of training. Set them before trainer.fit()."
            )
        self._session = session
        pl_module.attach(session, trainer.optimizers)

    @override
    def state_dict(self) -> dict[str, Any]:
        return dict(self.mechanism.state_dict())

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.mechanism.load_state_dict(state_dict)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._open_session.begin_step()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._open_session.end_step()

    @property
    def _mechanism_name(self) -> str:
        own = type(self.mechanism).__name__
        return own if self._warm is None else f"{type(self._warm.mechanism).__name__} (warm start) and {own}"

    def _planned(self, module: PrivateModule, budget: PrivacyBudget) -> Counts:
        """Return how often each event will be released."""
        planned: dict[tuple[ReleaseEvent, Sampling], int] = {}
        if self._warm is not None:
            planned[self._warm.event, self._warm.sampling] = self._warm.num_releases
        own = (self.mechanism.step_event(self._plan), module.sampling)
        planned[own] = planned.get(own, 0) + budget.num_own
        return planned

    @property
    def _open_session(self) -> ReleaseSession:
        if self._session is None:
            raise PrivacyProtocolError("The release session opens when training starts.")
        return self._session

    @property
    def _plan(self) -> ReleasePlan:
        if self.plan is None:
            raise PrivacyProtocolError("The plan is fixed by plan_run(), which setup() calls.")
        return self.plan

    def check_trainer(self, trainer: pl.Trainer) -> None:
        """Refuse trainer settings that would spoil the guarantee; the command line asks before a folder is made.

        Raises:
            ConfigurationError: A second privatizer, a lost ledger, gradient clipping, accumulation, fp16, a strategy
                that averages, numbers without noise sent to W&B, or a checkpoint that others could read.
        """
        refuse_settings(trainer, raw_telemetry=self.raw_telemetry)
        others = [c for c in trainer.callbacks if isinstance(c, GradientPrivatizer)]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise ConfigurationError(
                f"Expected one GradientPrivatizer, got {len(others)}; each release is charged once."
            )
        if self.accountant not in trainer.callbacks:  # type: ignore[attr-defined]
            raise ConfigurationError(
                "The PrivacyAccountant of this GradientPrivatizer is not among the trainer's callbacks, so checkpoints "
                "would lose the ledger. Pass both: Trainer(callbacks=[privatizer, accountant])."
            )


def _stand_in(noise: NoiseLaw = "gaussian", row_bound: float = 1.0) -> Mechanism:
    from lightning_dp.mechanisms.gaussian import Gaussian

    return Gaussian(max_grad_norm=row_bound, noise=noise)


def run_summary(privatizer: GradientPrivatizer) -> dict[str, Any]:
    """Return mechanism, bound, sensitivity and noise of a planned run, JSON-ready, for the run card."""
    plan = privatizer.plan
    if plan is None:
        raise PrivacyProtocolError("The plan is fixed by plan_run(), which setup() calls.")
    mechanism = privatizer.mechanism
    summary = {**mechanism.describe(), "privacy_unit": plan.spec.unit, "contribution": plan.spec.kind}
    if mechanism.is_private:
        summary |= {
            "row_bound": mechanism.row_bound(plan.spec),
            "l2_sensitivity": mechanism.l2_sensitivity(plan.spec, plan.relation),
            "noise_multiplier": plan.noise_multiplier,
            "noise_std": mechanism.noise_std(plan),
            "vectors_per_release": plan.spec.vectors_per_row,
            "vector_dim": plan.spec.vector_dim,
        }
        statements = mechanism.other_statements(plan)
        if statements and privatizer.accountant.privacy.insecure_seed is None:
            summary["other_statements"] = list(statements)
    return summary

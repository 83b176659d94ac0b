"""Keeps the ledger of a run: epsilon after each release, a stop before the budget is crossed, resume without gaps."""

import logging
import secrets
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from typing_extensions import override

from lightning_dp.accounting.accountants import Counts, would_exceed
from lightning_dp.accounting.budget_member import BudgetMember
from lightning_dp.accounting.budget_request import DatasetBudgetSettings
from lightning_dp.accounting.claim import PrivacyClaim
from lightning_dp.accounting.claiming import claim_from_ledger, spent_epsilon
from lightning_dp.accounting.events import NonPrivateRelease, ReleaseEvent, Sampling
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.accounting.plan import keeps_plan, ledger_plan, parse_plan, releases_left
from lightning_dp.accounting.settings import PrivacyBudget, PrivacySettings
from lightning_dp.errors import ConfigurationError, PrivacyProtocolError
from lightning_dp.gradients.ranks import ALONE, Ranks
from lightning_dp.wording import counted

_logger = logging.getLogger(__name__)
_SAMPLED_EPSILON_POINTS = 10  # of a run, at most; which they are follows from the plan alone, and from no clock,
_RELEASES_BETWEEN = 100  # for the time of a step tells how many records it drew


class PrivacyAccountant(pl.Callback):
    """Owns the ledger and speaks for it.

    The ledger file is written ahead of every release; checkpoints carry a copy. A resumed run continues from whatever
    either of the two has spent, so releases lost in a crash stay charged.

    On many processes the first one holds the file and decides what the budget allows; the others count along in memory.

    Args:
        privacy: The user's privacy settings.
        ledger_path: File of the ledger; None keeps it in memory and in checkpoints only.
        dataset_budget: The budget that all runs on the same data share; None, or one without a folder, for none.

    Attributes:
        budget: What was decided beforehand; None before setup.
        epsilon: Epsilon as last computed; None before the first, and for every run whose claim is not PROVED.
        epsilon_releases: How many releases that epsilon covers; where records are sampled, fewer than were made.
    """

    def __init__(
        self,
        *,
        privacy: PrivacySettings,
        ledger_path: Path | None = None,
        dataset_budget: DatasetBudgetSettings | None = None,
    ) -> None:
        self.privacy = privacy
        self.ledger_path = ledger_path
        self.dataset_budget = dataset_budget or DatasetBudgetSettings()
        self.budget: PrivacyBudget | None = None
        self.epsilon: float | None = None
        self.epsilon_releases = 0
        self._ledger: PrivacyLedger | None = None
        self._planned: Counts | None = None  # what the ledger's header says was planned
        self._num_found = 0  # releases that were in the ledger before this process made any
        self._num_restored = 0
        self._next: tuple[ReleaseEvent, Sampling] | None = None
        self._ranks = ALONE
        self._member: BudgetMember | None = None

    @property
    def ledger(self) -> PrivacyLedger:
        """The ledger of this run.

        Raises:
            PrivacyProtocolError: It has not been opened yet.
        """
        if self._ledger is None:
            raise PrivacyProtocolError("The ledger is opened by GradientPrivatizer at setup; add that callback too.")
        return self._ledger

    def open(
        self,
        budget: PrivacyBudget,
        header: dict[str, Any],
        *,
        next_release: tuple[ReleaseEvent, Sampling] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Open the ledger, new or existing, under a budget that was decided beforehand.

        Args:
            budget: Noise, length and epsilon of the run.
            header: Public facts of the run, from which the claim is made.
            next_release: What each release of the method will be; None takes the last one made.
            ranks: The processes of the run.

        Raises:
            ConfigurationError: The existing ledger is of another run, or process 0 was started with other settings.
        """
        self.budget, self._next, self._ranks = budget, next_release, ranks

        def opened() -> dict[str, Any]:
            self._open(header)
            return {"header": header, "ledger": self.ledger.state_dict()}

        told = ranks.first(opened)
        # The claim is made of process 0's header: one with another partition, or with known coins, would void it.
        with ranks.together(0, "the settings of the run"):
            if ranks.rank > 0:
                self._ledger = PrivacyLedger.from_state_dict(told["ledger"])
                _check_same_settings(header, told["header"], ranks)
        self._num_found = len(self.ledger)
        self._planned = ledger_plan(self.ledger)

    def _open(self, header: dict[str, Any]) -> None:
        """Open the file of the ledger, or a ledger in memory."""
        header = {**header, "dataset_budget": True} if self.dataset_budget.folder is not None else header
        if self.ledger_path is None or not self.ledger_path.exists():
            run_id = self.dataset_budget.reservation or secrets.token_hex(8)
            self._ledger = PrivacyLedger({**header, "run_id": run_id}, self.ledger_path)
            self._join_dataset(is_new=True)
            return
        self._ledger = PrivacyLedger.reopen(self.ledger_path)
        for name, value in {"dataset_budget": None, **header}.items():
            found = self._ledger.header.get(name)
            # A longer plan, or one of other noise, may be carried out; the first one stays in the ledger, and the claim
            # says what became of it. Another law of noise is a slip: one default or another of two versions of us.
            if name == "planned":
                name, found, value = "noise", _laws(found or value), _laws(value)
            if found != value:
                self._ledger.close()
                name, found, value = _difference(name, found, value)
                raise ConfigurationError(
                    f"The ledger {self.ledger_path} was opened with {name}={found!r}, now {name}={value!r}. "
                    "Resume with the settings of the run, or start a new run in another --run_dir."
                )
        if not keeps_plan(parse_plan(header.get("planned", [])), ledger_plan(self._ledger)):
            _logger.warning(
                f"This is another plan than the one in {self.ledger_path}, longer or of other noise: once it is left, "
                "no epsilon is stated. Resume with the settings of the run, or start a new run in another --run_dir."
            )
        self._join_dataset(is_new=False)

    def _join_dataset(self, *, is_new: bool) -> None:
        """Reserve what this run may release; a new run that is refused leaves no ledger behind."""
        if self.dataset_budget.folder is None:
            return
        try:
            self._member = BudgetMember(
                self.dataset_budget,
                self.ledger,
                num_releases=self._budget.num_releases,
                next_release=self._next,
            )
            self._member.reserve()
        except BaseException:
            self._member = None
            self.ledger.close()
            if is_new and self.ledger_path is not None:
                self.ledger_path.unlink()  # empty, and ours: nothing can have been released
            raise

    def _close(self) -> None:
        """Close the ledger; a reservation on which nothing was released goes back, any other stays."""
        if self._ledger is None or self._ledger.path is None:
            return
        if self._member is not None:
            self._member.end()
            self._member = None
        self._ledger.close()

    def speak(self) -> None:
        """Bring `epsilon` up to the newest release; where records are sampled, that can take longer than a step."""
        if self.epsilon_releases != len(self.ledger):
            self.epsilon = spent_epsilon(self.ledger, accountant=self.privacy.accountant)
            self.epsilon_releases = len(self.ledger)

    def claim(self) -> PrivacyClaim:
        """Return what can be said of everything released so far."""
        return claim_from_ledger(self.ledger)

    def check_release(self, event: ReleaseEvent, sampling: Sampling) -> None:
        """Refuse a release that would cross the budget; process 0 decides, and no other goes on without it.

        Raises:
            PrivacyProtocolError: It would.
        """
        if self._ranks.rank == 0 and self._is_beyond_budget(event, sampling):
            raise PrivacyProtocolError(
                f"The next release would cross the budget (epsilon={self._budget.epsilon:g}, "
                f"delta={self._budget.delta:g}, {counted(self._budget.num_releases, 'release')}). The run ends here."
            )
        key = (event, sampling)
        if self._member is not None and self.ledger.counts().get(key, 0) >= self._member.reserved.get(key, 0):
            raise PrivacyProtocolError(
                f"The next release was not reserved in the data set's budget {self.dataset_budget.folder}: "
                f"{self._member.reserved.get(key, 0)} of its kind were. The run ends here."
            )

    @property
    def _budget(self) -> PrivacyBudget:
        if self.budget is None:
            raise PrivacyProtocolError("No budget was set: GradientPrivatizer opens the ledger at setup.")
        return self.budget

    def _is_beyond_budget(self, event: ReleaseEvent, sampling: Sampling) -> bool:
        counts = self.ledger.counts()
        if not releases_left(counts, self._planned or {}, (event, sampling), self._budget.num_releases):
            return True
        return not isinstance(event, NonPrivateRelease) and would_exceed(
            counts,
            (event, sampling),
            budget_epsilon=self._budget.epsilon,
            delta=self._budget.delta,
            relation=self.privacy.relation,
            accountant=self.privacy.accountant,
            planned=self._planned,
        )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._say_what_is_lost()
        self._stop_if_spent(trainer)

    def _say_what_is_lost(self) -> None:
        """Tell of releases that are charged and whose effect no checkpoint holds."""
        lost = self._num_found - self._num_restored
        if lost and not self._num_restored and lost >= self._budget.num_releases:
            raise ConfigurationError(
                f"All {lost} planned releases of this run are spent and no checkpoint holds what they taught. "
                "Start a new run in another --run_dir (its epsilon adds to this one's)."
            )
        if lost:
            _logger.info(
                f"Still charged: {counted(lost, 'release')} after the last checkpoint; what they taught is lost."
            )

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_time_to_speak():
            self.speak()
            metrics = {"privacy/releases": float(len(self.ledger))}
            if self.epsilon is not None:
                metrics["privacy/epsilon"] = self.epsilon
            # For other callbacks, rounded to float32; at every release it would be the dearest part of the framework.
            pl_module.log_dict(metrics, logger=False)
            # Loggers get it exactly: an epsilon may not be shown below what was proved.
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
        self._stop_if_spent(trainer)

    def _is_time_to_speak(self) -> bool:
        """Tell whether epsilon is computed after this release, and here; public, as the plan and the count are."""
        if self._ranks.rank > 0:
            return False
        if all(sampling.rate == 1.0 for _, sampling in self.ledger.counts()):
            return True
        done, planned = len(self.ledger), self._budget.num_releases
        return done >= planned or done % max(_RELEASES_BETWEEN, planned // _SAMPLED_EPSILON_POINTS) == 0

    def _stop_if_spent(self, trainer: pl.Trainer) -> None:
        if not self._ranks.first(self._is_spent):
            return
        done = len(self.ledger)
        reason = "as planned" if done >= self._budget.num_releases else "one more would cross the budget"
        _logger.info(f"{counted(done, 'release')} made, {reason}.")
        trainer.should_stop = True

    def _is_spent(self) -> bool:
        coming = self._next or next(reversed(self.ledger.counts()), None)
        return bool(len(self.ledger)) and coming is not None and self._is_beyond_budget(*coming)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"ledger": self.ledger.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.ledger.merge(state_dict["ledger"])
        if self._member is not None:
            self._member.reserve()  # what the checkpoint has spent beyond the file counts here too
        self._num_found = len(self.ledger)
        self._num_restored = sum(run["count"] for run in state_dict["ledger"]["runs"])

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # Lightning calls no teardown then, and the lock would keep this process from resuming its own run.
        self._close()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()


def _check_same_settings(own: dict[str, Any], first: dict[str, Any], ranks: Ranks) -> None:
    """Refuse a process whose header is not that of process 0."""
    for key in (*own, *first):
        if own.get(key) != first.get(key):
            name, found, value = _difference(key, first.get(key), own.get(key))
            raise ConfigurationError(
                f"Process {ranks.rank} of {ranks.size} was started with {name}={value!r}, process 0 with {found!r}. "
                "Start all processes of a run with the same settings."
            )


def _laws(planned: Any) -> str:
    """Return the kinds of the releases of a plan as a ledger's header holds it; the mechanism's noise decides them."""
    return ", ".join(str(part["event"]["kind"]) for part in planned)


def _difference(name: str, found: Any, value: Any) -> tuple[str, Any, Any]:
    """Return what differs between two values, not all that agrees."""
    if not (isinstance(found, dict) and isinstance(value, dict)):
        return name, found, value
    key = next(key for key in (*value, *found) if value.get(key, ...) != found.get(key, ...))
    return f"{name}.{key}", found.get(key), value.get(key)

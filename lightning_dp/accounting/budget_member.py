"""One run within the budget of its data set: it reserves its plan, leases its releases, and gives back what it may."""

import logging
from pathlib import Path

from lightning_dp.accounting.budget_request import DatasetBudgetSettings, RunRequest, needed_by
from lightning_dp.accounting.composition import Counts
from lightning_dp.accounting.dataset_budget import DatasetBudget
from lightning_dp.accounting.events import ReleaseEvent, Sampling
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.accounting.plan import ledger_plan
from lightning_dp.errors import ConfigurationError
from lightning_dp.wording import counted

_LEASES = 20  # parts of a plan that are noted one by one

_logger = logging.getLogger(__name__)


class BudgetMember:
    """Keeps a run's reservation and its ledger in step.

    Guarantee: no release without a reservation on the disk, and none beyond what was written down for this process.

    Args:
        settings: The budget, with its folder.
        ledger: The ledger of the run, open for writing.
        num_releases: Releases that the run may make in all.
        next_release: What each coming release will be; None takes the last one made.

    Attributes:
        reserved: Everything that the run may release.

    Raises:
        ConfigurationError: A ledger in memory, or one of another reservation.
    """

    def __init__(
        self,
        settings: DatasetBudgetSettings,
        ledger: PrivacyLedger,
        *,
        num_releases: int,
        next_release: tuple[ReleaseEvent, Sampling] | None,
    ) -> None:
        if ledger.path is None:
            raise ConfigurationError("A run within a data set's budget needs a ledger on disk: give it a ledger_path.")
        self.reserved: Counts = {}
        self._settings, self._ledger = settings, ledger
        self._num_releases, self._next = num_releases, next_release
        self._budget = DatasetBudget(Path(settings.folder or ""))
        self._run, self._path = str(ledger.header["run_id"]), ledger.path
        self._leased = 0
        if settings.reservation not in (None, self._run):
            raise ConfigurationError(
                f"The ledger {self._path} is of the run {self._run}, got "
                f"dataset_budget.reservation={settings.reservation}. Drop it."
            )

    def reserve(self) -> None:
        """Reserve all that the run may release beyond what it holds; again, when its ledger has grown otherwise.

        Raises:
            ConfigurationError: As `DatasetBudget.reserve`.
        """
        self._charge_unseen()
        planned = ledger_plan(self._ledger) or {}
        needed = needed_by(self._ledger, planned=planned, next_release=self._next, num_releases=self._num_releases)
        name, header = str(self._path.parent.absolute()), self._ledger.header
        request = RunRequest(run=self._run, name=name, header=header, needed=needed, released=len(self._ledger))
        self._budget.reserve(self._settings, [request])
        if len(self._ledger):
            self._budget.note(self._run, self._ledger)  # refuses an older copy of the run folder
        self.reserved = needed
        self._ledger.on_append(self._lease)
        state = self._budget.state()
        _logger.info(
            f"Budget of {state.terms.dataset} (epsilon={state.terms.epsilon:g}, delta={state.terms.delta:g}): "
            f"{100 * min(1.0, state.spent):.3g} % reserved by {counted(len(state.runs), 'run')}, this one included."
        )

    def end(self) -> None:
        """Say that this process releases no more; a reservation on which nothing was released goes back.

        A share of a comparison's list stays with the list.
        """
        try:
            if len(self._ledger):
                self._budget.note(self._run, self._ledger, has_ended=True)
            elif self._settings.reservation is None:
                self._budget.give_back(self._run, self._ledger)
        except ConfigurationError as error:  # a copy of this run has begun, or the budget cannot be written
            # What is reserved stays reserved, which costs budget and never understates.
            _logger.warning(f"The reservation of this run stays as it is: {error}")

    def _lease(self) -> None:
        """Note ahead what this process may release, a part of the plan at a time: a kill costs such a part at most."""
        made = self._ledger.made
        if made <= self._leased:
            return
        planned = self._num_releases
        upto = max(made, min(made - 1 + max(1, planned // _LEASES), planned - len(self._ledger) + made))
        self._budget.lease(self._run, self._ledger, upto)
        self._leased = upto

    def _charge_unseen(self) -> None:
        """Charge what a process that was killed may have released elsewhere, if this is a copy of its folder."""
        if not len(self._ledger) or not self._budget.exists():
            return
        event, sampling = self._next or next(reversed(self._ledger.counts()))
        # A run that was made longer than its plan had room beyond it.
        room = max(sum((ledger_plan(self._ledger) or {}).values()), self._num_releases)
        for writer, lost in self._budget.unseen(self._run, self._ledger).items():
            if (count := min(lost, room - len(self._ledger))) > 0:
                self._ledger.charge_lost(writer, event, sampling, count)
                _logger.info(f"Charged: {counted(count, 'release')} that the last process of this run had room for.")

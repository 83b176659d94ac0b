"""Ctrl-C of a run on many processes: they stop after the same release, where a checkpoint can be written together."""

import signal
import threading
from types import FrameType
from typing import Any

from lightning_dp.gradients.ranks import Ranks


class HeldInterrupt:
    """Makes of the first SIGINT a word to the other processes, which travels with the next release.

    The second one ends the process at once, as without this.

    Args:
        ranks: The processes of the run.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._before: Any = None

    def hold(self) -> None:
        """Take SIGINT over, where it has its usual meaning."""
        is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._ranks.size > 1 and is_usual and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)

    def let_go(self) -> None:
        """Give SIGINT back."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._ranks.wants_to_stop = True
        self.let_go()

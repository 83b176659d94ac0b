"""What a selection has drawn, before its first run and once: written down, and never told."""

import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from lightning_dp.accounting.selection import RepeatLaw
from lightning_dp.errors import LedgerError

DRAWS_FILE = "draws.json"


@dataclass
class Draws:
    """Which candidates run, in their order.

    Attributes:
        folder: The private folder of the selection.
        cells: Their ids; one may stand several times.
        failed: Places of those that ended without a card: they count, as the worst.
    """

    folder: Path
    cells: tuple[str, ...]
    failed: set[int] = field(default_factory=set)

    @classmethod
    def make(cls, folder: Path, candidates: Sequence[str], law: RepeatLaw | None) -> Self:
        """Draw, from the operating system's randomness; what was drawn before is kept.

        Args:
            folder: The private folder of the selection.
            candidates: Ids, each with the same chance in each draw.
            law: Law of how many; None takes each once.
        """
        if cls.exist(folder):
            return cls.read(folder)  # a crash came before the charge: drawing until one likes it is another law
        number = law.draw() if law is not None else 0
        cells = tuple(candidates) if law is None else tuple(secrets.choice(candidates) for _ in range(number))
        draws = cls(folder, cells)
        draws._write()
        return draws

    @staticmethod
    def exist(folder: Path) -> bool:
        """Tell whether a selection has drawn."""
        return (folder / DRAWS_FILE).exists()

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return what was drawn.

        Raises:
            LedgerError: The file is none of ours.
        """
        path = folder / DRAWS_FILE
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(folder, tuple(str(cell) for cell in found["cells"]), {int(place) for place in found["failed"]})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LedgerError(f"Expected the draws of a selection in {path}, got: {error}.") from None

    def fail(self, place: int) -> None:
        """Note that a run has failed; it is not made again."""
        self.failed.add(place)
        self._write()

    def _write(self) -> None:
        draft = self.folder / f"{DRAWS_FILE}.part"
        with draft.open("w", encoding="utf-8") as file:
            json.dump({"cells": list(self.cells), "failed": sorted(self.failed)}, file)
            file.flush()
            os.fsync(file.fileno())
        draft.chmod(0o600)
        os.replace(draft, self.folder / DRAWS_FILE)

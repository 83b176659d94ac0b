"""Which cells of a grid run now: a comparison of hours is made in parts, and its report covers what is done."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_dp.benchmark.grid import Cell, Grid
from lightning_dp.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Cells chosen by name and seed; the others keep their records.

    Attributes:
        only: Patterns as in file names (`*`, `?`, `[...]`), of which one must fit a cell's method or its id, such as
            `DP_Moments-Gaussian-MNIST-eps10-seed1`; None takes every cell, no pattern takes none.
        seeds: Seeds; None takes every one.
    """

    only: Sequence[str] | None = None
    seeds: Sequence[int] | None = None

    def has(self, cell: Cell) -> bool:
        """Tell whether a cell is chosen."""
        is_named = self.only is None or any(_fits(cell, pattern) for pattern in self.only)
        return is_named and (self.seeds is None or cell.seed in self.seeds)

    def check(self, grid: Grid) -> None:
        """Refuse patterns and seeds that no cell has, which would silently run nothing.

        Raises:
            ConfigurationError: A pattern or a seed fits no cell.
        """
        cells = grid.cells()
        for pattern in self.only or ():
            if not any(_fits(cell, pattern) for cell in cells):
                methods = ", ".join(method.label for method in grid.methods)
                raise ConfigurationError(
                    f"Expected --only to fit a cell, got {pattern!r}. Give a method ({methods}) or a pattern of a "
                    f"cell's id, such as '{cells[0].id}'."
                )
        for seed in self.seeds or ():
            if seed not in grid.seeds:
                raise ConfigurationError(f"Expected --seeds out of {', '.join(map(str, grid.seeds))}, got {seed}.")
        if self.only and not any(self.has(cell) for cell in cells):
            raise ConfigurationError(f"No cell has both a name of --only and a seed of --seeds {self.seeds}.")


ALL_CELLS = Selection()


def _fits(cell: Cell, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (cell.id, cell.method))

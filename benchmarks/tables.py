"""Tables of measured numbers, and the places in docs/performance.md where they stand between markers."""

import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Table:
    """What one benchmark found.

    Attributes:
        name: Names the benchmark and its place in the document.
        title: One line above the table.
        columns: Headings.
        rows: Cells, as they are shown.
        targets: What was aimed at, and whether it was met.
        device: cpu, or the GPU's kind.
    """

    name: str
    title: str
    columns: list[str]
    rows: list[list[str]]
    targets: dict[str, bool] = field(default_factory=dict)
    device: str = "cpu"

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return asdict(self)

    def markdown(self, conditions: str) -> str:
        """Return the table for a document.

        Args:
            conditions: When and on what it was measured.
        """
        title = (
            self.title
            if self.device == "cpu"
            else self.title.replace("CPU second", "second").replace("CPU time", "time")
        )
        lines = [f"{title} ({conditions}).", "", _row(self.columns), _row(["---"] * len(self.columns))]
        lines += [_row(cells) for cells in self.rows]
        lines += ["" for _ in self.targets][:1]
        lines += [f"- Target, {text}: {'met' if is_met else '**missed**'}." for text, is_met in self.targets.items()]
        return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def conditions(device: str, *, quick: bool) -> str:
    """Return date, machine and versions in words."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{platform.machine()} CPU, {os.cpu_count()} cores, {memory:.0f} GiB, one thread"
    if device != "cpu":
        machine = f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    busy = f"load {os.getloadavg()[0]:.0f}" if hasattr(os, "getloadavg") else "load unknown"
    short = "; a short run" if quick else ""
    return f"{datetime.now():%Y-%m-%d}, {machine}, torch {torch.__version__}, {busy}{short}"


def write_between_markers(path: Path, table: Table, text: str) -> None:
    """Put a table where the document keeps it; what stands around it stays.

    Args:
        path: The document.
        table: Its name and device are in the marker: a run on another device leaves this one's table alone.
        text: What comes between.
    """
    start, end = f"<!-- benchmark: {table.name}, {table.device} -->", "<!-- end of benchmark -->"
    document = path.read_text() if path.exists() else ""
    block = f"{start}\n{text}\n{end}"
    before, found, rest = document.partition(start)
    if found:
        _, closed, after = rest.partition(end)
        if not closed:
            raise ValueError(f"Expected {end!r} behind {start!r} in {path}, got none. Put it there.")
        path.write_text(before + block + after)
        return
    neighbour = f"<!-- benchmark: {table.name}, "
    if neighbour in document:  # the same benchmark on another device
        where = document.index(end, document.index(neighbour)) + len(end)
        path.write_text(f"{document[:where]}\n\n{block}{document[where:]}")
        return
    heading = f"{document.rstrip()}\n\n" if document.strip() else ""
    path.write_text(f"{heading}## {table.title.split(',')[0]}\n\n{block}\n")

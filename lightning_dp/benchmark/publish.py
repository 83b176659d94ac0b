"""Copies what a comparison may show to others: its report, records and cards, without paths of the machine."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_dp.benchmark.document import FIGURES_FOLDER
from lightning_dp.benchmark.records import CellRecord, read_records, write_records
from lightning_dp.benchmark.report import MARKDOWN_FILE, PAGE_FILE, SPENDING_FILE
from lightning_dp.errors import ConfigurationError
from lightning_dp.evaluation.report import RunCard, read_run_card

CARDS_FOLDER = "cards"


def publish(folder: Path, target: Path) -> None:
    """Copy report, figures, what was spent, records and the run cards' JSON into another folder.

    Ledgers, checkpoints, samples and logs stay. Absolute paths in the configurations of cards become null, since they
    tell of a machine and not of a run.

    Args:
        folder: The comparison's folder, with its report.
        target: Where to; made if missing, what it has under these names is replaced.

    Raises:
        ConfigurationError: No report is there, or `target` lies in the comparison's own folder.
    """
    if target.resolve().is_relative_to(folder.resolve()):
        raise ConfigurationError(f"Expected --publish outside of {folder}, got {target}.")
    for name in (FIGURES_FOLDER, CARDS_FOLDER):
        if (target / name).is_dir():
            shutil.rmtree(target / name)
    (target / CARDS_FOLDER).mkdir(parents=True)
    try:
        for name in (MARKDOWN_FILE, PAGE_FILE, SPENDING_FILE):
            shutil.copyfile(folder / name, target / name)
        (target / FIGURES_FOLDER).mkdir()
        shown = (folder / MARKDOWN_FILE).read_text(encoding="utf-8")
        for figure in (folder / FIGURES_FOLDER).iterdir():
            if f"{FIGURES_FOLDER}/{figure.name}" in shown:  # others are of earlier reports
                shutil.copyfile(figure, target / FIGURES_FOLDER / figure.name)
    except OSError as error:
        raise ConfigurationError(f"Expected the report of a comparison in {folder}, got: {error}.") from None
    write_records(target, [_published(record, folder, target) for record in read_records(folder)])


def _published(record: CellRecord, folder: Path, target: Path) -> CellRecord:
    """Write the card of a record, if it has one, and return the record that names it."""
    if record.card is None:
        return record
    card = read_run_card(folder / record.card)
    name = f"{CARDS_FOLDER}/{record.cell}.json"
    (target / name).write_text(json.dumps(_without_paths(card), indent=1) + "\n", encoding="utf-8")
    return replace(record, run_dir=None, card=name)


def _without_paths(card: RunCard) -> dict[str, Any]:
    values = replace(card, sample_grid=None).to_dict()
    return {**values, "config": _cut(values["config"])}


def _cut(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _cut(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_cut(inner) for inner in value]
    return None if isinstance(value, str) and Path(value).is_absolute() else value

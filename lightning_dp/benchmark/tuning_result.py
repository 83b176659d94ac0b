"""Publishes the best run of a selection under the claim of the selection, and nothing of the others."""

import datetime
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from callbacks.run_folder import CLAIM_FILE, GRID_FILE, RELEASE_FOLDER
from lightning_dp.accounting.claim import PrivacyClaim
from lightning_dp.errors import DataError
from lightning_dp.evaluation.report import RunCard, write_run_card
from lightning_dp.modules.published import load_released, save_released
from lightning_dp.networks.classifier import Classifier
from lightning_dp.networks.generator import Generator

CHOICE_FILE = "selected.json"
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The best run of a selection.

    Attributes:
        cell: Id of its cell.
        score: Its metric.
        card: Its own card.
        run_dir: Its folder.
        claim: The claim of the selection, which is that of this run.
        run_id: Id of the selection.
        scores: Metrics of all candidates, where all of them are charged; else empty.
    """

    cell: str
    score: float
    card: RunCard
    run_dir: Path
    claim: PrivacyClaim
    run_id: str
    scores: Mapping[str, float]


def publish_choice(folder: Path, chosen: Chosen, *, score: str) -> RunCard:
    """Write claim, card, samples, configuration and released network of the best run into the selection's folder.

    Guarantee: wherever the run told its own epsilon, the selection's stands: in the claim, the card and the released
    network's record. The run's ledger, metrics and checkpoint stay behind.

    Args:
        folder: The selection's folder, with its ledger.
        chosen: The best run.
        score: Name of the score.

    Returns: The card.
    """
    claim = chosen.claim
    if (chosen.run_dir / GRID_FILE).exists():
        shutil.copyfile(chosen.run_dir / GRID_FILE, folder / GRID_FILE)
    _copy_release(chosen.run_dir, folder, chosen)
    config = {**chosen.card.config, "run_dir": None}  # its name would tell which draw this was, so how many at least
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    card = replace(
        chosen.card,
        title=f"{chosen.card.title}, chosen by {score}",
        run_id=chosen.run_id,
        # The run's own date would tell its place among the draws, as the name of its folder would.
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        config=config,
        claim=claim.to_dict(),
        claim_statement=claim.statement(),
        budget={"target_delta": claim.delta},
        epsilon_curve=(),  # of this run alone, which nobody may take for the price
        sample_grid=GRID_FILE if (folder / GRID_FILE).exists() else None,
    )
    choice = {"cell": chosen.cell, "score": score, "value": chosen.score, "candidates": dict(chosen.scores)}
    (folder / CHOICE_FILE).write_text(json.dumps(choice, indent=1) + "\n", encoding="utf-8")
    text = json.dumps({**claim.to_dict(), "statement": claim.statement()}, indent=2)
    (folder / CLAIM_FILE).write_text(text + "\n", encoding="utf-8")
    write_run_card(folder, card)  # last: a folder with a card is done
    return card


def _copy_release(run_dir: Path, folder: Path, chosen: Chosen) -> None:
    for kind in (Generator, Classifier):
        try:
            network, _ = load_released(run_dir, kind)
        except DataError:
            continue
        save_released(folder / RELEASE_FOLDER, network, chosen.claim.to_dict())

"""Made-up runs: a ledger, a claim computed from it, and a card, without any training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lightning_dp.accounting.calibration import calibrate_noise_multiplier
from lightning_dp.accounting.claiming import claim_from_ledger
from lightning_dp.accounting.events import GaussianRelease, NonPrivateRelease, ReleaseEvent, Sampling
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.accounting.plan import plan_header
from lightning_dp.benchmark.plan import CellPlan
from lightning_dp.benchmark.rows import Result
from lightning_dp.errors import ConfigurationError
from lightning_dp.evaluation.report import RunCard, write_run_card

RELATION, DELTA, NUM_RECORDS = "replace_one", 1e-5, 4000
FULL = Sampling(scheme="full")


def gaussian(noise_multiplier: float) -> GaussianRelease:
    return GaussianRelease(noise_std=noise_multiplier, l2_sensitivity=1.0)


def noise_for(epsilon: float, releases: int) -> float:
    return calibrate_noise_multiplier(
        target_epsilon=epsilon,
        target_delta=DELTA,
        num_releases=releases,
        make_event=gaussian,
        sampling=FULL,
        relation=RELATION,
    )


def ledger_at(path: Path | None, event: ReleaseEvent, releases: int = 3, **header: Any) -> PrivacyLedger:
    """Return a ledger with some releases; `header` goes over the usual one."""
    facts = {"relation": RELATION, "unit": "record", "mechanism": "Gaussian", "target_delta": DELTA}
    data = {"dataset": "digits", "num_records": NUM_RECORDS, "fingerprint": "f", "run_id": "r"}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    ledger = PrivacyLedger({**facts, **data, **header}, path, durable=False)
    for _ in range(releases):
        ledger.append(event, FULL)
    ledger.close()
    return ledger


def card_of(ledger: PrivacyLedger, config: Mapping[str, Any], **changes: Any) -> RunCard:
    """Return the card of a run with this ledger; `changes` are fields of the card."""
    claim = claim_from_ledger(ledger)
    epsilon = config.get("privacy", {}).get("target_epsilon")
    fields: dict[str, Any] = {
        "title": config.get("name", "method"),
        "run_id": "r",
        "created": "2026-01-01T00:00:00+00:00",
        "claim": claim.to_dict(),
        "claim_statement": claim.statement(),
        "budget": {"target_delta": DELTA, **({"target_epsilon": epsilon} if claim.epsilon is not None else {})},
        "mechanism": {"mechanism": claim.mechanism},
        "data": {"name": ledger.header["dataset"], "fingerprint": ledger.header["fingerprint"]},
        "evaluation": evaluation(),
        "cost": dict(train_time_s=1.0, evaluation_time_s=2.0, total_time_s=4.0, cpu_time_s=3.0, peak_memory_mb=512.3),
        "config": config,
    }
    return RunCard(**{**fields, **changes})


def evaluation(accuracy: float = 0.9, fid: float = 12.0, protocol: str = "aaaabbbbcccc") -> dict[str, Any]:
    return {
        "fid": fid,
        "fid_extractor": "digits-fashion-cnn",
        "kid": 1.0,
        "precision": 0.5,
        "recall": 0.25,
        "accuracy": {"cnn": accuracy},
        "num_samples": 100,
        "num_reference": 100,
        "num_test": 100,
        "protocol_hash": protocol,
        "wall_time_s": 2.0,
        "warnings": [],
    }


def result(
    tmp_path: Path,
    *,
    method: str = "method",
    mechanism: str = "Gaussian",
    epsilon: float = 1.0,
    seed: int = 1,
    event: ReleaseEvent | None = None,
    judged: dict[str, Any] | None = None,
    **header: Any,
) -> Result:
    """Return a finished run, calibrated to epsilon unless an event is given."""
    releases = 3
    config = {"name": method, "seed_everything": seed, "privacy": {"target_epsilon": epsilon}}
    chosen = event if event is not None else gaussian(noise_for(epsilon, releases))
    ledger = ledger_at(None, chosen, releases, mechanism=mechanism, **header)
    card = card_of(ledger, config, evaluation=judged or evaluation())
    return Result(card, tmp_path)


# A grid of made-up runs ----------------------------------------------------------------------------------------------

GRID = {
    "name": "made_up",
    "privacy": {"neighboring_relation": RELATION, "target_delta": DELTA},
    "epsilons": [1, 10],
    "seeds": [1, 2],
    "data": ["Digits"],
    "methods": {"first": {"config": "base.yaml", "mechanisms": ["Gaussian", "NoPrivacy"]}},
}
BASE = {
    "name": "base",
    "data": "Digits",
    "model": {"class_path": "Model", "init_args": {"width": 3}},
    "mechanism": {"class_path": "pkg.Gaussian", "init_args": {"max_grad_norm": 2.0}},
    "privacy": {"neighboring_relation": "add_or_remove_one", "target_epsilon": 3, "noise_multiplier": 7.0},
    "trainer": {"max_steps": 3},
}


def write_grid(folder: Path, base: Mapping[str, Any] = BASE, **changes: Any) -> Path:
    """Write a grid and the configuration that it names; `changes` are keys of the grid, `...` removes one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump(dict(base)))
    values = {key: value for key, value in {**GRID, **changes}.items() if value is not ...}
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def plan_made_up(request: Path) -> CellPlan:
    """Plan a request as the command line would; a mechanism named Impossible has no proof."""
    config = yaml.safe_load(request.read_text())
    name = str(config["mechanism"]["class_path"]).rpartition(".")[2]
    if name == "Impossible":
        raise ConfigurationError("--mechanism Impossible has no proof\nfor these rows.")
    if name == "Buggy":
        raise KeyError("width")
    releases, is_private = int(config["trainer"]["max_steps"]), name != "NoPrivacy"
    noise = noise_for(config["privacy"]["target_epsilon"], releases) if is_private else None
    event = gaussian(noise) if noise is not None else NonPrivateRelease()
    header = {
        **{"relation": RELATION, "unit": "record", "mechanism": name, "target_delta": DELTA, "dataset": "digits"},
        **{"num_records": NUM_RECORDS, "fingerprint": "f", "planned": plan_header({(event, FULL): releases})},
    }
    return CellPlan(
        resolved=config, is_private=is_private, noise_multiplier=noise, num_releases=releases, header=header
    )


def make_run(
    run_dir: Path,
    config: Mapping[str, Any],
    *,
    upto: int | None = None,
    accuracy: float | None = None,
    **header: Any,
) -> None:
    """Make, or go on with, the run of a request: all its releases and a card, or the first few releases and none."""
    plan_releases = int(config["trainer"]["max_steps"])
    name = str(config["mechanism"]["class_path"]).rpartition(".")[2]
    is_private = name != "NoPrivacy"
    epsilon = config["privacy"]["target_epsilon"]
    event = gaussian(noise_for(epsilon, plan_releases)) if is_private else NonPrivateRelease()
    path = run_dir / "ledger.jsonl"
    if path.exists():
        ledger = PrivacyLedger.reopen(path, durable=False)
        while len(ledger) < (plan_releases if upto is None else upto):
            ledger.append(event, FULL)
        ledger.close()
    else:
        ledger = ledger_at(path, event, plan_releases if upto is None else upto, mechanism=name, **header)
    if upto is None:
        seed = config["seed_everything"]
        value = accuracy if accuracy is not None else 0.8 + 0.01 * seed + 0.001 * epsilon
        grid = np.zeros((4, 4, 3))
        import matplotlib.image

        matplotlib.image.imsave(str(run_dir / "samples.png"), grid)
        card = card_of(ledger, {**config, "run_dir": str(run_dir)}, evaluation=evaluation(value))
        write_run_card(run_dir, RunCard.from_dict({**card.to_dict(), "sample_grid": "samples.png"}))

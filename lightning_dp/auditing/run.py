"""Audit of a finished run: its ledger against its claim, what it published, and attacks on that."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lightning_dp.accounting.claim import PrivacyClaim
from lightning_dp.accounting.claiming import claim_from_ledger
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.auditing.membership import (
    Scores,
    as_unit,
    audit_membership,
    classifier_loss_scores,
    few,
    generator_loss_scores,
    nearest_sample_scores,
)
from lightning_dp.auditing.result import AuditResult, judge
from lightning_dp.errors import ConfigurationError, DataError
from lightning_dp.evaluation.features import DEFAULT_EXTRACTOR, load_extractor
from lightning_dp.modules.published import load_classifier, load_generator
from lightning_dp.networks.generator import Generator
from lightning_dp.networks.releasable import ReleasableNetwork
from lightning_dp.wording import counted

LEDGER_FILE, CLAIM_FILE, RELEASE_FOLDER, PRIVATE_FOLDER = "ledger.jsonl", "claim.json", "release", "private"

_KINDS = ("generator", "classifier")
_SEARCHED = 200  # records whose latents are searched


def audit_ledger(run: Path) -> AuditResult:
    """Recompute the claim of a run from its ledger and compare it with what the run says.

    Args:
        run: The run folder.

    Raises:
        DataError: There is no ledger.
        LedgerError: It is altered.
    """
    path = run / LEDGER_FILE
    if not path.is_file():
        raise DataError(
            f"Expected a ledger at {path}, found nothing. Give the folder of a run (the one that fit printed)."
        )
    claim = claim_from_ledger(PrivacyLedger.read(path))
    stated = _stated(run)
    problems = [
        f"{name} states another claim than the ledger proves"
        for name, one in stated.items()
        if one is None or _worse(one, claim)
    ]
    return AuditResult(
        audit="ledger",
        subject=str(run.name),
        lower_bound=None,
        confidence=1.0,
        claimed_epsilon=claim.epsilon,
        delta=claim.delta,
        verdict=judge(is_alarm=bool(problems), is_doubt=not stated),
        summary=(
            f"{counted(claim.num_releases, 'release')} verified; {claim.statement()}"
            + "".join(f"; {text}" for text in problems)
        ),
        finds="a claim that the ledger does not bear out, lines that were changed, dropped or reordered",
        misses="releases that never reached the ledger; whole lines cut off the end of the file without a checkpoint",
        measured={"releases": float(claim.num_releases), "statements": float(len(stated))},
    )


def audit_published(run: Path) -> AuditResult:
    """Look at everything in the release folder of a run: nothing but parameters, options and the claim may be there.

    Args:
        run: The run folder.

    Raises:
        DataError: There is no release folder.
    """
    folder = run / RELEASE_FOLDER
    if not folder.is_dir():
        raise DataError(
            f"Expected the published model in {folder}, found nothing. Give the folder of a run that ended."
        )
    network = _network(run)
    names = {name for name, _ in network.named_parameters()}
    problems = []
    for path in sorted(folder.rglob("*")):
        if path.name not in {f"{kind}{suffix}" for kind in _KINDS for suffix in (".json", ".safetensors")}:
            problems.append(f"{path.name} does not belong to a released model")
    with safe_open(folder / f"{network.kind}.safetensors", "pt") as file:
        problems += [f"tensor {name} is no parameter of the network" for name in file.keys() if name not in names]  # noqa: SIM118
        if file.metadata():
            problems.append("the weights carry metadata")
    private = run / PRIVATE_FOLDER
    if private.is_dir() and private.stat().st_mode & 0o077:
        problems.append("the private folder can be read by other users")
    return AuditResult(
        audit="published model",
        subject=f"{type(network).__name__} of {run.name}",
        lower_bound=None,
        confidence=1.0,
        claimed_epsilon=None,
        delta=0.0,
        verdict=judge(is_alarm=bool(problems), is_doubt=False),
        summary="; ".join(problems)
        if problems
        else f"{len(names)} parameters of {type(network).__name__}, nothing else",
        finds="teachers, optimizer states, batch statistics or other files beside the released parameters",
        misses="what the parameters themselves have learned past the door (the audit of the method looks for that)",
        measured={"parameters": float(len(names)), "problems": float(len(problems))},
    )


def attack_run(
    run: Path, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, num_samples: int, confidence: float
) -> list[AuditResult]:
    """Attack what a run published, with its private records as members.

    Args:
        run: The run folder.
        train: Images, uint8, and labels of the training split. Private.
        test: Images and labels of the test split.
        num_samples: Samples that the attacker draws.
        confidence: Of the intervals.
    """
    claim = claim_from_ledger(PrivacyLedger.read(run / LEDGER_FILE))
    network = _network(run)
    found: list[Scores] = []
    members, others = (as_unit(train[0]), train[1]), (as_unit(test[0]), test[1])
    num = min(len(members[0]), len(others[0]))
    members, others = few(members, num), few(others, num)
    if isinstance(network, Generator):
        samples, _ = network.sample(num_samples, seed=1)
        embed = _embedding()
        found.append(nearest_sample_scores(samples, members[0], others[0], name="the nearest sample"))
        found.append(
            nearest_sample_scores(samples, members[0], others[0], embed=embed, name="the nearest sample in features")
        )
        found.append(generator_loss_scores(network, few(members, _SEARCHED), few(others, _SEARCHED)))
    else:
        found.append(classifier_loss_scores(network, members, others))  # type: ignore[arg-type]
    return [
        audit_membership(
            scores, subject=run.name, claimed_epsilon=claim.epsilon, delta=claim.delta, confidence=confidence
        )
        for scores in found
    ]


def _embedding() -> Callable[[Tensor], Tensor]:
    """Return the map to the features of the shipped extractor, which has seen public data only."""
    extractor: Any = load_extractor(DEFAULT_EXTRACTOR)
    return lambda images: extractor((images * 255).round().clamp(0, 255).byte())


def _network(run: Path) -> ReleasableNetwork:
    """Return what a run published, generator or classifier."""
    try:
        return load_generator(run)[0]
    except DataError:
        return load_classifier(run)[0]


def _stated(run: Path) -> dict[str, PrivacyClaim | None]:
    """Return the claims that a run states of itself, by the file that does; None where one cannot be read."""
    found: dict[str, PrivacyClaim | None] = {}
    places = {CLAIM_FILE: run / CLAIM_FILE}
    places |= {f"{RELEASE_FOLDER}/{kind}.json": run / RELEASE_FOLDER / f"{kind}.json" for kind in _KINDS}
    for name, path in places.items():
        if not path.is_file():
            continue
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            found[name] = PrivacyClaim.from_dict(written.get("claim", written))
        except (ValueError, TypeError, KeyError, OSError, ConfigurationError):
            found[name] = None
    return found


def _worse(stated: PrivacyClaim, proved: PrivacyClaim) -> bool:
    """Tell whether a run states what its ledger does not prove."""
    return stated != proved

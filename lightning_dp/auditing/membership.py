"""Membership inference on what a run released: an attacker with samples, or the generator, asks who was trained on.

Members are the training split, non-members the test split, so this reads private records: its numbers say something of
them, are covered by no epsilon, and stay private unless somebody pays for them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from lightning_dp.auditing.bounds import clopper_pearson_interval, tail_errors
from lightning_dp.auditing.result import ALARM_CONFIDENCE, AuditResult, Line, Plot, judge
from lightning_dp.networks.classifier import Classifier
from lightning_dp.networks.generator import Generator

PRIVATE_NOTE = (
    "This report was computed from private records without noise. It is private itself: no epsilon covers it, and it "
    "must not be published or used to choose between runs unless a release pays for it."
)
FINDS = "samples or a generator that remember single records, seen by the attacks that are tried"
MISSES = (
    "stronger attacks; an honest run gives no sign of its epsilon here: typical records lie far from the worst case, "
    "so a small advantage proves nothing"
)
RATES = (0.01, 0.001)
"""False positive rates at which the true positive rate is told."""

_CHUNK = 256
_STEPS = 60
_RESTARTS = 4


@dataclass(frozen=True)
class Scores:
    """Attack scores, larger for members.

    Attributes:
        attack: Name.
        members: (n,).
        others: (m,).
    """

    attack: str
    members: NDArray[np.float64]
    others: NDArray[np.float64]


def nearest_sample_scores(
    samples: Tensor, members: Tensor, others: Tensor, *, embed: Callable[[Tensor], Tensor] | None = None, name: str
) -> Scores:
    """Score records by how near they lie to a sample.

    Args:
        samples: Released samples, (k, C, H, W), in [0, 1].
        members: Records that were trained on, in [0, 1].
        others: Records that were not.
        embed: Public map to a space where nearness means more; None compares pixels.
        name: Of the attack.
    """
    place = (lambda images: images.flatten(1)) if embed is None else embed
    cloud = place(samples)

    def score(records: Tensor) -> NDArray[np.float64]:
        nearest = [torch.cdist(place(few), cloud).min(dim=1).values for few in records.split(_CHUNK)]
        return -torch.cat(nearest).double().numpy()

    return Scores(name, score(members), score(others))


def generator_loss_scores(
    generator: Generator, members: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor], *, seed: int = 0
) -> Scores:
    """Score records by how closely the generator can be made to draw them, over latents found by descent.

    Args:
        generator: The released generator.
        members: Images in [0, 1] and labels that were trained on; few, since each takes a search.
        others: Images and labels that were not.
        seed: Public seed of the first latents.
    """
    generator.requires_grad_(requires_grad=False)
    stream = torch.Generator().manual_seed(seed)

    def score(records: tuple[Tensor, Tensor]) -> NDArray[np.float64]:
        images, labels = records
        best = torch.full((len(images),), torch.inf)
        for _ in range(_RESTARTS):
            latent = generator.sample_latent(len(images), stream).requires_grad_()
            optimizer = torch.optim.Adam([latent], lr=0.1)
            for _ in range(_STEPS):
                loss = (generator(latent, labels) - images).square().flatten(1).mean(1)
                best = torch.minimum(best, loss.detach())
                optimizer.zero_grad()
                loss.sum().backward()
                optimizer.step()
        return -best.double().numpy()

    return Scores("generator loss", score(members), score(others))


def classifier_loss_scores(
    classifier: Classifier, members: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor]
) -> Scores:
    """Score records by the loss of a released classifier: low on what it has seen.

    Args:
        classifier: The released classifier.
        members: Images in [0, 1] and labels that were trained on.
        others: Images and labels that were not.
    """

    @torch.no_grad()
    def score(records: tuple[Tensor, Tensor]) -> NDArray[np.float64]:
        pairs = zip(*(tensor.split(_CHUNK) for tensor in records), strict=True)
        losses = [torch.nn.functional.cross_entropy(classifier(x), y, reduction="none") for x, y in pairs]
        return -torch.cat(losses).double().numpy()

    return Scores("classifier loss", score(members), score(others))


def audit_membership(
    scores: Scores,
    *,
    subject: str,
    claimed_epsilon: float | None,
    delta: float,
    confidence: float = 0.95,
    seed: int = 0,
) -> AuditResult:
    """Return what an attack achieves: AUC and true positive rates, with intervals, and the epsilon that they refute.

    Members and non-members are treated as independent draws of one population, which a random split makes them.

    Args:
        scores: Of the attack.
        subject: What was attacked.
        claimed_epsilon: Of the run; None if it claims none.
        delta: Of the claim.
        confidence: Of all intervals, one by one.
        seed: Of the bootstrap and of the order of the records.
    """
    stream = np.random.default_rng(seed)
    members, others = stream.permutation(scores.members), stream.permutation(scores.others)
    area, low, high = _area_with_interval(members, others, confidence, stream)
    measured: dict[str, float] = {"auc": area, "auc_low": low, "auc_high": high}
    told = [f"AUC {area:.3f} [{low:.3f}, {high:.3f}]"]
    for rate in RATES:
        found, left, right = _power_at(members, others, rate, confidence)
        measured |= {f"tpr_at_{rate:g}": found, f"tpr_at_{rate:g}_low": left, f"tpr_at_{rate:g}_high": right}
        told.append(f"TPR {found:.2%} [{left:.2%}, {right:.2%}] at {rate:.1%} FPR")
    errors = tail_errors(others, members, delta=delta)
    bound = errors.epsilon(delta=delta, confidence=confidence)
    alarm = errors.epsilon(delta=delta, confidence=ALARM_CONFIDENCE)
    claimed = np.inf if claimed_epsilon is None else claimed_epsilon
    return AuditResult(
        audit=f"membership by {scores.attack}",
        subject=subject,
        lower_bound=bound,
        confidence=confidence,
        claimed_epsilon=claimed_epsilon,
        delta=delta,
        verdict=judge(is_alarm=alarm > claimed, is_doubt=bound > claimed),
        summary=f"{'; '.join(told)}; {len(members)} members, {len(others)} others",
        finds=FINDS,
        misses=MISSES,
        measured=measured,
        plot=_roc(members, others),
    )


def _area(members: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    ranks = stats.rankdata(np.concatenate([members, others]))
    num = len(members)
    return float((ranks[:num].sum() - num * (num + 1) / 2) / (num * len(others)))


def _area_with_interval(
    members: NDArray[np.float64], others: NDArray[np.float64], confidence: float, stream: np.random.Generator
) -> tuple[float, float, float]:
    """Return the area under the curve and its bootstrap interval."""
    drawn = [_area(stream.choice(members, len(members)), stream.choice(others, len(others))) for _ in range(200)]
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return _area(members, others), float(low), float(high)


def _power_at(
    members: NDArray[np.float64], others: NDArray[np.float64], rate: float, confidence: float
) -> tuple[float, float, float]:
    """Return the share of members above the threshold that lets `rate` of the others through, with its interval."""
    allowed = int(rate * len(others))  # strictly above the next one: no more than allowed pass
    threshold = np.sort(others)[::-1][allowed]
    count = int((members > threshold).sum())
    return count / len(members), *clopper_pearson_interval(count, len(members), confidence)


def _roc(members: NDArray[np.float64], others: NDArray[np.float64]) -> Plot:
    thresholds = np.quantile(np.concatenate([members, others]), np.linspace(0, 1, 400))
    x = tuple(float((others > t).mean()) for t in thresholds)
    y = tuple(float((members > t).mean()) for t in thresholds)
    grid = tuple(np.logspace(-4, 0, 50).tolist())
    return Plot(
        x_label="false positive rate",
        y_label="true positive rate",
        lines=(Line(label="attack", x=x, y=y), Line(label="guessing", x=grid, y=grid, is_dashed=True)),
        log_x=True,
        log_y=True,
    )


def as_unit(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1]."""
    return images.float() / 255


def few(records: tuple[Tensor, Tensor], num: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return some records, chosen by a public seed."""
    chosen = torch.randperm(len(records[0]), generator=torch.Generator().manual_seed(seed))[:num]
    return records[0][chosen], records[1][chosen]

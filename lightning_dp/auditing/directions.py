"""Audit A of directional noise: how closely von Mises-Fisher directions follow what they hide."""

import math

import torch
from scipy import stats

from lightning_dp.accounting.bessel import mean_resultant_length
from lightning_dp.auditing.door import Door
from lightning_dp.auditing.neighbours import neighbouring_pairs
from lightning_dp.auditing.result import AuditResult, Plot, judge
from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.von_mises_fisher import VonMisesFisher

FINDS = "another concentration than the stated one, directions off the sphere, the same direction every time"
MISSES = "too large a sensitivity; a law with the right mean and spread that is not von Mises-Fisher"

_ALARM_P = 1e-5
_SHOWN = 4000


def audit_directions(door: Door, *, calls: int = 2000, confidence: float = 0.95, delta: float = 1e-5) -> AuditResult:
    """Compare the component of released directions along the row that they hide with its law.

    Args:
        door: What is audited; its mechanism is `VonMisesFisher`.
        calls: Releases of one row on the bound.
        confidence: Below which a deviation raises a doubt.
        delta: Of the claim.

    Raises:
        ConfigurationError: Another mechanism.
    """
    mechanism, plan = door.mechanism, door.plan
    if not isinstance(mechanism, VonMisesFisher):
        raise ConfigurationError(f"Expected the mechanism VonMisesFisher, got {type(mechanism).__name__}.")
    row = next(pair for pair in neighbouring_pairs(door) if "nothing" in pair.name).left[:1]
    encoded = door.open(silent=True).release(row).measured  # the row within its bound, without noise
    dim = plan.spec.vector_dim * (plan.spec.num_vectors if mechanism.form == "central" else 1)
    means = encoded.reshape(-1, dim)
    means = means[means.norm(dim=1) > 0]
    kappa = mechanism.concentration(plan) * float(means[0].norm())
    opened = door.open()
    drawn = torch.stack([opened.release(row).noisy.reshape(-1, dim)[: len(means)] for _ in range(calls)])
    along = (drawn * (means / means.norm(dim=1, keepdim=True))).sum(-1).flatten().numpy()
    mean = float(mean_resultant_length(dim, kappa))
    variance = 1 - mean**2 - (dim - 1) * mean / kappa
    z_mean = (along.mean() - mean) / math.sqrt(variance / len(along))
    spread = ((along - mean) ** 2 / variance).mean() - 1
    z_spread = spread / math.sqrt(((along - mean) ** 2 / variance).var() / len(along))
    off = float((drawn.norm(dim=-1) - 1).abs().max())
    p = 2 * float(stats.norm.sf(max(abs(z_mean), abs(z_spread))))
    return AuditResult(
        audit="directions",
        subject=str(door),
        lower_bound=None,
        confidence=confidence,
        claimed_epsilon=door.epsilon(delta),
        delta=delta,
        verdict=judge(is_alarm=p < _ALARM_P or off > 1e-9, is_doubt=p < (1 - confidence) / 50),
        summary=(
            f"component along the row {along.mean():.5g}, {mean:.5g} stated for concentration {kappa:.4g} (z "
            f"{z_mean:.2f}; spread z {z_spread:.2f}); length off by {off:.1g}"
        ),
        finds=FINDS,
        misses=MISSES,
        measured={"along": float(along.mean()), "stated": mean, "z_mean": float(z_mean), "z_spread": float(z_spread)},
        plot=Plot(
            x_label="component along the row", y_label="density", histograms={"drawn": tuple(along[:_SHOWN].tolist())}
        ),
    )

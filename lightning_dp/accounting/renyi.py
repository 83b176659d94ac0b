"""Renyi curves of single releases, by dp-accounting where it has them, and guards where its answers cannot be used."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Final

import dp_accounting
import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.rdp import RdpAccountant
from numpy.typing import NDArray

from lightning_dp.accounting.events import (
    AdditiveRelease,
    DiscreteGaussianRelease,
    GaussianRelease,
    ReleaseEvent,
    Sampling,
    SelectionRelease,
    TernaryRelease,
    VonMisesFisherRelease,
    ZCDPRelease,
)
from lightning_dp.accounting.release import Release
from lightning_dp.accounting.sampled_curve import discrete_gaussian_rdp, replace_one_renyi
from lightning_dp.accounting.selection_release import selection_rdp
from lightning_dp.accounting.ternary import ternary_rdp
from lightning_dp.accounting.von_mises_fisher import von_mises_fisher_rdp

RDP_ORDERS: tuple[float, ...] = tuple(float(order) for order in RdpAccountant().orders)
"""dp-accounting's default orders, as Python floats."""

MAX_MU: Final = 1e50
"""Beyond it, and below its inverse, squares leave the floats; less noise is a sound stand-in."""

_FULL = Sampling(scheme="full")


@lru_cache(maxsize=1024)
def renyi_curve(event: ReleaseEvent, sampling: Sampling) -> NDArray[np.float64]:
    """Return the Renyi divergences of one release at `RDP_ORDERS`, infinity where nothing is proved; read-only.

    The sensitivity already knows the relation. Not for Poisson-sampled Gaussians under replace-one, of which it knows
    nothing.

    Args:
        event: What the release cost.
        sampling: How records entered it.
    """
    if isinstance(event, AdditiveRelease) and event.mu > MAX_MU:
        curve = np.full(len(RDP_ORDERS), np.inf)
    elif isinstance(event, TernaryRelease) and sampling == _FULL:
        curve = ternary_rdp(event, RDP_ORDERS)
    elif isinstance(event, DiscreteGaussianRelease):
        with _silent_about_skipped_orders(), np.errstate(over="ignore"):
            curve = discrete_gaussian_rdp(event, sampling, RDP_ORDERS)
    elif isinstance(event, SelectionRelease):
        curve = selection_rdp(event, RDP_ORDERS, relation_curve)
    elif isinstance(event, VonMisesFisherRelease):
        curve = von_mises_fisher_rdp(event, RDP_ORDERS)  # unsampled: sampling never makes a release worse
    else:
        accountant = RdpAccountant(RDP_ORDERS, NeighboringRelation.ADD_OR_REMOVE_ONE)
        with _silent_about_skipped_orders(), np.errstate(over="ignore"):
            accountant.compose(library_event(event, sampling, factor=1.0))
        curve = np.asarray(accountant.rdp, dtype=np.float64)
    # dp-accounting converts a NaN or a negative divergence into epsilon 0; such an order proves nothing.
    curve = np.where(np.isnan(curve) | (curve < 0.0), np.inf, curve)
    curve.setflags(write=False)
    return curve


@lru_cache(maxsize=1024)
def relation_curve(event: Release, sampling: Sampling, relation: NeighboringRelation) -> NDArray[np.float64]:
    """Return the Renyi divergences of one release at `RDP_ORDERS` under a relation, sampled or not; read-only.

    Sampling never makes a release worse, so what is known without it holds with it.

    Args:
        event: What the release cost.
        sampling: How records entered it.
        relation: The relation of its sensitivity.
    """
    assert isinstance(event, ReleaseEvent)
    full = renyi_curve(event, _FULL)
    if sampling == _FULL:
        return full
    if relation is not NeighboringRelation.REPLACE_ONE:
        return np.fmin(full, renyi_curve(event, sampling))
    if not isinstance(event, GaussianRelease):
        return full
    sampled = [replace_one_renyi(event.noise_multiplier, sampling.rate, order) for order in RDP_ORDERS]
    return np.fmin(full, np.asarray(sampled))


@contextmanager
def _silent_about_skipped_orders() -> Iterator[None]:
    """Hide dp-accounting's warning that it skips an order: it is sound, and a search meets it at every small noise."""
    logger = logging.getLogger("absl")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def library_event(event: ReleaseEvent, sampling: Sampling, *, factor: float) -> dp_accounting.DpEvent:
    """Return dp-accounting's event.

    Args:
        event: Gaussian or zCDP.
        sampling: How records entered it.
        factor: What the accountant wants of our noise multiplier (noise_std / l2_sensitivity).
    """
    if isinstance(event, ZCDPRelease):
        return dp_accounting.ZCDpEvent(event.rho)  # unsampled: sampling never makes a release worse
    assert isinstance(event, GaussianRelease)  # non-private events never get here
    gaussian = dp_accounting.GaussianDpEvent(float(min(factor * event.noise_multiplier, MAX_MU)))
    return gaussian if sampling == _FULL else dp_accounting.PoissonSampledDpEvent(sampling.rate, gaussian)

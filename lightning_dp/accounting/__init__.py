"""Privacy events, the ledger of releases, accountants, calibration and claims: numbers only, no tensors."""

from lightning_dp.accounting.accountants import (
    EpsilonResult,
    compute_epsilon,
    gswgan_paper_epsilon,
    paper_epsilon,
    would_exceed,
)
from lightning_dp.accounting.calibration import calibrate_noise_multiplier, max_releases
from lightning_dp.accounting.claim import ClaimLevel, PrivacyClaim
from lightning_dp.accounting.claiming import make_claim
from lightning_dp.accounting.events import (
    RELATION_NAMES,
    DiscreteGaussianRelease,
    GaussianRelease,
    NonPrivateRelease,
    ReleaseEvent,
    RoundedGaussianRelease,
    RoundedTernaryRelease,
    Sampling,
    TernaryRelease,
    VonMisesFisherRelease,
    ZCDPRelease,
    event_from_dict,
    parse_relation,
    relation_name,
)
from lightning_dp.accounting.ledger import LedgerEntry, PrivacyLedger

__all__ = [
    "RELATION_NAMES",
    "ClaimLevel",
    "DiscreteGaussianRelease",
    "EpsilonResult",
    "GaussianRelease",
    "LedgerEntry",
    "NonPrivateRelease",
    "PrivacyClaim",
    "PrivacyLedger",
    "ReleaseEvent",
    "RoundedGaussianRelease",
    "RoundedTernaryRelease",
    "Sampling",
    "TernaryRelease",
    "VonMisesFisherRelease",
    "ZCDPRelease",
    "calibrate_noise_multiplier",
    "compute_epsilon",
    "event_from_dict",
    "gswgan_paper_epsilon",
    "make_claim",
    "max_releases",
    "paper_epsilon",
    "parse_relation",
    "relation_name",
    "would_exceed",
]

"""What a mechanism is told besides the rows: the plan of a run, and the context of one release."""

import math
from dataclasses import dataclass

from dp_accounting import NeighboringRelation
from torch import Tensor

from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.contributions import ContributionSpec
from lightning_dp.mechanisms.noise import NoiseSource


@dataclass(frozen=True, kw_only=True)
class ReleasePlan:
    """What is fixed before the first release: the rows, the relation and the noise.

    Attributes:
        spec: Public facts about the rows.
        relation: The neighbouring relation of the claim.
        noise_multiplier: Noise std / L2 sensitivity under `relation`, dimensionless.
    """

    spec: ContributionSpec
    relation: NeighboringRelation
    noise_multiplier: float

    def __post_init__(self) -> None:
        value = float(self.noise_multiplier)
        if not (math.isfinite(value) and value > 0):
            raise ConfigurationError(
                f"Expected a finite privacy.noise_multiplier > 0, got {self.noise_multiplier}. "
                "Use --mechanism NoPrivacy for a run without noise."
            )
        object.__setattr__(self, "noise_multiplier", value)


@dataclass(frozen=True, kw_only=True)
class EncodeContext:
    """What `Mechanism.encode` may use besides the rows: public randomness, and coins that no observer knows.

    Attributes:
        release_number: Number of the release in the ledger.
        public_seed: Seed of public randomness (projections, rotations); reproducible and data-independent.
        noise: The secret source, for coins.
        row_ids: Stable id of each row (teacher number), so that coins do not depend on chunking.
        first_vector: Index, in the whole release, of the first vector that these rows judge.
    """

    release_number: int
    public_seed: int
    noise: NoiseSource
    row_ids: Tensor
    first_vector: int = 0

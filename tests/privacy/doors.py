"""Small doors that the audits and their broken twins share."""

import itertools
from dataclasses import replace

from dp_accounting import NeighboringRelation

from lightning_dp.auditing.door import Door
from lightning_dp.mechanisms.base import ContributionSpec, Mechanism, ReleasePlan
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.noise import NoiseSource

ADD_REMOVE = NeighboringRelation.ADD_OR_REMOVE_ONE
REPLACE = NeighboringRelation.REPLACE_ONE

RECORDS = ContributionSpec.records(expected_batch_size=32, vector_dim=64, segments=(16, 16, 16, 16))
TEACHERS = ContributionSpec.teachers(num_teachers=40, vectors_per_row=3, vector_dim=16)
CLASS_WISE = ContributionSpec.class_wise_teachers(
    num_teachers=40, num_classes=4, images_per_class=2, vector_dim=16, single_record=True
)
STATISTICS = ContributionSpec.statistics(num_cells=4, vector_dim=16, rows_never_oppose=True)
JOINT = ContributionSpec.joint(num_vectors=4, vector_dim=16)


def repeatable(made: Door) -> Door:
    """The same door with noise that is another at every opening, and the same in every run of the tests."""
    openings = itertools.count()
    return replace(made, make_noise=lambda seed: NoiseSource(insecure_seed=next(openings) if seed is None else seed))


def door(
    mechanism: Mechanism | None = None,
    spec: ContributionSpec = RECORDS,
    relation: NeighboringRelation = ADD_REMOVE,
    noise_multiplier: float = 1.0,
    **parts,
) -> Door:
    plan = ReleasePlan(spec=spec, relation=relation, noise_multiplier=noise_multiplier)
    return Door(mechanism=mechanism or Gaussian(), plan=plan, **parts)

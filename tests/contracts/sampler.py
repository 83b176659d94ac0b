"""Statistics that a Poisson sampler passes and its imitations fail, from the audit of samplers."""

from lightning_dp.auditing.sampling import (
    batch_variance_z,
    cross_z,
    masks,
    rate_z,
    record_variance_z,
    repeat_z,
    statistics,
)

__all__ = ["batch_variance_z", "cross_z", "masks", "rate_z", "record_variance_z", "repeat_z", "statistics"]

"""Statistics that a Poisson sampler passes and its imitations fail; each is close to standard normal for a true one."""

import math

import torch


def masks(sampler, num_records: int, num_steps: int) -> torch.Tensor:
    """Inclusions of `num_steps` steps, (num_steps, num_records), float64 zeros and ones."""
    joins = torch.zeros(num_steps, num_records, dtype=torch.float64)
    for row in joins:
        row[sampler.draw()] = 1
    return joins


def rate_z(joins: torch.Tensor, rate: float) -> float:
    """Total number of inclusions: catches dropped last batches and capped batches."""
    return (joins.sum().item() - joins.numel() * rate) / math.sqrt(joins.numel() * rate * (1 - rate))


def batch_variance_z(joins: torch.Tensor, rate: float) -> float:
    """Spread of the batch sizes: catches fixed sizes, for which it is about -sqrt(steps / 2)."""
    steps, records = joins.shape
    variance = ((joins.sum(1) - records * rate) ** 2).mean().item()
    return (variance / (records * rate * (1 - rate)) - 1) * math.sqrt(steps / 2)


def record_variance_z(joins: torch.Tensor, rate: float) -> float:
    """Spread of how often each record joined: catches passes over the data, in which all join equally often."""
    return batch_variance_z(joins.T, rate)


def repeat_z(joins: torch.Tensor, rate: float) -> float:
    """Records that join two steps in a row: catches shuffled passes, in which a batch excludes the one before."""
    return _overlap_z(joins[:-1], joins[1:], rate)


def cross_z(joins: torch.Tensor, others: torch.Tensor, rate: float) -> float:
    """Records that join the same step of two samplers: catches one stream used by two processes, or twice."""
    return _overlap_z(joins, others, rate)


def _overlap_z(first: torch.Tensor, second: torch.Tensor, rate: float) -> float:
    both = (first - rate) * (second - rate)
    return both.sum().item() / (math.sqrt(both.numel()) * rate * (1 - rate))


def statistics(joins: torch.Tensor, rate: float) -> dict[str, float]:
    """All statistics of one stream."""
    return {
        "rate": rate_z(joins, rate),
        "batch_variance": batch_variance_z(joins, rate),
        "record_variance": record_variance_z(joins, rate),
        "repeat": repeat_z(joins, rate),
    }

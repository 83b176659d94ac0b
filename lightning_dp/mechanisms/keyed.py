"""Random numbers that belong to a row: keyed by its id, the same however rows are chunked or ordered."""

import math

import torch
from torch import Tensor

# Constants of the SplitMix64 generator (Steele, Lea and Flood 2014), as signed 64-bit integers.
_GOLDEN = -0x61C8864680B583EB
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15


def keyed_uniform(shape: torch.Size, *, seed: int, row_ids: Tensor, first_vector: int) -> Tensor:
    """Return uniforms in [0, 1) that depend on (seed, row id, vector, coordinate) and on nothing else.

    A counter-based generator (SplitMix64), so that a row's coins are the same however rows are chunked and on whatever
    device they are drawn. The guarantee needs coins that do not depend on other rows' data, not secret ones.

    Args:
        shape: (num_rows, num_vectors, vector_dim), with vector_dim <= 2^20 and first_vector + num_vectors <= 2^12.
        seed: Key of the stream.
        row_ids: Stable row ids, (num_rows,), below 2^31.
        first_vector: Index of the first vector in the whole release.

    Raises:
        ValueError: The indices do not fit the counter.
    """
    _, num_vectors, dim = shape
    if dim > 2**20 or first_vector + num_vectors > 2**12:
        raise ValueError(f"Expected vector_dim <= 2^20 and at most 2^12 vectors, got dim={dim}, {num_vectors=}.")
    device = row_ids.device
    rows = row_ids.to(torch.int64)[:, None, None] << 32
    vectors = (torch.arange(num_vectors, device=device) + first_vector)[None, :, None] << 20
    counter = rows + vectors + torch.arange(dim, device=device)
    mixed = counter * _GOLDEN + seed
    mixed = (mixed ^ _shift_right(mixed, 30)) * _MIX_1
    mixed = (mixed ^ _shift_right(mixed, 27)) * _MIX_2
    mixed = mixed ^ _shift_right(mixed, 31)
    return _shift_right(mixed, 40).to(torch.float32) * 2.0**-24


def keyed_normal(shape: torch.Size, *, seed: int, row_ids: Tensor, first_vector: int = 0) -> Tensor:
    """Return standard normals that depend on (seed, row id, vector, coordinate) only; float32, for sampling, not noise.

    The tails end at 5.4 standard deviations, so these draws must never be the noise of a release (see `NoiseSource`).

    Args:
        shape: As in `keyed_uniform`.
        seed: As in `keyed_uniform`.
        row_ids: As in `keyed_uniform`.
        first_vector: As in `keyed_uniform`.
    """
    uniform = keyed_uniform(shape, seed=seed, row_ids=row_ids, first_vector=first_vector).to(torch.float64)
    centred = 2 * uniform - 1 + 2.0**-24  # the middle of each of 2^24 cells, never an end of the interval
    return (math.sqrt(2) * torch.erfinv(centred)).to(torch.float32)


def seed_for_moved(seed: int, places: int) -> int:
    """Return the seed under which row i has the draws that row i + places has under `seed`; for audits.

    Args:
        seed: Of `keyed_uniform` or `keyed_normal`.
        places: How far rows moved up.
    """
    return (seed + (places << 32) * _GOLDEN + 2**63) % 2**64 - 2**63


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Shift 64-bit integers right without carrying the sign in."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)

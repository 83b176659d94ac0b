"""Poisson sampling of records: every record joins a step by its own secret coin."""

import hashlib
import math
import secrets
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from lightning_dp.errors import ConfigurationError
from lightning_dp.mechanisms.keystream import KEY_BYTES, keystream


class PoissonSampler:
    """Draws the records of each step, each with the same probability and independently of all others and of the past.

    The amplification by sampling that the accountant grants rests on three facts, which tests check: inclusions are
    independent, the sizes of batches vary (empty ones are possible and must be released like any other), and no stream
    of coins is ever used twice. The key is therefore read from the operating system at every start, lives in memory
    only, and cannot be pickled, copied or restored: a resumed run draws new coins.

    Guarantee: given the indices drawn, nothing about the coins of other steps or records is known; the indices and
    their number are private and must not leave.

    Args:
        num_records: Number of records N, public.
        rate: Probability q that a record joins a step, 0 < q <= 1.
        insecure_seed: Fixes the coins for debugging. A run with fixed coins is not private; the claim says so.
        owned: The records whose coins are flipped here, in rising order; None for all. Each record has one owner among
            the processes of a run, and owners have keys of their own: with one key for two, whoever learns that a
            record joined would learn it of its twin.

    Raises:
        ConfigurationError: A value is out of range.

    Example:
        >>> PoissonSampler(4, rate=1.0).draw()
        tensor([0, 1, 2, 3])
    """

    def __init__(
        self, num_records: int, rate: float, insecure_seed: int | None = None, owned: range | None = None
    ) -> None:
        if num_records < 1:
            raise ConfigurationError(f"Expected num_records >= 1 to sample from, got num_records={num_records}.")
        if not (math.isfinite(rate) and 0 < rate <= 1):
            raise ConfigurationError(
                f"Expected 0 < sampling rate <= 1, got rate={rate}. Set model.expected_batch_size to at most the "
                f"{num_records} records."
            )
        self.num_records = num_records
        self.rate = float(rate)
        self.owned = range(num_records) if owned is None else owned
        self.is_secret = insecure_seed is None
        key = secrets.token_bytes(KEY_BYTES) if insecure_seed is None else _insecure_key(insecure_seed)
        self._stream = keystream(key)

    def draw(self) -> Tensor:
        """Return the owned records of the next step: distinct indices, rising, int64, possibly none. Private."""
        # Uniforms are multiples of 2^-53, so the executed rate is `rate` rounded up to such a multiple: 1e-16 above it.
        if self.is_secret:
            joins = self._stream.random(len(self.owned)) < self.rate
        else:  # the same coins however many processes there are
            mine = slice(self.owned.start, self.owned.stop, self.owned.step)
            joins = self._stream.random(self.num_records)[mine] < self.rate
        return torch.from_numpy(self.owned.start + self.owned.step * np.flatnonzero(joins).astype(np.int64))

    def __reduce__(self) -> NoReturn:
        raise TypeError("A PoissonSampler holds a secret stream and cannot be pickled or copied; make a new one.")

    def __repr__(self) -> str:
        return f"PoissonSampler(num_records={self.num_records}, rate={self.rate}, is_secret={self.is_secret})"


def _insecure_key(seed: int) -> bytes:
    # Another name than the noise source's, so that one debugging seed does not give both the same stream.
    return hashlib.blake2b(f"insecure-sampler:{seed}".encode(), digest_size=KEY_BYTES).digest()

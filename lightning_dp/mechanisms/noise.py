"""The secret noise source: float64 draws keyed by (secret, release number, leaf), never a replayable stream.

Every draw comes from a cipher in counter mode (`keystream`) whose key is the BLAKE2b hash of the process secret and the
draw's name (of a long release: of each part of it). The result does not depend on the order of the draws, on chunking,
on threads or on the rank. The secret is read from the operating system at every process start, lives in memory only,
and is never logged, pickled or saved, so a resumed run cannot repeat noise; a forked child, which would repeat its
parent's, is refused.
Whoever knows some draws, even all but one, cannot tell that one from a draw by chance, as far as BLAKE2b and the cipher
hold (AES differs from chance in that no block of 128 bits comes twice: by 2^-93 in a part). Noise in whole numbers
(`NoiseSource.whole`) comes from SHAKE-256.
"""

import hashlib
import math
import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Final, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dp.errors import PrivacyProtocolError
from lightning_dp.mechanisms.keystream import KEY_BYTES, keystream, rekeyed
from lightning_dp.mechanisms.whole_noise import WholeLaw, whole_noise

_BLOCK: Final = 2**15  # draws that stay in the cache until they are added
_PART: Final = 2**18  # draws of one key: a longer release has several, which threads may draw at the same time


class NoiseSource:
    """Draws Gaussian noise and coins from a secret key.

    Args:
        insecure_seed: Fixes the secret for debugging. A run with a fixed secret is not private; the claim says so.
    """

    def __init__(self, *, insecure_seed: int | None = None) -> None:
        self.is_secret = insecure_seed is None
        self._process = os.getpid()
        self._newest = 0  # release that was begun last
        if insecure_seed is None:
            self._secret = secrets.token_bytes(32)
        else:
            self._secret = hashlib.blake2b(f"insecure:{insecure_seed}".encode(), digest_size=32).digest()

    def adopt_secret(self, secret: bytes) -> None:
        """Replace the secret by the one of rank 0, so that all ranks draw the same noise.

        Raises:
            ValueError: `secret` is not 32 bytes long.
        """
        if len(secret) != 32:
            raise ValueError(
                f"Expected a secret of 32 bytes, got {len(secret)}. Broadcast the secret of rank 0 unchanged."
            )
        self._secret = secret

    def export_secret(self) -> bytes:
        """Return the secret for a broadcast to the other ranks of this run; never write it anywhere."""
        return self._secret

    def begin(self, release_number: int) -> None:
        """Take up the next release, whose number must be above all before.

        Two ledgers that share a source would both make a release 1, under the same noise: their difference hides
        nothing. Under an insecure seed, which audits want for that very purpose, nothing is hidden anyway.

        Raises:
            PrivacyProtocolError: A release of this number, or a later one, was begun before.
        """
        if self.is_secret and release_number <= self._newest:
            raise PrivacyProtocolError(
                f"The noise of release {release_number} was asked for after that of release {self._newest}; equal "
                "noise on two values hides neither. Give every ledger a NoiseSource of its own."
            )
        self._newest = release_number

    def gaussian(self, shape: tuple[int, ...], *, std: float, release_number: int, leaf: str = "noise") -> Tensor:
        """Return float64 Gaussian noise on the CPU.

        NumPy's ziggurat has no bound on its tail; float32 Box-Muller draws stop at 5.77 standard deviations, which
        alone costs a delta above 1e-5 in long runs.

        Args:
            shape: Shape of the noise.
            std: Absolute standard deviation, finite and >= 0.
            release_number: The number that the ledger gave to this release.
            leaf: Name of the part of the release.

        Raises:
            ValueError: `std` is negative or not finite.
        """
        _check_std(std)
        self._check_process()  # first: in a forked child, a long tensor may wait for threads that are not there
        if math.prod(shape) > _PART:
            none = torch.zeros(shape, dtype=torch.float64)
            return self.add_gaussian(none, std=std, release_number=release_number, leaf=leaf)
        draw = self.borrowed(release_number=release_number, leaf=leaf).standard_normal(shape)
        return torch.from_numpy(np.multiply(draw, std, out=np.asarray(draw)))

    def add_gaussian(self, total: Tensor, *, std: float, release_number: int, leaf: str = "noise") -> Tensor:
        """Add what `gaussian` returns to a total, a block at a time, so that a long release needs no second vector.

        Args:
            total: float64; overwritten where it lies in one piece on the CPU.
            std: See `gaussian`, as all that follow.
            release_number: The number that the ledger gave to this release.
            leaf: Name of the part of the release.

        Returns:
            The sum, on the device of the total.

        Raises:
            ValueError: `std` is negative or not finite, or the total is not float64.
        """
        _check_std(std)
        self._check_process()
        if total.dtype != torch.float64:
            raise ValueError(f"Expected a total in float64 to add noise to, got dtype={total.dtype}.")
        summed = total.detach().cpu().contiguous()
        numbers = summed.view(-1).numpy()

        def add_to(start: int) -> None:
            part = numbers[start : start + _PART]
            name = leaf if start == 0 else f"{leaf}:part:{start // _PART}"  # no key serves twice
            _add(part, self.borrowed(release_number=release_number, leaf=name), std)

        starts = range(0, len(numbers), _PART)
        if min(len(starts), torch.get_num_threads()) <= 1:
            for start in starts:
                add_to(start)
        else:
            with ThreadPoolExecutor(min(len(starts), torch.get_num_threads())) as threads:
                list(threads.map(add_to, starts))
        return summed.to(total.device)

    def whole(
        self, law: WholeLaw, shape: tuple[int, ...], *, scale: Fraction, release_number: int, leaf: str = "noise"
    ) -> Tensor:
        """Return noise in whole numbers, int64, on the CPU, drawn exactly; see `lightning_dp.mechanisms.whole_noise`.

        Args:
            law: rounded_gaussian or discrete_gaussian.
            shape: Shape of the noise.
            scale: Its scale s, exact.
            release_number: The number that the ledger gave to this release.
            leaf: Name of the part of the release.
        """

        def bits(count: int, name: str) -> bytes:
            key = self._key(release_number, f"{leaf}/{name}", size=32)
            return hashlib.shake_256(key).digest(count)

        return torch.from_numpy(whole_noise(law, math.prod(shape), scale=scale, bits=bits)).reshape(shape)

    def generator(self, *, release_number: int, leaf: str) -> np.random.Generator:
        """Return a fresh generator for one part of one release; the same part must not be drawn twice.

        Args:
            release_number: The number that the ledger gave to this release.
            leaf: Name of the part of the release.
        """
        return keystream(self._key(release_number, leaf))

    def borrowed(self, *, release_number: int, leaf: str) -> np.random.Generator:
        """Return what `generator` returns, in less time, for draws that are made at once: the next call takes it away.

        Args:
            release_number: The number that the ledger gave to this release.
            leaf: Name of the part of the release.
        """
        return rekeyed(self._key(release_number, leaf))

    def coin_seed(self, *, release_number: int, block: int) -> int:
        """Return a 63-bit seed for the coins of one block of teachers in one release."""
        return int.from_bytes(self._key(release_number, f"coins:{block}")[:8], "big") >> 1

    def _key(self, release_number: int, leaf: str, *, size: int = KEY_BYTES) -> bytes:
        self._check_process()
        name = f"{release_number}/{leaf}".encode()
        return hashlib.blake2b(name, key=self._secret, digest_size=size).digest()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise PrivacyProtocolError(
                "Noise was asked for in a forked child process, which would draw its parent's noise over again. "
                "Release in the process that made the NoiseSource, or make a new one in the child."
            )

    def __reduce__(self) -> NoReturn:
        raise TypeError("A NoiseSource holds a secret and cannot be pickled or copied; make a new one in each process.")

    def __repr__(self) -> str:
        return f"NoiseSource(is_secret={self.is_secret})"


def _add(numbers: NDArray[np.float64], source: np.random.Generator, std: float) -> None:
    """Add draws to numbers, a block at a time."""
    drawn = np.empty(min(_BLOCK, len(numbers)))
    for start in range(0, len(numbers), _BLOCK):
        block = numbers[start : start + _BLOCK]
        few = drawn[: len(block)]
        source.standard_normal(out=few)
        block += np.multiply(few, std, out=few)


def _check_std(std: float) -> None:
    if not (np.isfinite(std) and std >= 0):
        raise ValueError(f"Expected a finite noise std >= 0, got std={std}. Check privacy.noise_multiplier.")

"""Secret bits under a key, for NumPy's samplers: a cipher in counter mode, so known draws tell nothing of others.

AES-128 (FIPS 197) where the processor has instructions for it, ChaCha20 (RFC 8439) elsewhere: AES in tables is eight
times as slow, and its time depends on the key. Both count from 0, and every key serves one stream. The package
randomgen makes the bits; what it makes is compared with the standards' own vectors before the first draw.
"""

import threading
from typing import Final

import numpy as np
from randomgen import AESCounter, ChaCha

from lightning_dp.errors import PrivacyProtocolError

# The standards' vectors: cipher, key, first counter, output. FIPS 197, appendix C.1; RFC 8439, appendix A.1, 1.
_AES_VECTOR: Final = (
    bytes(range(16)),
    int.from_bytes(bytes(17 * value for value in range(16)), "little"),
    "69c4e0d86a7b0430d8cdb78070b4c55a",
)
_CHACHA_VECTOR: Final = (bytes(32), 0, "76b8e0ada0f13d90405d6ae55386bd28")

_HAS_AES: Final = AESCounter(key=0).use_aesni

CIPHER: Final = "AES-128" if _HAS_AES else "ChaCha20"
"""The cipher of this machine; all processes of a run have the same one."""

KEY_BYTES: Final = 16 if _HAS_AES else 32
"""Length of its keys."""


class _OfThread(threading.local):
    """A generator for each thread: a new key takes it a third of the time that a new generator takes."""

    def __init__(self) -> None:
        self.generator = keystream(bytes(KEY_BYTES))


def keystream(key: bytes) -> np.random.Generator:
    """Return a new generator whose bits are the cipher's under a key.

    Args:
        key: `KEY_BYTES` long.

    Raises:
        ValueError: The key has another length.
    """
    return np.random.Generator((AESCounter if _HAS_AES else ChaCha)(key=_number(key)))


def rekeyed(key: bytes) -> np.random.Generator:
    """Return the generator of this thread, as `keystream` makes it: to be used up before the next call.

    Args:
        key: `KEY_BYTES` long.

    Raises:
        ValueError: The key has another length.
    """
    generator: np.random.Generator = _OF_THREAD.generator
    generator.bit_generator.seed(key=_number(key))  # type: ignore[attr-defined]
    return generator


def _number(key: bytes) -> int:
    if len(key) != KEY_BYTES:
        raise ValueError(f"Expected a key of {KEY_BYTES} bytes for {CIPHER}, got {len(key)}.")
    return int.from_bytes(key, "little")


def _check_vector() -> None:
    """See that the cipher is the one that it is called: another release of the package might seed in another way."""
    key, counter, wanted = _AES_VECTOR if _HAS_AES else _CHACHA_VECTOR
    cipher = AESCounter if _HAS_AES else ChaCha
    found = cipher(key=int.from_bytes(key, "little"), counter=counter).random_raw(2).astype("<u8").tobytes()
    if found.hex() != wanted:
        raise PrivacyProtocolError(
            f"Expected {CIPHER} to give {wanted} for the vector of its standard, got {found.hex()}: the package "
            "randomgen is broken here, and noise from it would not be secret. Install the version of constraints.txt."
        )


_check_vector()
_OF_THREAD: Final = _OfThread()

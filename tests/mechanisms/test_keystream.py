import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from randomgen import AESCounter, ChaCha
from scipy import stats

from lightning_dp.errors import PrivacyProtocolError
from lightning_dp.gradients.poisson import PoissonSampler
from lightning_dp.mechanisms import keystream as module
from lightning_dp.mechanisms.keystream import KEY_BYTES, keystream, rekeyed
from lightning_dp.mechanisms.noise import NoiseSource


def bits(generator: np.random.Generator, words: int = 2) -> bytes:
    return generator.bit_generator.random_raw(words).astype("<u8").tobytes()


def aes(key: bytes, block: bytes) -> bytes:
    """AES-128 of one block, from FIPS 197 by its own arithmetic (section 4.2), no table of ours or of the package."""

    def times(a: int, b: int) -> int:
        found = 0
        while b:
            found ^= a if b & 1 else 0
            a, b = (a << 1) ^ (0x11B if a & 0x80 else 0), b >> 1
        return found

    def substituted(value: int) -> int:
        inverse = next((other for other in range(256) if times(value, other) == 1), 0)
        found = 0x63
        for turn in range(5):
            found ^= (inverse << turn | inverse >> (8 - turn)) & 0xFF
        return found

    table = [substituted(value) for value in range(256)]
    words, constant = [list(key[4 * i : 4 * i + 4]) for i in range(4)], 1
    for number in range(4, 44):
        last = words[-1]
        if number % 4 == 0:
            last = [table[value] for value in last[1:] + last[:1]]
            last[0] ^= constant
            constant = times(constant, 2)
        words.append([a ^ b for a, b in zip(words[number - 4], last, strict=True)])

    def keyed(state: list[int], turn: int) -> list[int]:
        return [value ^ words[4 * turn + place // 4][place % 4] for place, value in enumerate(state)]

    state = keyed(list(block), 0)
    for turn in range(1, 11):
        state = [table[state[(place + 4 * (place % 4)) % 16]] for place in range(16)]
        if turn < 10:
            columns = [state[4 * c : 4 * c + 4] for c in range(4)]
            state = [
                times(c[r], 2) ^ times(c[(r + 1) % 4], 3) ^ c[(r + 2) % 4] ^ c[(r + 3) % 4]
                for c in columns
                for r in range(4)
            ]
        state = keyed(state, turn)
    return bytes(state)


def test_the_cipher_of_the_tests_is_that_of_the_standard():
    """FIPS 197, appendix C.1; SP 800-38A, F.1.1."""
    assert aes(bytes(range(16)), bytes(17 * v for v in range(16))).hex() == "69c4e0d86a7b0430d8cdb78070b4c55a"
    key, block = "2b7e151628aed2a6abf7158809cf4f3c", "6bc1bee22e409f96e93d7e117393172a"
    assert aes(bytes.fromhex(key), bytes.fromhex(block)).hex() == "3ad77bb40d7a3660a89ecaf32466ef97"


@pytest.mark.parametrize("with_instructions", [True, False])
def test_the_package_counts_under_aes(with_instructions):
    """Ten rounds, the key as given, from counter 0, in both of its ways; another round or a hashed key would differ."""
    key = bytes(range(100, 116))
    stream = AESCounter(key=int.from_bytes(key, "little"))
    if with_instructions and not stream.use_aesni:
        pytest.skip("this processor has no AES instructions")
    stream.use_aesni = with_instructions
    try:
        found = stream.random_raw(20).astype("<u8").tobytes()
    finally:
        AESCounter(key=0)  # finds out anew what the processor has
    assert found == b"".join(aes(key, number.to_bytes(16, "little")) for number in range(10))


def test_the_package_counts_under_chacha20():
    """RFC 8439, appendix A.1, first two vectors; then a key that is not zero, by OpenSSL."""
    wanted = (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
    )
    assert ChaCha(key=0).random_raw(12).astype("<u8").tobytes().hex() == wanted
    counted = int.from_bytes(bytes(range(32)), "little")
    wanted = "39fd2b7dd9c5196a8dbd0377b8dc4a498a35d86fbcde6accb2cc7d4cd8ea2492"
    assert ChaCha(key=counted).random_raw(4).astype("<u8").tobytes().hex() == wanted


@pytest.fixture(params=["AES-128", "ChaCha20"])
def cipher(request, monkeypatch):
    """Both ciphers, whatever this machine would choose."""
    has_aes = request.param == "AES-128"
    monkeypatch.setattr(module, "_HAS_AES", has_aes)
    monkeypatch.setattr(module, "KEY_BYTES", 16 if has_aes else 32)
    monkeypatch.setattr(module, "_OF_THREAD", module._OfThread())
    return AESCounter if has_aes else ChaCha


def test_a_generator_draws_under_the_cipher(cipher):
    key = bytes(range(module.KEY_BYTES))
    module._check_vector()
    assert bits(keystream(key)) == cipher(key=int.from_bytes(key, "little")).random_raw(2).astype("<u8").tobytes()


def test_a_generator_that_is_taken_again_begins_anew(cipher):
    """Nothing of the last key is left: no buffered bits, no half of a number, no counter."""
    first, second = bytes(module.KEY_BYTES), bytes(range(module.KEY_BYTES))
    fresh = bits(keystream(second), 100)
    taken = rekeyed(first)
    taken.random(7)
    taken.integers(2**31, size=3, dtype=np.int32)  # leaves half a number behind
    again = rekeyed(second)
    assert again is taken
    state = again.bit_generator.state
    assert state.get("has_uint32", 0) == 0
    assert bits(again, 100) == fresh
    assert bits(rekeyed(first), 100) == bits(keystream(first), 100)


def test_threads_have_generators_of_their_own(cipher):
    with ThreadPoolExecutor(1) as other:
        theirs = other.submit(rekeyed, bytes(module.KEY_BYTES)).result()
    assert theirs is not rekeyed(bytes(module.KEY_BYTES))


def test_a_key_of_another_length_is_refused():
    for draw in (keystream, rekeyed):
        with pytest.raises(ValueError, match=f"key of {KEY_BYTES} bytes"):
            draw(b"short")


@pytest.mark.parametrize("has_aes", [True, False])
def test_another_cipher_under_the_same_name_is_refused(has_aes, monkeypatch):
    """The broken twin: a release of the package that hashes the key first, as it does with seeds."""

    def hashed(*, key: int, counter: int = 0) -> np.random.BitGenerator:
        return (AESCounter if has_aes else ChaCha)(np.random.SeedSequence(key))

    monkeypatch.setattr(module, "_HAS_AES", has_aes)
    monkeypatch.setattr(module, "AESCounter" if has_aes else "ChaCha", hashed)
    with pytest.raises(PrivacyProtocolError, match="randomgen is broken"):
        module._check_vector()


def test_noise_and_coins_come_from_the_cipher():
    """Both would pass every test of a law with another generator; these look at the bits."""
    source, sampler = NoiseSource(insecure_seed=1), PoissonSampler(10**6, 0.5, insecure_seed=1)
    noise = source.gaussian((1000,), std=1.0, release_number=1).numpy()
    assert np.array_equal(noise, keystream(source._key(1, "noise")).standard_normal(1000))
    assert type(source.generator(release_number=1, leaf="noise").bit_generator).__name__ in ("AESCounter", "ChaCha")
    assert type(sampler._stream.bit_generator).__name__ in ("AESCounter", "ChaCha")


def test_draws_follow_their_laws(cipher):
    stream = keystream(hashlib.blake2b(b"laws", digest_size=module.KEY_BYTES).digest())
    assert stats.kstest(stream.standard_normal(200_000), "norm").pvalue > 1e-4
    assert stats.kstest(stream.random(200_000), "uniform").pvalue > 1e-4

"""The processes of one run: who owns what, and what they do together. Alone, every method returns at once."""

import hashlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dp.errors import PeerError, PrivacyProtocolError

Answer = TypeVar("Answer")

_HERE: Final = 1
_LAST: Final = 2
_FAILED: Final = 0
_SENT_AT_ONCE: Final = 64_000_000  # bytes
_HASHED_AT_ONCE: Final = 2**16


class Ranks:
    """One process among those of a run, and the group's collectives over the default process group of torch.

    Every process calls the same methods in the same order: one that has nothing to say joins all the same. A call that
    another process does not join, because it died, ends in a PeerError instead of a wait without end; one that
    another process joins with something else in hand ends in a PrivacyProtocolError.

    Args:
        rank: Number of this process.
        size: Number of processes.
        device: Where tensors must be for the group's backend.

    Attributes:
        wants_to_stop: Set it, and all processes learn with the next release that it is to be the last.
        must_stop: Whether some process has said so before the release that was made last.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self.wants_to_stop = self.must_stop = False

    # Who owns what ---------------------------------------------------------------------------------------------------

    def owned(self, total: int) -> range:
        """Return which of `total` records or teachers live on this process: a function of public numbers alone.

        In turn, so that any run of neighbours is shared by all.
        """
        return range(self.rank, total, self.size)

    # Releases --------------------------------------------------------------------------------------------------------

    @contextmanager
    def together(self, number: int, subject: str, seen: int = 0) -> Iterator[None]:
        """Do something on every process, and go on only if all have done it.

        Args:
            number: What all must agree on; checked.
            subject: The same, in words.
            seen: The same, of 63 bits.

        Raises:
            PeerError: Another process failed, or is gone.
            PrivacyProtocolError: Another process is about something else.
        """
        try:
            yield
        except PeerError:
            raise
        except Exception:
            if self.size > 1:
                with suppress(PeerError):
                    self._exchange(_FAILED, number, 0, 0)  # the others wait for a word
            raise
        if self.size == 1:
            return
        digest = int.from_bytes(hashlib.blake2b(subject.encode(), digest_size=7).digest(), "big")
        words = self._exchange(_LAST if self.wants_to_stop else _HERE, number, digest, seen)
        failed = [rank for rank, word in enumerate(words) if word[0] == _FAILED]
        if failed:
            raise PeerError(f"Process {failed[0]} of {self.size} failed before release {number}; nothing was released.")
        self.must_stop = any(word[0] == _LAST for word in words)
        if any(word[1:] != words[0][1:] for word in words):
            raise PrivacyProtocolError(
                f"The {self.size} processes of this run went separate ways before release {number} ({subject}): their "
                "ledgers, settings or released values differ. Nothing was released; go on from the last checkpoint."
            )

    def sum(self, total: Tensor) -> Tensor:
        """Return the sum over processes, in the type of `total`; the same bits on all of them.

        Args:
            total: Of the same shape and type everywhere; overwritten.
        """
        if self.size > 1:
            with self._contact():
                dist.all_reduce(total)
        return total

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes one after another, (sum of n, ...), on every one of them.

        Args:
            rows: (n, ...); n may differ and be 0.
        """
        if self.size == 1:
            return rows
        lengths = [word[0] for word in self._exchange(len(rows), 0, 0, 0)]
        padded = rows.new_zeros(max(lengths), *rows.shape[1:], device=self.device)
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in lengths]
        with self._contact():
            dist.all_gather(found, padded)
        return torch.cat([part[:length] for part, length in zip(found, lengths, strict=True)]).to(rows.device)

    # Replicas --------------------------------------------------------------------------------------------------------

    def first(self, function: Callable[[], Answer]) -> Answer:
        """Return what process 0 finds; the others wait for it, and do not ask.

        Args:
            function: Called on process 0 alone. Its answer is sent to the others of this run with `pickle`.

        Raises:
            PeerError: It raised; on process 0 its own error comes out.
        """
        if self.size == 1:
            return function()
        if self.rank > 0:
            failed, answer = pickle.loads(self._sent(b""))
            if failed:
                raise PeerError(f"Process 0 of {self.size} ended: {answer}")
            return answer
        try:
            answer = function()
        except Exception as error:
            self._sent(pickle.dumps((True, str(error))))
            raise
        self._sent(pickle.dumps((False, answer)))
        return answer

    def same(self, tensors: Sequence[Tensor]) -> None:
        """Make values that every process computed for itself the same to the last bit: those of process 0.

        Equal machines compute equal values, and then eight bytes travel. Others (or kernels that add in any order) may
        differ in the last bit, and replicas would drift apart.

        Args:
            tensors: Public or released; overwritten where processes differ.
        """
        if self.size == 1:
            return
        words = self._exchange(checksum(tensors), 0, 0, 0)
        if all(word == words[0] for word in words):
            return
        for tensor in tensors:
            self.copy_first(tensor)

    def copy_first(self, tensor: Tensor) -> None:
        """Overwrite a tensor by that of process 0."""
        if self.size == 1:
            return
        value = tensor.detach().to(self.device).contiguous()
        with self._contact():
            dist.broadcast(value, 0)
        with torch.no_grad():
            tensor.copy_(value)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def collect(self, part: Tensor, whole: Tensor | None) -> None:
        """Bring what is stacked over owners together on process 0, a bounded number of bytes at a time.

        Args:
            part: What this process owns, (number owned, ...).
            whole: Filled on process 0, (total, ...); None elsewhere.
        """
        if whole is not None:
            whole[:: self.size] = part
        lengths = [word[0] for word in self._exchange(len(part), 0, 0, 0)]
        row_bytes = max(1, part[:1].numel() * part.element_size())
        at_once = max(1, _SENT_AT_ONCE // row_bytes)
        for source in range(1, self.size):
            for start in range(0, lengths[source], at_once):
                stop = min(start + at_once, lengths[source])
                with self._contact():
                    if self.rank == source:
                        dist.send(part[start:stop].to(self.device).contiguous(), 0)
                    elif whole is not None:
                        few = part.new_empty(stop - start, *part.shape[1:], device=self.device)
                        dist.recv(few, source)
                        places = slice(source + start * self.size, source + (stop - 1) * self.size + 1, self.size)
                        whole[places] = few.to(whole.device)

    # Words -----------------------------------------------------------------------------------------------------------

    def _exchange(self, *words: int) -> list[list[int]]:
        """Return the words of every process."""
        own = torch.tensor(words, dtype=torch.int64, device=self.device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        with self._contact():
            dist.all_gather(found, own)
        return [word.tolist() for word in found]

    def _sent(self, message: bytes) -> bytes:
        """Return the message of process 0."""
        size = torch.tensor([len(message)], dtype=torch.int64, device=self.device)
        with self._contact():
            dist.broadcast(size, 0)
            data = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
            if self.rank == 0:
                data = torch.frombuffer(bytearray(message), dtype=torch.uint8).to(self.device)
            dist.broadcast(data, 0)
        return bytes(data.cpu().numpy())

    @contextmanager
    def _contact(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise PeerError(f"Process {self.rank} of {self.size} lost another one of its run ({reason}).") from error


def checksum(tensors: Sequence[Tensor]) -> int:
    """Return 63 bits that differ, but for chance, when a bit of a tensor does."""
    found = torch.zeros((), dtype=torch.int64, device=tensors[0].device if tensors else "cpu")
    for tensor in tensors:
        bits = tensor.detach().contiguous().flatten()
        words = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
        for few in words.split(_HASHED_AT_ONCE):
            mask, weights = (table[: len(few)] for table in _tables(few.device))
            found = found * 1_000_003 + ((few ^ mask) * weights).sum()  # whole numbers modulo 2^64
    return int(found) % 2**63


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return fixed random masks and odd weights: changes in several places cancel by chance only."""
    stream = torch.Generator().manual_seed(0)
    masks, weights = (torch.randint(-(2**63), 2**63 - 1, (_HASHED_AT_ONCE,), generator=stream) for _ in range(2))
    return masks.to(device), (weights | 1).to(device)


ALONE: Final = Ranks()
"""A run of one process."""

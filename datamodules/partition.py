"""Assignment of records to teachers by position or identity alone: each record has exactly one teacher.

The sensitivity of every teacher-vote mechanism rests on this file: one changed record may move one teacher's row and no
other. So neither pixels nor labels are arguments here (class-balanced dealing lets one record move many shards), no
record is dealt twice, and none is dropped.
"""

import hashlib
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_dp.errors import ConfigurationError

PartitionMethod = Literal["permutation", "hash"]


class TeacherPartition:
    """A public map from records to teachers.

    * "permutation": a fixed public permutation of the N slots is cut into T runs whose lengths differ by at most one.
      A function of (N, T, key) only. For replace-one: the slot stays, its content changes, one shard changes. Not for
      add/remove-one: another N moves many records.
    * "hash": a keyed BLAKE2b hash of the record's id modulo T. Each record's teacher depends on its own id, T and the
      key, so removing or adding a record moves no other; shards are unequal and may be empty. The id here is the
      position in the published file; for records whose positions shift, call `hash_assignment` with stable ids.

    Guarantee: one record replaced (both methods), or added or removed ("hash", under stable ids, which positions in a
    file are not: methods claim no add-or-remove-one) changes exactly one shard. The key is public: secrecy is not
    needed, independence of the data is. It must be chosen without looking at the records.

    Args:
        num_records: Number of records N, >= 1. Ids are the positions 0 .. N-1.
        num_teachers: Number of teachers T, 1 <= T <= N.
        method: "permutation" (balanced) or "hash" (stable under removal).
        key: Public integer that picks one permutation or hash function.

    Raises:
        ConfigurationError: More teachers than records, a count below one, or an unknown method.

    Example:
        >>> partition = TeacherPartition(num_records=10, num_teachers=4)
        >>> sorted(torch.bincount(partition.assignment).tolist())
        [2, 2, 3, 3]
    """

    def __init__(
        self, num_records: int, num_teachers: int, method: PartitionMethod = "permutation", key: int = 0
    ) -> None:
        if num_records < 1 or num_teachers < 1:
            raise ConfigurationError(
                f"Expected at least one record and one teacher, got num_records={num_records}, "
                f"num_teachers={num_teachers}. Set both above zero."
            )
        if num_teachers > num_records:
            raise ConfigurationError(
                f"Expected num_teachers <= num_records={num_records}, got num_teachers={num_teachers}. "
                "Use fewer teachers, or more training records."
            )
        if method not in get_args(PartitionMethod):
            raise ConfigurationError(
                f"Expected method in {get_args(PartitionMethod)}, got method={method!r}. Choose one of them."
            )
        self.num_records = num_records
        self.num_teachers = num_teachers
        self.method: PartitionMethod = method
        self.key = key

    @cached_property
    def assignment(self) -> Tensor:
        """Teacher of each record, int64, (N,), values 0 .. T-1."""
        if self.method == "hash":
            return hash_assignment(range(self.num_records), self.num_teachers, self.key)
        # Ranks of hashed positions instead of a random generator: the same on every machine and library version.
        ranks = sorted(range(self.num_records), key=lambda index: (_keyed_hash(index, self.key), index))
        assignment = torch.empty(self.num_records, dtype=torch.int64)
        # Deal in turn: T shards whose sizes differ by at most one, also when T does not divide N.
        assignment[torch.tensor(ranks)] = torch.arange(self.num_records) % self.num_teachers
        return assignment


def hash_assignment(record_ids: range | list[int], num_teachers: int, key: int = 0) -> Tensor:
    """Return the teacher of each record id by keyed hash, int64, (len(record_ids),).

    Each entry depends on its own id only. 64-bit hash modulo T: the bias, T / 2**64, concerns balance and not privacy.

    Args:
        record_ids: Stable integer ids, not positions in a list that shrinks.
        num_teachers: Number of teachers, >= 1.
        key: Public integer that picks the hash function.
    """
    return torch.tensor([_keyed_hash(i, key) % num_teachers for i in record_ids], dtype=torch.int64)


def _keyed_hash(record_id: int, key: int) -> int:
    """Return a 64-bit keyed BLAKE2b hash of an integer id."""
    # Decimal text, so that any int (negative, large) has one unambiguous encoding.
    salt = hashlib.blake2b(str(key).encode(), digest_size=32, person=b"lightning_dp").digest()
    digest = hashlib.blake2b(str(record_id).encode(), digest_size=8, key=salt).digest()
    return int.from_bytes(digest, "big")

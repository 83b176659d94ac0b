"""Holds the rows of a release against what was charged: as many vectors as stated, each record's row once."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lightning_dp.errors import PrivacyProtocolError
from lightning_dp.gradients.record_gradients import RecordChunk, SummableRows
from lightning_dp.gradients.teachers import RowChunk
from lightning_dp.mechanisms.base import ContributionSpec

_MEND = "The charge was computed from ContributionSpec; rows and spec have to agree."


class RowCensus:
    """Counts rows on their way into the sum of one release.

    A sensitivity says how far one row moves the sum, so it is worth as much as the count of a record's rows. Catches:
    a release of another shape than planned (images added in mid-run), a row with more vectors than charged, one vector
    spread over several places, an id that sends two rows. Does not catch: ids that are not the records' own.

    Args:
        spec: What was charged.
    """

    def __init__(self, spec: ContributionSpec) -> None:
        self._spec = spec
        self._keys: list[Tensor] = []

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Refuse a release of another shape than was planned.

        Raises:
            PrivacyProtocolError: Naming both.
        """
        planned = (self._spec.num_vectors, self._spec.vector_dim)
        if tuple(shape) != planned:
            raise PrivacyProtocolError(
                f"Expected a release of shape {planned}, as planned, got {tuple(shape)}. {_MEND}"
            )

    def counted(self, chunks: Iterable[RecordChunk]) -> Iterator[RecordChunk]:
        """Yield the chunks, and note whose rows they hold; after the last one, see that nobody came twice.

        Args:
            chunks: Private rows.

        Raises:
            PrivacyProtocolError: A row has more vectors than charged, or an id has two rows.
        """
        for chunk in chunks:
            if isinstance(chunk, SummableRows):
                self._note(chunk.ids, slice(chunk.place, chunk.place + 1))
            else:
                self._note(chunk.teacher_ids, chunk.queries)
            yield chunk
        self._check_once()

    def check_encoded(self, chunk: RowChunk, encoded: Tensor) -> None:
        """Refuse encoded rows that would be spread over other vectors than their own when they are added.

        Raises:
            PrivacyProtocolError: Their shape is not that of ids and queries.
        """
        expected = (len(chunk.teacher_ids), chunk.queries.stop - (chunk.queries.start or 0))
        if tuple(encoded.shape[:2]) != expected:
            raise PrivacyProtocolError(
                f"Expected encoded rows of shape {expected} (rows, vectors), got {tuple(encoded.shape[:2])}. {_MEND}"
            )

    def _note(self, ids: Tensor, queries: slice) -> None:
        start, stop = queries.start or 0, queries.stop
        most = self._spec.num_vectors if self._spec.is_undercharged else self._spec.vectors_per_row
        if not 0 <= start <= stop <= self._spec.num_vectors or stop - start > most:
            raise PrivacyProtocolError(
                f"Expected rows of at most {most} vectors within {self._spec.num_vectors}, got {queries}. {_MEND}"
            )
        # A teacher may have a row for each label; a record has one row, wherever it lands.
        place = start if self._spec.kind == "teacher" else 0
        self._keys.append(ids.to(torch.int64) * self._spec.num_vectors + place)

    def _check_once(self) -> None:
        if not self._keys:
            return
        keys = self._keys[0] if len(self._keys) == 1 else torch.cat(self._keys)
        if bool((keys[1:] > keys[:-1]).all()):  # mostly in order
            return
        if len(keys.unique()) != len(keys):
            raise PrivacyProtocolError(
                "A record (or teacher) sent two rows into one release, but one was charged. Let every id send one row, "
                "and draw records without replacement."
            )

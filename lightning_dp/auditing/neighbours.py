"""Pairs of neighbouring inputs that are as bad as they come: extreme canaries against bases that oppose them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dp.auditing.door import Door
from lightning_dp.gradients.teachers import RowChunk
from lightning_dp.mechanisms.base import ContributionSpec, RowChange

NUM_OTHERS = 31
_LARGE = 50.0
_SPREAD_NORM = 400.0

World = tuple[RowChunk, ...]
"""The rows of one release."""


@dataclass(frozen=True)
class Pair:
    """Two neighbouring inputs of a release.

    Attributes:
        name: Canary and base, in words.
        left: Rows of one.
        right: Rows of the other.
        absent: Rows of neither's canary: the base alone.
    """

    name: str
    left: World
    right: World
    absent: World

    def __len__(self) -> int:
        return sum(len(chunk.teacher_ids) for chunk in (*self.left, *self.right))


@dataclass(frozen=True)
class _Row:
    slot: int
    values: Tensor
    row_id: int


def neighbouring_pairs(door: Door, *, num_others: int = NUM_OTHERS) -> Iterator[Pair]:
    """Yield pairs for everything that one neighbouring step may do to the rows under the plan's relation.

    Canaries: a unit vector on the bound, one of 50 bounds each way, one of norm 400 bounds spread over all coordinates,
    one in a random direction. Bases: small random rows; all rows against the canary (which shows a divisor that follows
    the batch); none.

    Args:
        door: What is audited.
        num_others: Rows that both worlds share, at most; no more than the spec allows.
    """
    spec = door.plan.spec
    scale = door.mechanism.row_bound(spec) / math.sqrt(spec.vectors_per_row)
    scale = scale if math.isfinite(scale) else 1.0
    if spec.max_rows_per_vector is not None:
        num_others = max(0, min(num_others, spec.max_rows_per_vector - 1))
    num_slots = max(1, spec.num_vectors // spec.vectors_per_row)
    for number, change in enumerate(spec.alternatives(door.plan.relation)):
        for name, first, second in _canaries(spec, scale):
            for base_name, others in _bases(spec, first, num_others, scale):
                left, right = _changed(change, first, second, num_slots)
                base = [_Row(0, values, 1000 + place) for place, values in enumerate(others)]
                yield Pair(
                    f"{name} against {base_name} (change {number + 1})",
                    _world([*left, *base], spec),
                    _world([*right, *base], spec),
                    _world(base, spec),
                )


def _canaries(spec: ContributionSpec, scale: float) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield canaries and what replaces them where a row changes, (vectors_per_row, vector_dim)."""
    stream = torch.Generator().manual_seed(11)
    dim = spec.vector_dim
    axis, other = torch.zeros(dim), torch.zeros(dim)
    axis[0], other[-1] = scale, scale
    drawn = torch.randn(dim, generator=stream)
    spread = torch.full((dim,), _SPREAD_NORM * scale / math.sqrt(dim))
    spread *= torch.where(torch.rand(dim, generator=stream) < 0.5, -1.0, 1.0)
    drawn *= scale / drawn.norm()
    found = [
        ("a unit canary", axis, -axis),
        ("a canary of 50 bounds", _LARGE * axis, -_LARGE * axis),
        ("a canary of -50 bounds", -_LARGE * axis, axis),
        ("a spread canary of 400 bounds", spread, -spread),
        ("a random canary", drawn, -drawn),
        ("a canary on another axis", _LARGE * axis, _LARGE * other),
    ]
    for name, first, second in found:
        if spec.rows_never_oppose:  # the method promises it: a pair that breaks it would be no neighbour
            first, second = first.abs(), (second.abs() if not torch.equal(first.abs(), second.abs()) else other)
        yield name, first.repeat(spec.vectors_per_row, 1), second.repeat(spec.vectors_per_row, 1)


def _bases(spec: ContributionSpec, canary: Tensor, num: int, scale: float) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield what the other rows are."""
    stream = torch.Generator().manual_seed(12)
    small = [0.1 * scale * torch.randn(canary.shape, generator=stream) / math.sqrt(spec.vector_dim) for _ in range(num)]
    if spec.rows_never_oppose:
        small = [row.abs() for row in small]
    yield "small rows", small
    if num and not spec.rows_never_oppose:
        yield "all rows against it", [-canary] * num
    yield "nothing", []


def _changed(change: RowChange, first: Tensor, second: Tensor, num_slots: int) -> tuple[list[_Row], list[_Row]]:
    """Return the canary's rows in both worlds; rows of one change speak of disjoint parts of the release."""
    left: list[_Row] = []
    right: list[_Row] = []
    for slot in range(min(change.num_replaced, num_slots)):
        left.append(_Row(slot, first, slot))
        right.append(_Row(slot, second, slot))
    # A toggled row leaves, and the next one appears; more than there are places for stand for no row (see
    # `ContributionSpec.sampled_teachers`).
    for place in range(min(change.num_toggled, num_slots - len(left))):
        slot = len(left) + place if change.num_replaced else place
        (left if place % 2 == 0 else right).append(_Row(slot, first, 500 + place))
    return left, right


def _world(rows: Sequence[_Row], spec: ContributionSpec) -> World:
    """Return rows as chunks, one for each part of the release."""
    chunks = []
    width = spec.vectors_per_row
    for slot in sorted({row.slot for row in rows}):
        mine = [row for row in rows if row.slot == slot]
        chunks.append(
            RowChunk(
                torch.tensor([row.row_id for row in mine]),
                torch.stack([row.values for row in mine]),
                slice(slot * width, (slot + 1) * width),
            )
        )
    return tuple(chunks)

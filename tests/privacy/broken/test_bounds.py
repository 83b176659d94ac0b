"""Wrong bounds and divisors, each found by comparing neighbours under equal noise."""

import math
from collections.abc import Iterable

import pytest
import torch

from lightning_dp.auditing.one_run import audit_one_run
from lightning_dp.auditing.result import Verdict
from lightning_dp.auditing.sensitivity import audit_sensitivity
from lightning_dp.auditing.two_worlds import audit_two_worlds
from lightning_dp.errors import PrivacyProtocolError
from lightning_dp.mechanisms.base import Mechanism
from lightning_dp.mechanisms.keyed import keyed_uniform
from tests.privacy.doors import ADD_REMOVE, RECORDS, REPLACE, TEACHERS, door


class Clipped(Mechanism):
    """The right one: rows of norm at most one; broken twins change a line of it."""

    kinds = frozenset({"record", "teacher", "joint", "statistic"})

    def row_bound(self, spec):
        return math.sqrt(spec.vectors_per_row)

    def clipped(self, rows):
        return rows * (1 - 1e-9) / rows.norm(dim=-1, keepdim=True).clamp(min=1.0)

    def encode(self, rows, spec, context):
        return self.clipped(rows.double())

    def decode(self, noisy, plan, release_number, public_seed):
        return noisy / plan.spec.rows_per_vector


class NoClip(Clipped):
    def encode(self, rows, spec, context):
        return rows.double()


class ClipsTheBatch(Clipped):
    """One factor for the whole batch, from its mean."""

    def encode(self, rows, spec, context):
        factor = 1 / rows.double().mean(0).norm().clamp(min=1.0) if len(rows) else 1.0
        return rows.double() * factor


class ClipsEachLayer(Clipped):
    """Four layers, each clipped to the whole bound, charged as one."""

    def encode(self, rows, spec, context):
        return torch.cat([self.clipped(part) for part in rows.double().split(16, dim=-1)], dim=-1)


class ClipsAfterAccumulation(Clipped):
    """Micro-batches of four are averaged, then clipped, then scaled back."""

    def encode(self, rows, spec, context):
        means = [part.mean(0, keepdim=True) * len(part) for part in rows.double().split(4)]
        return torch.cat([self.clipped(mean / 4) * 4 for mean in means]) if means else rows.double()


class DividesByRealisedBatch(Clipped):
    """A mean over the records that came, times the number that was expected."""

    def encode(self, rows, spec, context):
        return super().encode(rows, spec, context) * (spec.rows_per_vector / max(1, len(rows)))


class DividesAfterNoise(Clipped):
    """The noisy sum is divided by the size of the batch: a number that nobody was told."""

    def encode(self, rows, spec, context):
        self._num = max(1, len(rows))
        return super().encode(rows, spec, context)

    def decode(self, noisy, plan, release_number, public_seed):
        return noisy / getattr(self, "_num", 32)


class ChargesOneImage(Clipped):
    """Each image of a row is clipped by itself, and the row is charged as one image."""

    def row_bound(self, spec):
        return 1.0


class ForgetsThatARowTurns(Clipped):
    """Replace-one charged like add-or-remove-one: one bound, where a row that turns around moves by two."""

    def row_diameter(self, spec):
        return self.row_bound(spec)


class ChargesRootTwo(Clipped):
    """Rows of norm one taken for rows that are never opposed."""

    def row_diameter(self, spec):
        return math.sqrt(2) * self.row_bound(spec)


class ClipsInOneNorm(Clipped):
    """Every coordinate is clipped, not the vector."""

    def clipped(self, rows):
        return rows.clamp(-1, 1)


class LetsTheFirstChooseTheScale(Clipped):
    """The scale is the largest entry over all teachers, so one teacher moves the votes of the others."""

    def encode(self, rows, spec, context):
        rows = rows.double()
        scaled = rows / rows.abs().amax().clamp(min=1e-12) if len(rows) else rows
        return self.clipped(scaled)


class SharedSupport(Clipped):
    """The coordinates that are voted on are those of the mean gradient, not each teacher's own."""

    def encode(self, rows, spec, context):
        if not len(rows):
            return rows.double()
        chosen = rows.double().mean(0, keepdim=True).abs().topk(1, dim=-1).indices.expand(len(rows), -1, -1)
        return torch.zeros_like(rows, dtype=torch.float64).scatter_(-1, chosen, rows.double().sign().gather(-1, chosen))


class CoinsThatFollowTheOrder(Clipped):
    """Coins of stochastic signs are drawn by place in the batch, so a record that leaves moves all others'."""

    def encode(self, rows, spec, context):
        seed = context.noise.coin_seed(release_number=context.release_number, block=0)
        places = torch.arange(len(rows))
        coins = keyed_uniform(rows.shape, seed=seed, row_ids=places, first_vector=context.first_vector)
        up = 0.5 + rows / (2 * rows.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12))
        return torch.where(coins < up, 1.0, -1.0).double() / math.sqrt(rows.shape[-1])


def check(mechanism, spec=RECORDS, relation=ADD_REMOVE):
    return audit_sensitivity(door(mechanism, spec, relation))


BROKEN: Iterable[tuple] = [
    (NoClip(), RECORDS, ADD_REMOVE),
    (ClipsTheBatch(), RECORDS, ADD_REMOVE),
    (ClipsEachLayer(), RECORDS, ADD_REMOVE),
    (DividesByRealisedBatch(), RECORDS, ADD_REMOVE),
    (DividesAfterNoise(), RECORDS, ADD_REMOVE),
    (ChargesOneImage(), TEACHERS, REPLACE),
    (ForgetsThatARowTurns(), RECORDS, REPLACE),
    (ChargesRootTwo(), RECORDS, REPLACE),
    (ClipsInOneNorm(), RECORDS, ADD_REMOVE),
    (LetsTheFirstChooseTheScale(), TEACHERS, REPLACE),
    (SharedSupport(), RECORDS, ADD_REMOVE),
    (CoinsThatFollowTheOrder(), RECORDS, ADD_REMOVE),
]


@pytest.mark.parametrize(("mechanism", "spec", "relation"), BROKEN, ids=lambda value: type(value).__name__)
def test_a_broken_bound_is_found(mechanism, spec, relation):
    assert check(mechanism, spec, relation).verdict is Verdict.VIOLATED


def test_rows_that_were_joined_before_they_were_bounded_are_refused_by_the_door():
    with pytest.raises(PrivacyProtocolError, match="Expected encoded rows of shape"):
        check(ClipsAfterAccumulation(), RECORDS, ADD_REMOVE)


@pytest.mark.parametrize("relation", [ADD_REMOVE, REPLACE])
def test_the_right_one_is_not(relation):
    found = check(Clipped(), RECORDS, relation)
    assert found.verdict is Verdict.CONSISTENT
    assert found.measured["ratio"] == pytest.approx(1, rel=1e-6)  # the canaries reach the bound


@pytest.mark.parametrize(
    ("mechanism", "shift"),
    [
        (NoClip(), 400.0),  # the numbers of the trial audits (accounting, section 5.3)
        (ClipsEachLayer(), 2.0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_how_far_the_trials_moved(mechanism, shift):
    assert check(mechanism).measured["largest_shift"] == pytest.approx(shift, rel=0.05)


@pytest.mark.parametrize("kind", [NoClip, ClipsTheBatch], ids=lambda kind: kind.__name__)
def test_an_attacker_sees_a_missing_bound(kind):
    found = audit_two_worlds(door(kind()), calls=1000)
    assert found.verdict is Verdict.VIOLATED
    assert audit_one_run(door(NoClip())).verdict is Verdict.VIOLATED

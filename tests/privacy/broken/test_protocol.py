"""Doors that charge too late, too little or not at all."""

import pytest

from lightning_dp.accounting.events import GaussianRelease
from lightning_dp.auditing.protocol import audit_protocol
from lightning_dp.auditing.result import Verdict
from lightning_dp.modules.release import _DOOR, Released, ReleaseSession
from tests.privacy.doors import door


class ChargesAfterNoise(ReleaseSession):
    """The ledger hears of a release that has already been drawn: a crash in between loses it."""

    def release(self, chunks, shape, device):
        append, waiting = self.ledger.append, []
        self.ledger.append = lambda *entry: waiting.append(entry) or len(self.ledger) + 1
        try:
            return super().release(chunks, shape, device)
        finally:
            self.ledger.append = append
            for entry in waiting:
                append(*entry)


class NeverCharges(ReleaseSession):
    def release(self, chunks, shape, device):
        append = self.ledger.append
        self.ledger.append = lambda *entry: 1
        try:
            return super().release(chunks, shape, device)
        finally:
            self.ledger.append = append


class ChargesLess(ReleaseSession):
    """The event of one image for a release of many."""

    @property
    def event(self):
        whole = super().event
        return GaussianRelease(noise_std=whole.noise_std, l2_sensitivity=whole.l2_sensitivity / 2)


class AllowsASecond(ReleaseSession):
    def release(self, chunks, shape, device):
        self.begin_step()
        return super().release(chunks, shape, device)

    def end_step(self):
        self._may_still_release = False


class OverlooksAMissingRelease(ReleaseSession):
    """A step that was skipped (an empty batch, say) is let pass."""

    def end_step(self):
        return


class AsksTooLate(ReleaseSession):
    """The budget is asked when the value is there."""

    def __init__(self, **parts):
        self._late = parts["may_release"]
        super().__init__(**{**parts, "may_release": lambda event, sampling: None})

    def release(self, chunks, shape, device):
        released = super().release(chunks, shape, device)
        self._late(self.event, self.sampling)
        return released


class ReleasesWithoutNoise(ReleaseSession):
    """Noise is counted and forgotten, in a branch for debugging that stayed."""

    def release(self, chunks, shape, device):
        released = super().release(chunks, shape, device)
        return Released(released.value * 0 + 1, released.number, _DOOR)


@pytest.mark.parametrize(
    "session",
    [ChargesAfterNoise, NeverCharges, ChargesLess, AllowsASecond, OverlooksAMissingRelease, AsksTooLate],
    ids=lambda kind: kind.__name__,
)
def test_a_broken_door_is_found(session):
    assert audit_protocol(door(session=session)).verdict is Verdict.VIOLATED


def test_the_door_keeps_its_rules():
    found = audit_protocol(door())
    assert found.verdict is Verdict.CONSISTENT, found.summary


def test_a_value_that_never_met_the_noise_is_found():
    from lightning_dp.auditing.sensitivity import audit_sensitivity

    assert audit_sensitivity(door(session=ReleasesWithoutNoise)).verdict is Verdict.VIOLATED

"""Warm starts that break a promise, and the audit that finds them."""

from functools import partial

import pytest
import torch

from lightning_dp.auditing.result import Verdict
from lightning_dp.mechanisms.gaussian import Gaussian
from lightning_dp.mechanisms.topagg import TopAgg
from lightning_dp.modules.semi_dual_warm_start import SemiDualWarmStart
from lightning_dp.modules.warm_start import MomentsWarmStart
from tests.conftest import tiny_gan
from tests.modules.test_vae import tiny_vae
from tests.privacy.broken.test_methods import audit


class ShowsRecords(MomentsWarmStart):
    """What is learned from first are records, not samples of what was released."""

    def released_samples(self, session, images, labels, records, *, seed):
        super().released_samples(session, images, labels, records, seed=seed)
        return images[-20:].float() / 255, labels[-20:]


class CountsARecordTwice(MomentsWarmStart):
    """The last record sits twice in the sums, and is charged once."""

    def released_samples(self, session, images, labels, records, *, seed):
        images, labels = torch.cat([images, images[-1:]]), torch.cat([labels, labels[-1:]])
        return super().released_samples(session, images, labels, range(len(images)), seed=seed)


# Whatever the coins, the record that changes is in some batch: nothing can be seen of one that is in none.
SHORT = {"releases": 3, "expected_batch_size": 38.0, "images_per_class": 2}


def by_transport(kind=SemiDualWarmStart, **options):
    return kind(**SHORT, **options)


class ComparesWithTheBatch(SemiDualWarmStart):
    """Points of records are shifted by their mean: what a record sends depends on which others there are."""

    def released_samples(self, session, images, labels, records, *, seed):
        images = (images.float() - images.float().mean(0) + 128).clamp(0, 255).to(torch.uint8)
        return super().released_samples(session, images, labels, records, seed=seed)


class CountsARecordOfABatchTwice(SemiDualWarmStart):
    """The last record goes twice into the sum, by another id, and is charged once."""

    def released_samples(self, session, images, labels, records, *, seed):
        images, labels = images.clone(), labels.clone()
        images[0], labels[0] = images[-1], labels[-1]
        return super().released_samples(session, images, labels, records, seed=seed)


@pytest.mark.parametrize(("kind", "relation"), [(tiny_gan, "replace_one"), (tiny_vae, "add_or_remove_one")])
def test_a_right_warm_start_by_transport_raises_no_alarm(kind, relation):
    mechanism = Gaussian if kind is tiny_vae else partial(TopAgg, top_k=4)
    found = audit(kind, relation, mechanism, by_transport)
    assert found.verdict is Verdict.CONSISTENT, found.summary
    assert 0.01 < found.measured["warm_start_ratio"] <= 1


@pytest.mark.parametrize("broken", [ComparesWithTheBatch, CountsARecordOfABatchTwice])
def test_records_that_meet_in_a_warm_start_by_transport_are_found(broken):
    found = audit(tiny_vae, "add_or_remove_one", Gaussian, partial(by_transport, broken))
    assert found.verdict is Verdict.VIOLATED, found.summary
    assert "warm start, " in found.summary


WARMED = [(tiny_gan, "replace_one", lambda: TopAgg(top_k=4)), (tiny_vae, "add_or_remove_one", Gaussian)]


@pytest.mark.parametrize(("kind", "relation", "mechanism"), WARMED, ids=["teachers", "records"])
def test_a_right_warm_start_raises_no_alarm(kind, relation, mechanism):
    found = audit(kind, relation, mechanism, MomentsWarmStart)
    assert found.verdict is Verdict.CONSISTENT, found.summary
    assert 0.1 < found.measured["warm_start_ratio"] <= 1
    assert "warm start, " in found.summary
    # A record of another label leaves one class's sums and enters another's.
    assert found.measured["changed_rows"] == (2 if relation == "replace_one" else 1)
    assert found.claimed_epsilon == pytest.approx(5.0, rel=0.01)  # one budget for both kinds of release


@pytest.mark.parametrize(("kind", "relation", "mechanism"), WARMED, ids=["teachers", "records"])
def test_a_warm_start_that_shows_records_is_found(kind, relation, mechanism):
    found = audit(kind, relation, mechanism, ShowsRecords)
    assert found.verdict is Verdict.VIOLATED
    assert "differs in what leaves" in found.summary


@pytest.mark.parametrize(("kind", "relation", "mechanism"), WARMED, ids=["teachers", "records"])
def test_a_warm_start_that_counts_a_record_twice_is_found(kind, relation, mechanism):
    found = audit(kind, relation, mechanism, CountsARecordTwice)
    assert found.verdict is Verdict.VIOLATED
    assert "warm start, " in found.summary
    assert found.measured["warm_start_ratio"] > 1 or found.measured["changed_rows"] > 1

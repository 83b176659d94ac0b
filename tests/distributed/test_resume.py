"""A checkpoint of W processes goes on on W' of them; what was released stays charged, and secrets are fresh."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

from callbacks import PrivateCheckpoint
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.accounting.ledger_file import LedgerFile
from lightning_dp.errors import LedgerError, PeerError
from lightning_dp.gradients.ranks import Ranks
from tests.distributed.group import endings, values
from tests.distributed.runs import StopAt, Trace, run
from tests.distributed.test_runs import are_close, same_bits

STEPS, STOP = 8, 6
EVERY = 4  # so that two releases are lost


def leg(name: str, folder: Path, *, first: bool, is_private: bool = False, seed: int | None = 3) -> Trace:
    checkpoint = folder / "private" / "last.ckpt"

    def callbacks(accountant):
        saver = PrivateCheckpoint(path=checkpoint, accountant=accountant, every_n_releases=EVERY)
        return [saver, StopAt(STOP)] if first else [saver]

    options = {"steps": STEPS, "seed": seed, "ledger": folder / "ledger.jsonl", "callbacks": callbacks}
    return run(name, is_private=is_private, checkpoint=None if first else checkpoint, **options)


def chain(name: str, folder: Path, sizes: tuple[int, int], **options) -> tuple[list[Trace], list[Trace]]:
    """Return the traces of a run that was stopped, and of its continuation on another number of processes."""
    folder.mkdir()
    first = values(sizes[0], partial(leg, name, folder, first=True, **options))
    return first, values(sizes[1], partial(leg, name, folder, first=False, **options))


@pytest.mark.parametrize("sizes", [(2, 1), (1, 3), pytest.param((4, 2), marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["trained teachers", "drawn critics", "two optimizers"])
def test_a_run_goes_on_on_another_number_of_processes(tmp_path, name, sizes):
    _, (alone,) = chain(name, tmp_path / "alone", (1, 1))
    _, found = chain(name, tmp_path / "many", sizes)
    for trace in found:
        assert same_bits(trace, found[0])
        assert are_close(trace, alone)
    checkpoints = [torch.load(tmp_path / run / "private" / "last.ckpt", weights_only=True) for run in ("alone", "many")]
    if "teachers" in checkpoints[0]:
        for key in ("parameters", "exp_avg", "exp_avg_sq"):
            expected, saved = (checkpoint["teachers"][key] for checkpoint in checkpoints)
            assert all(torch.allclose(saved[part], value, atol=1e-5) for part, value in expected.items())
    for folder in ("alone", "many"):
        ledger = PrivacyLedger.read(tmp_path / folder / "ledger.jsonl")
        assert len(ledger) == STEPS  # six before, of which two are lost, and two after


def test_noise_and_coins_are_fresh_after_a_resume(tmp_path):
    first, second = chain("records", tmp_path / "run", (2, 2), is_private=True, seed=None)
    secrets = {secret for trace in (*first, *second) for secret in trace.secrets}
    assert len(secrets) == 2
    drawn = [noise for trace in (first[0], second[0]) for noise in trace.noise]
    assert len(drawn) == STEPS
    assert len({tuple(noise.flatten()[:4].tolist()) for noise in drawn}) == len(drawn)


# Whatever one process does, no noise is drawn for a release that the disk does not hold ---------------------------


def with_a_full_disk(folder: Path, *, wrong: bool) -> tuple[int, str]:
    """The third release cannot be written; return how often noise was drawn, and the error."""
    append, noise = LedgerFile.append, []

    def full(self, *lines):
        if lines[0].number == 3:
            raise LedgerError("disk full")
        append(self, *lines)

    changes: dict = {(LedgerFile, "append"): full}
    if wrong:  # each counts for itself, and sums what it has
        changes |= {(Ranks, "together"): only_mine, (Ranks, "sum"): lambda self, total: total}
    try:
        run("records", is_private=True, changes=changes, ledger=folder / "ledger.jsonl", steps=3, noise=noise)
    except (LedgerError, PeerError) as error:
        return len(noise), type(error).__name__
    return len(noise), ""


def only_mine(self, number, subject, seen=0):
    return nullcontext()


@pytest.mark.parametrize("wrong", [False, True])
def test_if_the_disk_is_full_no_process_draws_noise(tmp_path, wrong):
    found = [ending.value for ending in endings(2, partial(with_a_full_disk, tmp_path, wrong=wrong))]
    assert len(PrivacyLedger.read(tmp_path / "ledger.jsonl")) == 2
    if wrong:
        assert found[1][0] == 3, "the broken twin draws noise that nobody charged"
        return
    assert [drawn for drawn, _ in found] == [2, 2]
    assert [error for _, error in found] == [LedgerError.__name__, PeerError.__name__]

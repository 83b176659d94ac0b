import copy
import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_dp.errors import PrivacyProtocolError
from lightning_dp.mechanisms.noise import _PART, NoiseSource


def draw(source: NoiseSource, number: int, leaf: str = "noise", size: int = 1000) -> torch.Tensor:
    return source.gaussian((size,), std=1.0, release_number=number, leaf=leaf)


def test_noise_is_float64_and_ignores_the_global_seed():
    torch.manual_seed(0)
    np.random.seed(0)
    first = draw(NoiseSource(), 1)
    torch.manual_seed(0)
    np.random.seed(0)
    second = draw(NoiseSource(), 1)
    assert first.dtype == torch.float64
    assert not torch.equal(first, second)


def test_two_processes_of_one_run_never_share_noise():
    """A resumed run makes a new source: the same release number must not give the same noise."""
    before_crash, after_resume = NoiseSource(), NoiseSource()
    assert not torch.equal(draw(before_crash, 7), draw(after_resume, 7))
    # The broken twin: a secret derived from the run's seed replays, and this check sees it.
    replayed = NoiseSource(insecure_seed=1), NoiseSource(insecure_seed=1)
    assert torch.equal(draw(replayed[0], 7), draw(replayed[1], 7))


def test_ranks_with_one_secret_draw_the_same_noise_in_any_order():
    first, second = NoiseSource(), NoiseSource()
    second.adopt_secret(first.export_secret())
    expected = [draw(first, number) for number in (1, 2, 3)]
    got = {number: draw(second, number) for number in (3, 1, 2)}
    for number, noise in zip((1, 2, 3), expected, strict=True):
        assert torch.equal(noise, got[number])


def test_releases_and_leaves_are_independent():
    source = NoiseSource()
    draws = [draw(source, n, leaf, 20_000) for n in (1, 2, 257) for leaf in ("noise", "other")]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws), dtype=torch.float64)
    assert correlation.abs().max() < 6 / 20_000**0.5
    assert len(torch.cat(draws).unique()) == len(draws) * 20_000


def test_tail_is_not_cut_at_the_limit_of_float32_draws():
    """float32 Box-Muller cannot pass 5.768 std (accounting, section 6); 6e8 draws pass it 4.8 times on average.

    Checked without the draws: the ziggurat's tail comes from a logarithm of a 53-bit uniform, so a source whose draws
    were rounded to float32 uniforms would repeat values; ours does not repeat one in 2e6.
    """
    noise = draw(NoiseSource(), 1, size=2_000_000)
    assert len(noise.unique()) == len(noise)
    assert len(torch.randn(2_000_000, generator=torch.Generator().manual_seed(0)).unique()) < 2_000_000


def test_secret_cannot_be_saved_or_shown():
    source = NoiseSource()
    for save in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="secret"):
            save(source)
    assert source.export_secret().hex() not in repr(source)


@pytest.mark.parametrize("std", [-1.0, float("nan"), float("inf")])
def test_bad_std_is_refused(std):
    with pytest.raises(ValueError, match="noise std"):
        NoiseSource().gaussian((3,), std=std, release_number=1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_cannot_repeat_its_parents_noise():
    source = NoiseSource()
    asked = (
        lambda: draw(source, 1),
        lambda: draw(source, 1, size=3 * _PART),
        lambda: source.add_gaussian(torch.zeros(3).double(), std=1.0, release_number=1),
        lambda: source.generator(release_number=1, leaf="noise"),
        lambda: source.borrowed(release_number=1, leaf="noise"),
        lambda: source.coin_seed(release_number=1, block=0),
    )

    def refusals() -> int:
        count = 0
        for ask in asked:
            try:
                ask()
            except PrivacyProtocolError:
                count += 1
        return count

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads; the child only hashes
        child = os.fork()
    if child == 0:
        os._exit(refusals())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == len(asked)
    assert refusals() == 0


def test_a_forked_child_is_refused_before_torch_would_wait_for_threads_that_it_has_not(monkeypatch):
    source = NoiseSource()
    source._process = -1
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: pytest.fail("asked for a long tensor first"))
    with pytest.raises(PrivacyProtocolError, match="forked"):
        draw(source, 1, size=3 * _PART)


@pytest.mark.parametrize("size", [0, 1, 2**15, 2**15 + 1, 2**18 + 1])
def test_noise_that_is_added_in_blocks_is_the_noise_that_is_drawn(size):
    source, total = NoiseSource(), torch.linspace(-5, 5, size, dtype=torch.float64)
    wanted = source.gaussian((size,), std=2.5, release_number=3).add_(total)
    kept = total.clone()
    found = source.add_gaussian(total, std=2.5, release_number=3)
    assert torch.equal(found, wanted)
    assert found.data_ptr() == total.data_ptr()
    assert size == 0 or not torch.equal(total, kept)


def test_noise_is_added_to_nothing_less_precise():
    with pytest.raises(ValueError, match="float64"):
        NoiseSource().add_gaussian(torch.zeros(3), std=1.0, release_number=1)
    with pytest.raises(ValueError, match="noise std"):
        NoiseSource().add_gaussian(torch.zeros(3).double(), std=-1.0, release_number=1)


def long_noise(source: NoiseSource, size: int = 2 * _PART + 5) -> torch.Tensor:
    return source.gaussian((size,), std=2.5, release_number=3)


def test_threads_draw_the_same_noise_whatever_their_number(monkeypatch):
    source = NoiseSource(insecure_seed=1)
    found = []
    for number in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        found.append(long_noise(source))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def parts_repeat(noise: torch.Tensor) -> bool:
    first, second, third = noise.split(_PART)
    return bool((first == second).any() or (first[: len(third)] == third).any())


def test_parts_of_a_long_release_repeat_nothing(monkeypatch):
    noise = long_noise(NoiseSource())
    assert not parts_repeat(noise)
    low, high = stats.chi2.interval(0.9999, len(noise))
    assert low <= (noise / 2.5).square().sum().item() <= high

    plain = NoiseSource.borrowed
    monkeypatch.setattr(NoiseSource, "borrowed", lambda self, **name: plain(self, **{**name, "leaf": "noise"}))
    assert parts_repeat(long_noise(NoiseSource())), "one key for all parts goes unnoticed"

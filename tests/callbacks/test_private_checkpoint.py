import io
import signal
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric.plugins import TorchCheckpointIO

from callbacks.private_checkpoint import PrivateCheckpoint, StreamedCheckpointIO
from lightning_dp.errors import ConfigurationError
from lightning_dp.gradients.ranks import Ranks
from tests.conftest import tiny_gan


class Code:
    """Would run on unpickling."""

    def __reduce__(self):
        return (print, ("ran",))


@pytest.fixture
def buffers(monkeypatch):
    """Sizes of what was built up in memory before it reached a file."""
    seen = []

    class Spy(io.BytesIO):
        def getvalue(self):
            seen.append(self.getbuffer().nbytes)
            return super().getvalue()

    monkeypatch.setattr(io, "BytesIO", Spy)
    return seen


def test_a_checkpoint_goes_straight_to_its_file_and_comes_back_mapped(tmp_path, buffers):
    state = {"teachers": torch.arange(250_000.0), "round": 3}
    StreamedCheckpointIO().save_checkpoint(state, tmp_path / "a.ckpt")
    assert sum(buffers) < 10_000  # pickled names, no tensor
    found = StreamedCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(found["teachers"], state["teachers"])
    assert found["round"] == 3
    found["teachers"].zero_()  # a private mapping: the file keeps what was saved
    again = StreamedCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(again["teachers"], state["teachers"])
    TorchCheckpointIO().save_checkpoint(state, tmp_path / "b.ckpt")  # the broken twin
    assert max(buffers) > 1_000_000


def test_a_checkpoint_is_its_owners_wherever_it_lies(tmp_path):
    """A folder that a program made may be open to all."""
    path = tmp_path / "a.ckpt"
    path.touch(mode=0o666)
    StreamedCheckpointIO().save_checkpoint({"round": 3}, path)
    assert path.stat().st_mode & 0o077 == 0


def test_a_checkpoint_runs_no_code_whatever_is_asked(tmp_path):
    torch.save({"a": Code()}, tmp_path / "a.ckpt")
    with pytest.raises(ConfigurationError, match="not readable"):
        StreamedCheckpointIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=False)


def test_once_the_last_release_is_made_an_interrupt_is_what_it_was(tmp_path, monkeypatch):
    """Judging follows, and takes long: no release would carry the word that the run should stop."""
    monkeypatch.setattr(PrivateCheckpoint, "_save", lambda *_: None)
    checkpoint = PrivateCheckpoint(path=tmp_path / "last.ckpt", accountant=SimpleNamespace(ledger=[1]))
    module, before = tiny_gan(), signal.signal(signal.SIGINT, signal.default_int_handler)
    module.ranks = Ranks(0, 2)
    try:
        checkpoint.on_train_start(None, module)
        found = []
        for is_last in (False, True):
            checkpoint.on_train_batch_end(SimpleNamespace(should_stop=is_last), module, None, None, 0)
            found.append(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    finally:
        signal.signal(signal.SIGINT, before)
    assert found == [False, True]

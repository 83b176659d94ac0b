"""Files that were damaged at random: refused in one line, or read as no less than what was spent; never a traceback."""

import gzip
import json
import random
from typing import Any

import pytest

from lightning_dp.accounting.budget_state import state_of
from lightning_dp.accounting.dataset_budget import DatasetBudget
from lightning_dp.accounting.events import (
    GaussianRelease,
    NonPrivateRelease,
    Sampling,
    TernaryRelease,
    VonMisesFisherRelease,
    ZCDPRelease,
)
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.accounting.ledger_lines import canonical_json, digest, seal, unseal
from lightning_dp.cli import main
from lightning_dp.errors import ConfigurationError, DataError, LedgerError
from tests.accounting.budgets import flags, request
from tests.datamodules.conftest import contents, small_files, small_mnist

__all__ = ["contents", "small_files", "small_mnist"]

HEADER = {
    "relation": "replace_one",
    "unit": "record",
    "mechanism": "Gaussian",
    "target_delta": 1e-5,
    "planned": None,
    "num_records": 40,
}
EVENTS = (
    GaussianRelease(noise_std=10.0, l2_sensitivity=1.0),
    ZCDPRelease(rho=0.01),
    TernaryRelease(noise_std=50.0, l2_sensitivity=2.0, threshold=7.0, max_abs_vote=10, changes=((1, 0), (0, 2))),
    VonMisesFisherRelease(distance=1.0, dim=5),
    NonPrivateRelease(),
)
SAMPLINGS = (Sampling(scheme="full"), Sampling(scheme="poisson", rate=0.1))
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**70, 0.5, 1e308, "", "x", "gaussian", "replace_one", [], {}, [[]], {"kind": "zcdp"}),
    *([1, 2], {"scheme": "full"}, {"rate": 2}),
)
MANY = [50, pytest.param(1000, marks=pytest.mark.slow)]


def scratched(data: bytes, dice: random.Random) -> bytes:
    """Return the bytes with something changed, cut, doubled, moved or made up."""
    text = bytearray(data)
    for _ in range(dice.randint(1, 3)):
        how, place = dice.randrange(7), dice.randrange(max(1, len(text)))
        if how == 0 and text:
            text[place] ^= 1 << dice.randrange(8)
        elif how == 1:
            del text[place:]
        elif how == 2:
            del text[place : place + dice.randint(1, 40)]
        elif how == 3:
            text[place:place] = bytes(dice.randrange(256) for _ in range(dice.randint(1, 20)))
        else:
            lines = bytes(text).splitlines(keepends=True) or [b""]
            line = dice.randrange(len(lines))
            if how == 4:
                lines.insert(line, lines[dice.randrange(len(lines))])
            elif how == 5:
                del lines[line]
            else:
                dice.shuffle(lines)
            text = bytearray(b"".join(lines))
    return bytes(text)


def resealed(data: bytes, dice: random.Random) -> bytes:
    """Return the lines with one value replaced, under seals that hold: as a hostile hand would."""
    texts, head = [], ""
    for line in data.splitlines():
        opened = unseal(head, line)
        assert opened is not None
        text, head = opened
        texts.append(json.loads(text))
    node, steps = texts, dice.randint(1, 5)
    for _ in range(steps):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = dice.choice(keys)
        inner = node[key]
        if isinstance(inner, dict | list) and inner and dice.random() < 0.8:
            node = inner
            continue
        if dice.random() < 0.2 and isinstance(node, dict):
            del node[key]
        else:
            node[key] = dice.choice(ODD)
        break
    else:
        node.clear()
    out, head = b"", ""
    for value in texts:
        text = canonical_json(value)
        if not isinstance(value, dict) or not value:
            out += text.encode() + b"\n"
            continue
        line, head = seal(head, text)
        out += line + b"\n"
    return out


@pytest.fixture(scope="module")
def ledger_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "ledger.jsonl"
    with PrivacyLedger(HEADER, path, durable=False) as ledger:
        for event in EVENTS:
            for sampling in SAMPLINGS:
                ledger.append(event, sampling)
    return path.read_bytes()


def are_lines(messages: list[str]) -> bool:
    return all(len(message.splitlines()) == 1 and len(message) > 20 for message in messages)


@pytest.mark.parametrize("number", MANY)
def test_a_damaged_ledger_is_refused_or_charges_no_less(tmp_path, ledger_bytes, number, capsys):
    dice, path, refused = random.Random(1), tmp_path / "ledger.jsonl", list[str]()
    for index in range(number):
        data = scratched(ledger_bytes, dice)
        path.write_bytes(data)
        try:
            ledger = PrivacyLedger.read(path)
        except LedgerError as error:
            refused.append(str(error))
            if index % 10 == 0:
                assert main(["account", str(path)]) == 2
                assert len(capsys.readouterr().err.splitlines()) == 1
            continue
        # Nothing was changed, or only what a crash may tear: the end. Every line that is left is charged.
        lines = data.split(b"\n")
        assert ledger_bytes.startswith(b"\n".join(lines[:-1])), index
        assert len(ledger) == len(lines) - 2 + bool(lines[-1] and len(lines) > 2), index
    assert are_lines(refused)
    assert len(refused) > 0.6 * number


@pytest.mark.parametrize("number", MANY)
def test_a_forged_ledger_ends_in_a_line_or_in_a_claim(tmp_path, ledger_bytes, number, capsys):
    """Seals that hold around odd values: no traceback, neither in the library nor on the command line."""
    dice, path, refused = random.Random(2), tmp_path / "ledger.jsonl", 0
    for index in range(number):
        path.write_bytes(resealed(ledger_bytes, dice))
        capsys.readouterr()
        code = main(["account", str(path)])
        captured = capsys.readouterr()
        assert code in (0, 2), index
        assert len(captured.err.splitlines()) == (code == 2), (index, captured.err)
        refused += code == 2
    assert refused > 0.3 * number


@pytest.mark.parametrize("number", MANY)
def test_a_damaged_checkpoint_state_is_refused(ledger_bytes, number, tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(ledger_bytes)
    state, dice, refused = PrivacyLedger.read(path).state_dict(), random.Random(3), list[str]()
    for index in range(number):
        odd = json.loads(json.dumps(state))
        node = odd
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = dice.choice(keys)
            if isinstance(node[key], dict | list) and node[key] and dice.random() < 0.7:
                node = node[key]
                continue
            before = node[key]
            node[key] = dice.choice(ODD)
            same = node[key] == before and type(node[key]) is type(before)
            break
        is_sealed = dice.random() < 0.5 and "header" in odd and "runs" in odd and "format" in odd
        if is_sealed:
            odd["sha256"] = digest("", canonical_json({name: odd[name] for name in ("format", "header", "runs")}))
        try:
            ledger = PrivacyLedger.from_state_dict(odd)
        except ConfigurationError as error:
            refused.append(str(error))
            continue
        assert same or is_sealed, index
        assert len(ledger) >= 0
    assert are_lines(refused)
    assert len(refused) > 0.5 * number


@pytest.mark.parametrize("number", MANY)
def test_a_damaged_budget_is_refused_or_charges_no_less(tmp_path, number, capsys):
    budget, dice, refused = DatasetBudget(tmp_path / "budget"), random.Random(4), list[str]()
    for name in "abc":
        budget.reserve(flags(budget.folder), [request(name, 3)])
    path, head = budget.folder / "budget.jsonl", budget.folder / "budget.head"
    whole, whole_head = path.read_bytes(), head.read_bytes()
    for index in range(number):
        data, forged = whole, index % 2 == 0
        if forged:
            data = resealed(whole, dice)
            head.unlink(missing_ok=True)
        elif dice.random() < 0.8:
            data = scratched(whole, dice)
            head.write_bytes(whole_head)
        else:
            head.write_bytes(scratched(whole_head, dice))
        path.write_bytes(data)
        try:
            budget.state()
        except LedgerError as error:
            refused.append(str(error))
            continue
        except ConfigurationError as error:
            raise AssertionError(index) from error
        finally:
            capsys.readouterr()
            code = main(["account", "--dataset", str(budget.folder)])
            assert code in (0, 2)
            assert len(capsys.readouterr().err.splitlines()) == (code == 2), index
        if not forged:
            assert data.startswith(whole) or head.read_bytes() != whole_head, index
            assert set(state_of(budget._file.read(), path).runs) == set("abc"), index
    assert are_lines(refused)
    assert len(refused) > 0.6 * number


@pytest.mark.parametrize("number", MANY)
def test_damaged_data_files_are_refused_and_whole_ones_are_not(tmp_path, small_mnist, contents, number):
    dice, refused = random.Random(6), list[str]()
    for index in range(number):
        root = tmp_path / f"data{index % 4}"
        folder = root / "MNIST" / "raw"
        folder.mkdir(parents=True, exist_ok=True)
        target, zipped = dice.choice(list(contents)), dice.random() < 0.5
        for name, data in contents.items():
            for old in folder.glob(f"{name}*"):
                old.unlink()
            packed = gzip.compress(data, 1) if zipped else data
            if name == target:
                inside = zipped and dice.random() < 0.5
                packed = gzip.compress(scratched(data, dice), 1) if inside else scratched(packed, dice)
            (folder / (name + ".gz" * zipped)).write_bytes(packed)
        try:
            module = small_mnist(root=str(root))
            module.setup("fit")
        except DataError as error:
            refused.append(str(error))
            continue
        # What was scratched did not reach the content (a byte of a gzip header, say).
        name = small_mnist.files.train_images.name
        assert module.train_images.numpy().tobytes() == contents[name][16:], index
    assert are_lines(refused)
    assert len(refused) > 0.8 * number

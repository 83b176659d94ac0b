"""The table of results in README says what the published comparison says."""

import json
import re
from collections import defaultdict
from statistics import mean

from tests.policy.sources import ROOT

RECORDS = ROOT / "docs" / "results" / "standard" / "records.jsonl"
NONE = "not run"
COLUMNS = (("MNIST", 10.0), ("MNIST", 1.0), ("FashionMNIST", 10.0), ("FashionMNIST", 1.0))
ROW = re.compile(r"^\| ([^|`]+) \| `(\w+)` \| (.+) \|$", re.M)


def published() -> dict[tuple[str, str, str, float], str]:
    """Return the text of every cell: mean accuracy over seeds, and mean FID where images are judged."""
    found = defaultdict(list)
    for line in RECORDS.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["status"] == "finished":
            key = (record["method"], record["mechanism"], record["data"], record["target_epsilon"])
            found[key].append(record["metrics"])
    texts = {}
    for key, metrics in found.items():
        name = "accuracy/cnn" if "accuracy/cnn" in metrics[0] else "accuracy/test"
        accuracy = f"{mean(one[name] for one in metrics):.3f}".lstrip("0")
        texts[key] = f"{accuracy} / {mean(one['fid'] for one in metrics):.0f}" if "fid" in metrics[0] else accuracy
    return texts


def test_readme_shows_what_was_published():
    known, checked = published(), 0
    for label, mechanism, cells in ROW.findall((ROOT / "README.md").read_text(encoding="utf-8")):
        method = re.sub(r", (?:three|two|\d+) seeds?$| \(its own test accuracy\)$|, joint gradient$", "", label)
        for text, (data, epsilon) in zip(cells.split(" | "), COLUMNS, strict=True):
            shown = known.get((method, mechanism, data, epsilon), NONE)
            assert (label, data, epsilon, text) == (label, data, epsilon, shown)
            checked += 1
    assert checked >= 60

import json

import pytest

from benchmarks import scaling
from benchmarks.ranks import SUMMED, section, write_section

CONSTANTS = {
    "noise_per_s": 5e7,
    "checksum_bytes_per_s": 2e9,
    "copy_bytes_per_s": 1e10,
    "coins_per_s": 1e8,
    "bytes_per_parameter": 50.0,
    "s_per_parameter": 5e-8,
    "s_per_record_and_parameter": 1e-10,
}
GROUP = {"word_s": 2e-4, **{f"sum_{number}_s": number * 4e-9 for number in SUMMED}}


def found():
    lines = [
        {"method": "records", "size": size, "busiest_s": 0.1 / size, "all_s": 0.11, "peak_bytes": 4e8}
        for size in (1, 2)
    ]
    return {"lines": lines, "constants": {"1": CONSTANTS, "2": GROUP}}


def test_the_section_shows_every_size_and_replaces_itself(tmp_path):
    path = tmp_path / "performance.md"
    path.write_text("# Performance\n\ntext\n\n## Processes\n\nold\n\n## After\n\nkept\n")
    write_section(path, section(found(), "today"))
    write_section(path, section(found(), "today"))
    text = path.read_text()
    assert "| records | 100.0 (110.0) | 50.0 (110.0) | 400 / 400 |" in text
    assert "old" not in text
    assert text.count("## Processes") == text.count("## After") == 1
    assert text.endswith("kept\n")


@pytest.mark.parametrize("after", ["", "\n## After\n\nkept\n"])
def test_notes_below_the_tables_stay(tmp_path, after):
    path = tmp_path / "performance.md"
    path.write_text(f"# Performance\n\n{section(found(), 'today')}\n- A note.\n{after}")
    write_section(path, section(found(), "tomorrow"))
    write_section(path, section(found(), "tomorrow"))
    assert path.read_text() == f"# Performance\n\n{section(found(), 'tomorrow')}\n- A note.\n{after}"


def test_the_plan_follows_its_formulae(tmp_path, capsys):
    path = tmp_path / "ranks.json"
    path.write_text(json.dumps(found()))
    assert scaling.main([str(path), "--batch", "1000", "--record_bytes", "100"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 8 ")]
    cells = [float(cell) for cell in rows[0].strip("| ").split(" | ")]
    expected = [8, 1000 / 8 * 1e8 * 1e-10, 1e8 * 5e-8, 8e8 / 2e9, 1e7 / 8 / 1e8, 2 * 7 / 8 * 8e8 / 2e9]
    assert cells[:-1] == pytest.approx(expected, rel=0.01)
    assert cells[-1] == pytest.approx(sum(expected[1:]), rel=0.01)

import json

import pytest

from benchmarks import __main__ as command
from benchmarks import dpsgd, growth, overhead, releases, sinkhorn, teachers
from benchmarks.tables import Table, conditions, write_between_markers
from benchmarks.teachers import matmul_seconds


def table(**changes) -> Table:
    given = {"name": "speed", "title": "Speed, in all", "columns": ["a", "b"], "rows": [["1", "2"]]}
    return Table(**(given | changes))


def test_a_table_says_what_it_aimed_at():
    text = table(targets={"faster than light": False, "at all": True}).markdown("today")
    assert text.splitlines()[:5] == ["Speed, in all (today).", "", "| a | b |", "| --- | --- |", "| 1 | 2 |"]
    assert "- Target, faster than light: **missed**." in text
    assert "- Target, at all: met." in text


def test_words_around_a_table_stay_and_another_device_has_its_own(tmp_path):
    document = tmp_path / "speeds.md"
    document.write_text("# Speeds\n\nBefore.\n")
    write_between_markers(document, table(), "first")
    document.write_text(document.read_text() + "\nAfter.\n")
    write_between_markers(document, table(device="cuda"), "on a GPU")
    write_between_markers(document, table(), "second")
    text = document.read_text()
    assert "first" not in text
    parts = [text.index(part) for part in ("Before.", "## Speed\n", "second", "on a GPU", "After.")]
    assert parts == sorted(parts)
    assert text.count("<!-- benchmark: speed, cpu -->") == 1


def test_a_marker_without_its_end_is_refused(tmp_path):
    document = tmp_path / "speeds.md"
    document.write_text("<!-- benchmark: speed, cpu -->\n")
    with pytest.raises(ValueError, match="end of benchmark"):
        write_between_markers(document, table(), "text")


def test_conditions_name_machine_and_version():
    words = conditions("cpu", quick=True)
    assert "cores" in words
    assert "torch" in words
    assert "short run" in words


def test_the_command_writes_document_and_numbers(tmp_path, monkeypatch):
    missed = table(targets={"all": False})
    monkeypatch.setattr(command, "benchmarks_of", lambda device: {"speed": lambda quick: missed, "other": None})
    monkeypatch.setattr(command, "devices", lambda: ["cpu"])
    paths = tmp_path / "speeds.md", tmp_path / "speeds.json"
    assert command.main(["--only", "speed", "--docs", str(paths[0]), "--json", str(paths[1])]) == 1
    assert "missed" in paths[0].read_text()
    assert json.loads(paths[1].read_text()) == [missed.to_dict()]


def test_every_benchmark_runs_on_the_device_that_it_is_given(monkeypatch):
    seen = []
    found = {"samples_per_s": 1.0, "step_s": 1.0, "round_s": 1.0, "peak_bytes": 1, "step_bytes": 1}

    def noted(*task, device=None, seconds=0.0):
        seen.append(device or next(part for part in task if part in ("cpu", "cuda")))
        return found

    for module in (dpsgd, teachers, sinkhorn):
        monkeypatch.setattr(module, "measure_apart", noted)
    for module in (dpsgd, teachers):
        monkeypatch.setattr(module, "measure", noted)
    monkeypatch.setattr(teachers, "matmul_seconds", lambda *task: 1.0)
    monkeypatch.setattr(sinkhorn, "measure_apart", lambda *task: noted(*task) | {"gradient_error": 0.0})
    monkeypatch.setattr(releases, "measure", lambda *task, **options: noted(**options) and (1.0, 1.0))
    times = {"alone": [1.0], "framed": [1.0], "clock": [1.0]}
    monkeypatch.setattr(overhead, "alternating", lambda size, steps, device: noted(device) and times)
    for run in command.benchmarks_of("cuda").values():
        seen.clear()
        assert run(True).device == "cuda"
        assert set(seen) == {"cuda"}


def test_a_device_can_be_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        command, "benchmarks_of", lambda device: {"speed": lambda quick: asked.append(device) or table()}
    )
    command.main(["--device", "cpu", "--only", "speed", "--docs", str(tmp_path / "speeds.md")])
    assert asked == ["cpu"]


def test_unknown_benchmarks_are_refused():
    with pytest.raises(SystemExit):
        command.main(["--only", "nothing"])


@pytest.mark.parametrize("name", releases.MECHANISMS)
def test_rows_and_releases_take_time(name):
    assert all(seconds > 0 for seconds in releases.measure(name, 50, seconds=0.0))


def test_dense_teachers_multiply_what_their_layers_do(monkeypatch):
    """Weights and inputs of the layers: forward and backward of 2 B samples for training, of B samples for rows."""
    monkeypatch.setattr(releases, "fastest", lambda *args, **options: 1.0)
    first, rest = 784 * 64, 64 * 64 + 64 * 10
    wanted = 2 * (2 * first + 3 * rest) + 2 * (first + rest)  # of one sample; inputs have no gradient in training
    assert 1024**3 * matmul_seconds("mlp", 5, "cpu") == pytest.approx(5 * wanted)


def test_growth_is_a_slope():
    assert growth._line("n", "step", (10, 1000), lambda size: size**2)[-1] == "2.00"


def test_framed_and_bare_steps_alternate():
    found = overhead.alternating(4, 2)
    assert all(len(times) == 2 and min(times) > 0 for times in found.values())

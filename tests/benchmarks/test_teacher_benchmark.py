import pytest

from benchmarks.teachers import measure, print_table


@pytest.mark.parametrize("backend", ["loop", "stacked"])
def test_a_measurement_counts_samples_and_memory(backend):
    result = measure("mlp", 3, backend, batch=2, device_name="cpu", seconds=0.0)
    assert result["rounds"] == 2
    assert result["samples_per_s"] == pytest.approx(3 * 2 / result["round_s"])
    assert result["peak_bytes"] > 1e6


def test_the_table_shows_the_automatic_choice(capsys):
    measured = {"samples_per_s": 1000.0, "peak_bytes": 2e9}
    line = {"network": "mlp", "num_teachers": 50, "batch": 30, "automatic": "loop", "automatic_to_better": 0.97}
    print_table([line | {"loop": measured, "stacked": measured}])
    printed = capsys.readouterr().out
    assert "1,000" in printed
    assert "2.00" in printed
    assert "0.97" in printed

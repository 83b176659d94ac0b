import pytest

from benchmarks.sinkhorn import Problem, closed_form, measure, misses_target, print_table


def test_a_measurement_counts_steps_and_memory():
    result = measure("ours", 10, 12, seconds=0.0)
    assert result["steps"] == 2
    assert result["peak_bytes"] > 1e6
    assert result["gradient_error"] == 0


@pytest.mark.parametrize("program", ["geomloss", "geomloss_cdist"])
@pytest.mark.filterwarnings("ignore")
def test_geomloss_does_the_same_work(program):
    pytest.importorskip("geomloss")
    result = measure(program, 10, 12, seconds=0.0)
    assert result["gradient_error"] < 1e-3


def test_the_programs_get_one_problem():
    """Fresh points have labels of the compared ones, and features hold what the closed form is given."""
    problem = Problem(10, 12)
    leaf, generated, real = problem.features()
    assert leaf.shape == (12, 12)
    assert (generated.shape, real.shape) == ((12, 22), (10, 22))
    assert problem.labels[10:].equal(problem.labels[:2])
    assert closed_form(problem)[1].shape == leaf.shape


def test_the_table_and_the_target(capsys):
    line = {"size": 50, "pixels": 784, "peak_bytes": 2e9, "gradient_error": 1e-4}
    lines = [
        {"program": name, "step_s": seconds, "to_ours": seconds / 0.002, **line}
        for name, seconds in (("ours", 0.002), ("compiled", 0.001), ("geomloss", 0.011))
    ]
    print_table(lines)
    printed = capsys.readouterr().out
    assert "5.5" in printed
    assert "11.00" in printed
    assert not misses_target(lines)
    assert misses_target([*lines[:2], {**lines[2], "step_s": 0.009}])
    assert not misses_target(lines[:2])

"""Who may be called best: beyond the spread over seeds, with a proof, on one protocol; else nobody."""

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dp.accounting.events import NonPrivateRelease
from lightning_dp.benchmark.rows import Result, Row, best_row, blocks_of, metrics_of, rows_of
from lightning_dp.evaluation.report import RunCard
from tests.benchmark.made_up import evaluation, result

CNN = "accuracy/cnn"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished run without a special mark, to vary: its claim takes a calibration."""
    return result(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def varied(base):
    """Return a function that makes runs of one row, one per value, from the same claim."""

    def make(method, values, *, fid=None, protocol="aaaabbbbcccc", **changes):
        judged = [evaluation(value, fid[i] if fid else 12.0, protocol) for i, value in enumerate(values)]
        card = base.card.to_dict()
        return [
            Result(
                RunCard.from_dict(
                    {
                        **card,
                        "title": method,
                        "evaluation": one,
                        "config": {**card["config"], "seed_everything": seed},
                        **changes,
                    }
                ),
                base.run_dir,
            )
            for seed, one in enumerate(judged, start=1)
        ]

    return make


def test_a_clear_winner(varied):
    rows = rows_of([*varied("a", [0.90, 0.91, 0.92]), *varied("b", [0.80, 0.81, 0.82])])
    assert best_row(rows, CNN) is rows[0]
    assert rows[0].text(CNN) == "0.910 ± 0.010"


def test_lower_is_better_for_distances(varied):
    rows = rows_of([*varied("a", [0.9] * 3, fid=[30, 31, 32]), *varied("b", [0.9] * 3, fid=[10, 11, 12])])
    assert best_row(rows, "fid") is rows[1]


def the_larger_mean(rows, metric):
    """The broken rule: whoever has the larger mean wins."""
    return max(rows, key=lambda row: statistics.fmean(row.values(metric)))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([0.90, 0.95, 0.97], [0.85, 0.88, 0.91]),  # ranges overlap
        ([0.90, 0.98, 0.98], [0.80, 0.89, 0.89]),  # apart, but within the deviations
        ([0.95, 0.96], [0.80, 0.81]),  # two seeds say little
        ([0.95, 0.96, 0.97], [0.80]),  # nor does one of the other's
        ([0.95], [0.80]),
        ([0.9, 0.9, 0.9], [0.9, 0.9, 0.9]),  # a tie
    ],
)
def test_no_winner_inside_the_noise(varied, ours, theirs):
    rows = rows_of([*varied("a", ours), *varied("b", theirs)])
    assert the_larger_mean(rows, CNN) is rows[0]  # what the broken rule would print in bold
    assert best_row(rows, CNN) is None


def test_a_winner_beats_every_other_row(varied):
    """Far ahead of one and close to another is no win."""
    rows = rows_of(
        [*varied("a", [0.90, 0.91, 0.92]), *varied("b", [0.1, 0.2, 0.3]), *varied("c", [0.895, 0.905, 0.915])]
    )
    assert best_row(rows, CNN) is None


def test_alone_is_no_win(varied):
    assert best_row(rows_of(varied("a", [0.9, 0.91, 0.92])), CNN) is None


def test_a_seed_without_the_number_counts_as_missing(varied):
    rows = rows_of([*varied("a", [0.9, 0.91, float("nan")]), *varied("b", [0.1, 0.11, 0.12])])
    assert rows[0].values(CNN) == [0.9, 0.91]
    assert best_row(rows, CNN) is None


def test_protocols_do_not_meet(varied):
    """FIDs of two protocols are never in one block, and asking anyway marks nobody."""
    one = varied("a", [0.9] * 3, fid=[10, 11, 12])
    other = varied("b", [0.1] * 3, fid=[50, 51, 52], protocol="ddddeeeeffff")
    rows = rows_of([*one, *other])
    assert [[row.first.card.title for row in block] for block in blocks_of(rows)] == [["a"], ["b"]]
    assert best_row(rows, "fid") is None


def test_blocks_are_of_one_epsilon(tmp_path):
    rows = rows_of([result(tmp_path, epsilon=1.0), result(tmp_path, epsilon=2.0), result(tmp_path, method="b")])
    assert [[row.label for row in block] for block in blocks_of(rows)] == [
        ["method, Gaussian", "b, Gaussian"],
        ["method, Gaussian"],
    ]
    assert [row.target_epsilon for row in rows] == [1.0, 2.0, 1.0]


@pytest.mark.parametrize(
    "changes",
    [
        {"event": NonPrivateRelease(), "mechanism": "NoPrivacy"},
        {"unverified": ["that noise is secret"]},
        {"conditional_on": ["a pretrained encoder"]},
    ],
    ids=["nonprivate", "unverified", "conditional"],
)
def test_without_a_proof_there_is_no_epsilon_and_no_rank(tmp_path, changes):
    proved = rows_of([result(tmp_path, seed=seed, judged=evaluation(0.5)) for seed in (1, 2, 3)])
    better = rows_of([result(tmp_path, seed=seed, judged=evaluation(0.99), **changes) for seed in (1, 2, 3)])
    (row,) = better
    assert row.epsilon is None
    assert row.target_epsilon is None
    assert len(blocks_of([*proved, *better])) == 2
    assert best_row([*proved, *better], CNN) is None


def test_a_run_without_privacy_is_one_row_for_all_targets(tmp_path):
    runs = [result(tmp_path, epsilon=e, event=NonPrivateRelease(), mechanism="NoPrivacy") for e in (1.0, 10.0)]
    assert len(rows_of(runs)) == 1


def test_unverified_runs_of_two_calibrations_are_two_rows(tmp_path):
    runs = [result(tmp_path, epsilon=e, unverified=["x"]) for e in (1.0, 10.0)]
    assert len(rows_of(runs)) == 2


def test_metrics_in_the_order_of_tables(varied):
    assert metrics_of(rows_of(varied("a", [0.9]))) == [CNN, "fid", "kid", "precision", "recall"]


def test_text_of_one_seed_and_of_none(varied):
    (row,) = rows_of(varied("a", [0.9]))
    assert row.text(CNN) == "0.900"
    assert row.text("fid") == "12.0"
    assert row.text("accuracy/svm") == "-"


VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=4)


@settings(deadline=None, max_examples=40)
@given(st.lists(VALUES, min_size=1, max_size=3))
def test_whoever_is_marked_beats_every_seed(base, varied, groups):
    rows = [Row(tuple(varied(f"m{index}", values))) for index, values in enumerate(groups)]
    best = best_row(rows, CNN)
    if best is not None:
        others = [row for row in rows if row is not best]
        assert all(min(best.values(CNN)) > max(row.values(CNN)) for row in others)
        assert all(len(row.values(CNN)) >= 3 for row in rows)

"""A request's key is over what decides the result, and is the same from the parser and from a run card."""

import json
import math

import pytest

from lightning_dp.benchmark.plan import request_key

REQUEST = {
    "name": "a",
    "run_dir": None,
    "seed_everything": 1,
    "trainer": {"max_steps": 3, "enable_progress_bar": True},
    "model": {"betas": [0.5, 0.9], "outside": math.inf},
}


@pytest.mark.parametrize("change", [{"name": "b"}, {"run_dir": "x"}, {"ckpt_path": "last"}, {"wandb": "offline"}])
def test_where_a_run_is_kept_is_no_part_of_it(change):
    assert request_key({**REQUEST, **change}) == request_key(REQUEST)


def test_nor_how_it_is_shown():
    shown = {**REQUEST["trainer"], "enable_progress_bar": False}
    assert request_key({**REQUEST, "trainer": shown}) == request_key(REQUEST)


def test_nor_where_teachers_lie():
    parts = {"init_args": {"teachers": {"init_args": {"network": "mlp"}}}}
    placed = {"init_args": {"teachers": {"init_args": {"network": "mlp", "state": "host"}}}}
    other = {"init_args": {"teachers": {"init_args": {"network": "small_conv"}}}}
    keys = [request_key({**REQUEST, "model": model}) for model in (parts, placed, other)]
    assert keys[0] == keys[1] != keys[2]


def test_nor_a_later_option_that_is_off():
    keys = [
        request_key({**REQUEST, "model": {"init_args": {"generator": {"init_args": {"width": 64, **more}}}}})
        for more in ({}, {"texture": 0.0}, {"texture": 0.1})
    ]
    assert keys[0] == keys[1] != keys[2]


def test_nor_one_of_a_warm_start():
    starts = [{"init_args": {"budget": 0.2, **more}} for more in ({}, {"slant": 0.0}, {"slant": 4.0})]
    keys = [request_key({**REQUEST, "warm_start": start}) for start in starts]
    assert keys[0] == keys[1] != keys[2]
    assert request_key({**REQUEST, "warm_start": None}) != request_key(REQUEST)  # as before


@pytest.mark.parametrize("part", ["critic", "generator"])
def test_a_class_of_ones_own_may_mean_something_by_such_a_name(part):
    first, second = ({"init_args": {part: {"init_args": {"state": state}}}} for state in ("auto", "host"))
    assert request_key({**REQUEST, "model": first}) != request_key({**REQUEST, "model": second})


@pytest.mark.parametrize(
    "change",
    [
        {"seed_everything": 2},
        {"trainer": {"max_steps": 4, "enable_progress_bar": True}},
        {"model": {"betas": [0.5, 0.99], "outside": math.inf}},
        {"a_new_option": 1},
    ],
)
def test_all_else_is(change):
    assert request_key({**REQUEST, **change}) != request_key(REQUEST)


def test_the_same_from_a_card():
    """A card holds lists for tuples, and text for infinities."""
    as_parsed = {**REQUEST, "model": {"betas": (0.5, 0.9), "outside": math.inf}}
    in_a_card = json.loads(json.dumps({**REQUEST, "model": {"betas": [0.5, 0.9], "outside": "inf"}}))
    assert request_key(as_parsed) == request_key(in_a_card)

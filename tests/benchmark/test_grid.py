"""A grid expands to every combination, and says in one line what is wrong with it."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dp.benchmark.grid import merge
from lightning_dp.benchmark.grid_file import DEFAULT_SEEDS, load_grid
from lightning_dp.errors import ConfigurationError
from tests.benchmark.made_up import BASE, write_grid


def test_every_combination_once_and_seeds_outermost(tmp_path):
    cells = load_grid(write_grid(tmp_path)).cells()
    assert [(cell.mechanism, cell.epsilon, cell.seed) for cell in cells] == [
        (mechanism, epsilon, seed)
        for seed in (1, 2)
        for epsilon in (1.0, 10.0)
        for mechanism in ("Gaussian", "NoPrivacy")
    ]
    assert len({cell.id for cell in cells}) == len(cells)
    assert cells[0].id == "first-Gaussian-Digits-eps1-seed1"


def test_privacy_is_the_grids_alone(tmp_path):
    """Whatever a method's own configuration says: relation, delta, epsilon; and the noise is calibrated."""
    for cell in load_grid(write_grid(tmp_path)).cells():
        assert cell.config["privacy"] == {
            "neighboring_relation": "replace_one",
            "target_epsilon": cell.epsilon,
            "target_delta": 1e-5,
            "accountant": "auto",
            "noise_multiplier": None,
        }
        assert cell.config["wandb_group"] == "made_up"
        assert cell.config["seed_everything"] == cell.seed


def test_options_stay_with_their_class(tmp_path):
    kept, dropped, *_ = load_grid(write_grid(tmp_path)).cells()
    assert kept.config["mechanism"] == {"class_path": "Gaussian", "init_args": {"max_grad_norm": 2.0}}
    assert dropped.config["mechanism"] == {"class_path": "NoPrivacy", "init_args": {}}
    assert kept.config["data"] == {"class_path": "Digits", "init_args": {}}


def test_layers_of_settings(tmp_path):
    """The nearest wins: grid, data, method, by_data, by_epsilon, mechanism."""

    def steps(number):
        return {"trainer": {"max_steps": number}}

    method = {"config": "base.yaml", "mechanisms": {"Gaussian": {}, "Own": {"class_path": "Gaussian"}}}
    layers = {
        "grid": lambda: write_grid(tmp_path, settings=steps(10)),
        "data": lambda: write_grid(tmp_path, settings=steps(10), data={"Digits": {"settings": steps(11)}}),
        "method": lambda: write_grid(
            tmp_path, settings=steps(10), methods={"first": {**method, "settings": {**steps(12), "name2": 1}}}
        ),
        "by_data": lambda: write_grid(
            tmp_path, methods={"first": {**method, "settings": steps(12), "by_data": {"Digits": steps(13)}}}
        ),
        "by_epsilon": lambda: write_grid(
            tmp_path, methods={"first": {**method, "settings": steps(12), "by_epsilon": {10: steps(14)}}}
        ),
    }
    found = {
        name: [c.config["trainer"]["max_steps"] for c in load_grid(make()).cells()] for name, make in layers.items()
    }
    assert set(found["grid"]) == {10}
    assert set(found["data"]) == {11}
    assert set(found["method"]) == {12}
    assert set(found["by_data"]) == {13}
    assert found["by_epsilon"] == [12, 12, 14, 14] * 2


def test_the_nearest_preset_is_taken_whole(tmp_path):
    """Epsilon, data, and both: a preset of both goes first, then that of the data."""
    path = write_grid(
        tmp_path,
        data=["Digits", "Letters", "Signs"],
        settings={"trainer": {"max_epochs": 2}},
        methods={
            "first": {
                "config": "base.yaml",
                "mechanisms": ["Gaussian"],
                "by_epsilon": {1: {"config": "low.yaml"}},
                "by_data": {
                    "Letters": {
                        "config": "letters.yaml",
                        "by_epsilon": {1: {"config": "both.yaml", "name2": 1}},
                    },
                    "Signs": {"config": "signs.yaml"},
                },
            }
        },
    )
    for number, name in enumerate(["low", "letters", "both", "signs"], start=5):
        config = {**BASE, "trainer": {"max_steps": number}, "mechanism": {"class_path": "Gaussian", "init_args": {}}}
        config["mechanism"]["init_args"] = {"max_grad_norm": float(number)}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    found = {(cell.data, cell.epsilon): cell.config for cell in load_grid(path).cells()}
    steps = {key: config["trainer"]["max_steps"] for key, config in found.items()}
    assert steps == {
        **{("Digits", 1.0): 5, ("Digits", 10.0): 3},
        **{("Letters", 1.0): 7, ("Letters", 10.0): 6},
        **{("Signs", 1.0): 8, ("Signs", 10.0): 8},
    }
    assert all(config["trainer"]["max_epochs"] == 2 for config in found.values())
    assert found["Letters", 1.0]["name2"] == 1
    assert found["Letters", 1.0]["mechanism"]["init_args"] == {"max_grad_norm": 7.0}


def test_a_variant_of_a_mechanism_has_a_name_of_its_own(tmp_path):
    variants = {"Gaussian": {}, "small bound": {"class_path": "Gaussian", "init_args": {"max_grad_norm": 0.1}}}
    path = write_grid(tmp_path, epsilons=[1], methods={"first": {"config": "base.yaml", "mechanisms": variants}})
    plain, small, *_ = load_grid(path).cells()
    assert (plain.config["name"], small.config["name"]) == ("first", "first (small bound)")
    assert small.config["mechanism"]["init_args"] == {"max_grad_norm": 0.1}
    assert small.id == "first-small_bound-Digits-eps1-seed1"


def test_three_seeds_unless_stated(tmp_path):
    assert load_grid(write_grid(tmp_path, seeds=...)).seeds == DEFAULT_SEEDS == (1, 2, 3)


def test_scientific_numbers_are_numbers(tmp_path):
    """PyYAML reads 1e-5 as text; the command line does not."""
    path = write_grid(tmp_path)
    path.write_text(path.read_text().replace("1.0e-05", "1e-5") + "settings: {model: {init_args: {rate: 2e-3}}}\n")
    grid = load_grid(path)
    assert grid.delta == 1e-5
    assert grid.settings["model"]["init_args"]["rate"] == 2e-3


METHOD = {"config": "base.yaml", "mechanisms": ["Gaussian"]}
MISTAKES = {
    "unknown key": ({"epsilon": [1]}, "Unknown key 'epsilon' in the grid grid.yaml.*Did you mean epsilons"),
    "no methods": ({"methods": ...}, "Missing in the grid grid.yaml: methods"),
    "methods empty": ({"methods": {}}, "at least one entry in methods"),
    "method key": ({"methods": {"a": {**METHOD, "mechanism": "x"}}}, "'mechanism' in methods.a.*mean mechanisms"),
    "choice key": (
        {"methods": {"a": {**METHOD, "mechanisms": {"Gaussian": {"top_k": 1}}}}},
        "Unknown key 'top_k' in methods.a.mechanisms.Gaussian; choose from class_path, init_args, settings",
    ),
    "no relation": ({"privacy": {"target_delta": 1e-5}}, "Missing in privacy: neighboring_relation"),
    "relation": ({"privacy": {"neighboring_relation": "replace", "target_delta": 1e-5}}, "replace_one"),
    "delta": ({"privacy": {"neighboring_relation": "replace_one", "target_delta": 2}}, "delta"),
    "mixed relations": (
        {"methods": {"a": {**METHOD, "settings": {"privacy": {"neighboring_relation": "replace_special"}}}}},
        "Expected no 'privacy' in methods.a.settings: the grid states privacy once",
    ),
    "seed twice over": ({"settings": {"seed_everything": 3}}, "list it under seeds"),
    "epsilon 0": ({"epsilons": [0]}, "finite number > 0 in epsilons, got 0"),
    "epsilon nan": ({"epsilons": [float("nan")]}, "finite number > 0 in epsilons"),
    "epsilon words": ({"epsilons": ["ten"]}, "finite number > 0 in epsilons, got 'ten'"),
    "epsilons no list": ({"epsilons": 1}, "Expected a list"),
    "epsilon twice": ({"epsilons": [1, 1.0]}, "every entry of epsilons once"),
    "seed -1": ({"seeds": [-1]}, "whole numbers >= 0 in seeds, got -1"),
    "data empty": ({"data": []}, "at least one entry in data"),
    "data no names": ({"data": [{"class_path": "x"}]}, "Expected a name in data"),
    "by_epsilon": ({"methods": {"a": {**METHOD, "by_epsilon": {3: {}}}}}, "by_epsilon of a among 1, 10, got 3"),
    "by_data": ({"methods": {"a": {**METHOD, "by_data": {"x": {}}}}}, "by_data of a among"),
    "by_epsilon of data": (
        {"methods": {"a": {**METHOD, "by_data": {"Digits": {"by_epsilon": {3: {}}}}}}},
        "by_epsilon of a among 1, 10, got 3",
    ),
    "by_epsilon twice": (
        {"methods": {"a": {**METHOD, "by_epsilon": {1: {"by_epsilon": {10: {}}}}}}},
        "Expected no 'by_epsilon' in methods.a.by_epsilon.1",
    ),
    "no config of a preset": (
        {"methods": {"a": {**METHOD, "by_data": {"Digits": {"config": "none.yaml"}}}}},
        "a configuration of a run at .*none.yaml",
    ),
    "no config": ({"methods": {"a": {**METHOD, "config": "none.yaml"}}}, "a configuration of a run at .*none.yaml"),
    "same file names": ({"methods": {"a b": METHOD, "a_b": METHOD}}, "differ as file names.*a_b-Gaussian"),
    "a list": ({"methods": [1]}, "'key: value' lines in methods"),
}


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(tmp_path, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        load_grid(write_grid(tmp_path, **changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("privacy: [", "no valid YAML"),
        ("", "'key: value' lines"),
        ("name: a\nname: b\n", "grid.yaml, line 2: 'name' twice"),
    ],
)
def test_no_grid_at_all(tmp_path, text, message):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        load_grid(path)


def test_a_missing_grid(tmp_path):
    with pytest.raises(ConfigurationError, match="Expected a grid of a comparison"):
        load_grid(tmp_path / "none.yaml")


TREES = st.recursive(st.integers(0, 3), lambda inner: st.dictionaries(st.sampled_from("abc"), inner), max_leaves=8)
MAPPINGS = st.dictionaries(st.sampled_from("abc"), TREES)


@settings(deadline=None, max_examples=50)
@given(MAPPINGS, MAPPINGS)
def test_merging(base, over):
    before = yaml.safe_dump([base, over])
    merged = merge(base, over)
    assert merge(merged, over) == merged
    assert merge(base, {}) == base
    assert set(merged) == set(base) | set(over)
    assert yaml.safe_dump([base, over]) == before  # neither side is changed


def test_cells_do_not_share_their_settings(tmp_path):
    first, second, *_ = load_grid(write_grid(tmp_path)).cells()
    first.config["trainer"]["max_steps"] = 99
    assert second.config["trainer"]["max_steps"] == BASE["trainer"]["max_steps"]

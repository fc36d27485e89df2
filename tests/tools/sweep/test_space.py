"""Sweep files: what they mean, and what is said of those that mean nothing."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmfusion.paths import shipped
from mmfusion.tools.sweep.space import Space, read_space
from mmfusion.training.rebuild import from_recipe


def space(tmp_path: Path, **changes: Any) -> Space:
    content = {"method": "grid", "parameters": {"a": {"values": [1, 2]}}, **changes}
    given = {key: value for key, value in content.items() if value is not None}
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(given, sort_keys=False))
    return read_space(str(file))


def test_a_grid_is_every_combination_the_last_changing_fastest(tmp_path: Path) -> None:
    parameters = {
        "data": {"parameters": {"seed": {"values": [3, 1]}}},
        "b.c": {"value": "x"},
        "d": {"min": 0, "max": 2},
    }
    found = space(tmp_path, parameters=parameters).trials(None, 0)
    expected = [(seed, "x", d) for seed in (3, 1) for d in (0, 1, 2)]
    assert [tuple(trial.values()) for trial in found] == expected
    assert [*found[0]] == ["data.seed", "b.c", "d"]
    assert space(tmp_path, parameters=parameters, run_cap=4).trials(None, 0) == found[:4]


def test_random_values_do_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    parameters = {"a": {"min": 0.0, "max": 1.0}, "b": {"values": [*range(100)]}}
    one = space(tmp_path, method="random", parameters=parameters)
    many = one.trials(50, 0)
    assert one.trials(7, 0) == many[:7]
    assert one.trials(50, 1) != many
    assert len({trial["a"] for trial in many}) == 50
    del parameters["a"]
    without = space(tmp_path, method="random", parameters=parameters)
    assert [t["b"] for t in without.trials(50, 0)] == [t["b"] for t in many]


def quantile(kind: str, given: dict[str, Any], share: float) -> float:
    """Below which this share of a distribution lies, from its definition."""
    low, high = given.get("min", 0), given.get("max", 1)
    flat = low + share * (high - low)
    mu, sigma = given.get("mu", 0), given.get("sigma", 1)
    bell = mu + sigma * statistics.NormalDist().inv_cdf(share)
    return {
        "uniform": flat,
        "log_uniform": math.exp(flat),
        "inv_log_uniform": math.exp(-(low + (1 - share) * (high - low))),
        "log_uniform_values": low * (high / max(low, 1e-9)) ** share if low else 0,
        "inv_log_uniform_values": low * (high / max(low, 1e-9)) ** share if low else 0,
        "normal": bell,
        "log_normal": math.exp(bell),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("uniform", {"min": -2.0, "max": 3.0}),
        ("log_uniform", {"min": -5.0, "max": 1.0}),
        ("inv_log_uniform", {"min": -1.0, "max": 4.0}),
        ("log_uniform_values", {"min": 1e-5, "max": 1e-2}),
        ("inv_log_uniform_values", {"min": 1e-5, "max": 1e-2}),
        ("normal", {"mu": 3.0, "sigma": 0.5}),
        ("log_normal", {}),
    ],
)
def test_values_have_the_distribution_that_is_named(
    tmp_path: Path, kind: str, given: dict[str, Any]
) -> None:
    one = space(tmp_path, method="random", parameters={"a": {"distribution": kind, **given}})
    values = sorted(trial["a"] for trial in one.trials(4000, 0))
    for share in (0.1, 0.5, 0.9):
        below = sum(value <= quantile(kind, given, share) for value in values) / len(values)
        assert below == pytest.approx(share, abs=0.03)
    if kind.endswith("_values"):
        assert given["min"] <= values[0]
        assert values[-1] <= given["max"]


def test_rounded_and_weighted_values(tmp_path: Path) -> None:
    parameters = {
        "q": {"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.1},
        "n": {"distribution": "q_normal", "mu": 100, "sigma": 10, "q": 8},
        "w": {"values": ["often", "seldom"], "probabilities": [0.9, 0.1]},
        "b": {"distribution": "beta", "a": 2, "b": 8},
        "i": {"min": 1, "max": 3},
    }
    found = space(tmp_path, method="random", parameters=parameters).trials(1000, 0)
    tenths = {0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0}
    assert {trial["q"] for trial in found} == tenths
    assert all(isinstance(t["n"], int) and t["n"] % 8 == 0 for t in found)
    assert sum(t["w"] == "often" for t in found) / 1000 == pytest.approx(0.9, abs=0.03)
    assert statistics.mean(t["b"] for t in found) == pytest.approx(0.2, abs=0.02)
    assert {t["i"] for t in found} == {1, 2, 3}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "bayes"}, "wandb agent"),
        ({"method": None}, "method is None; expected grid or random"),
        ({"parameters": {}}, "has no parameters"),
        ({"paramters": {}}, "has the key 'paramters'"),
        ({"parameters": {"a": 3}}, "parameters.a is 3"),
        ({"parameters": {"a": {"min": 1, "max": 2.0}}}, "two whole numbers or two with a point"),
        ({"parameters": {"a": {"min": 2, "max": 1}}}, "parameters.a has min 2 above max 1"),
        ({"parameters": {"a": {"min": "x", "max": 2.0}}}, "a.min is 'x'; expected a number"),
        ({"parameters": {"a": {"distribution": "gauss"}}}, "is 'gauss'; expected one of constant"),
        ({"parameters": {"a": {"distribution": "uniform", "min": 1}}}, "uniform and has no max"),
        ({"parameters": {"a": {"values": [1], "max": 2}}}, "categorical and has the key 'max'"),
        ({"parameters": {"a": {"values": []}}}, "expected a list"),
        ({"parameters": {"a": {"min": 0.0, "max": 1.0}}}, "of which a grid cannot take all"),
        ({"metric": {"name": "a", "goal": "max"}}, "metric.goal is 'max'"),
        ({"method": "random"}, "has no end; say how many by --trials or run_cap"),
        ({"parameters": {n: {"min": 1, "max": 99} for n in "abc"}}, "970299 combinations"),
        (
            {
                "method": "random", "run_cap": 1,
                "parameters": {"a": {"distribution": "log_uniform_values", "min": 0, "max": 1}},
            },
            "parameters.a has the bound 0; the logarithm",
        ),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_meant_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        space(tmp_path, **changes).trials(None, 0)


def test_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("{method: random, run_cap: 5, parameters: {a: {min: 1e-4, max: 1e-3}}}")
    assert all(1e-4 <= trial["a"] <= 1e-3 for trial in read_space(str(file)).trials(None, 0))


def test_the_example_is_a_sweep_file_with_keys_of_its_recipe() -> None:
    example = read_space(str(shipped("launch") / "sweep.yaml"))
    content = yaml.safe_load((shipped("launch") / "sweep.yaml").read_text())
    recipe = shipped("recipes") / content["command"][3].removeprefix("recipes/")
    for trial in example.trials(2, 0):
        given = [f"--{key}={value}" for key, value in trial.items()]
        assert from_recipe(str(recipe), given)
    assert example.metric == "val/loss"


def test_keys_of_agents_are_told(tmp_path: Path) -> None:
    one = space(tmp_path, command=["mmfusion", "fit", "${args}"], program="x.py")
    assert one.unused == ("command", "program")

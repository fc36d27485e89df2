"""What is tried: a sweep file as W&B's, read without W&B.

The parameters are keys of the recipe. A grid takes all combinations, the last parameter changing
fastest; at random, values are a function of the seed, the trial's number and the parameter's name,
so more trials go on where fewer ended.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmfusion.paths import expand
from mmfusion.tools.sweep.distributions import DISTRIBUTIONS

KEYS = ("method", "parameters", "metric", "run_cap", "name", "description")
FOR_AGENTS = ("command", "program", "project", "entity", "early_terminate")
"""Keys that only W&B's server and its agents act on."""
NUMBERS = ("min", "max", "mu", "sigma", "q", "a", "b")
"""Keys of a parameter whose values are."""
MOST = 10_000
"""Combinations of a grid."""


@dataclass(frozen=True)
class Space:
    """A sweep file.

    Attributes:
        method: ``grid`` or ``random``.
        parameters: by the recipe's key, each with its distribution and that one's keys.
        metric: a column of ``metrics.csv``.
        maximize: whether more of it is better.
        run_cap: most trials, where the file says so.
        unused: keys of the file that only W&B's agents act on.
    """

    method: str
    parameters: dict[str, dict[str, Any]]
    metric: str = "train/loss"
    maximize: bool = False
    run_cap: int | None = None
    unused: tuple[str, ...] = ()

    def trials(self, count: int | None, seed: int) -> list[dict[str, Any]]:
        """The values of each trial.

        Args:
            count: of trials; None is all of a grid, and the file's ``run_cap`` at random.
            seed: of random values.

        Raises:
            ValueError: where there is no end of them.
        """
        most = min((n for n in (count, self.run_cap) if n is not None), default=None)
        if self.method == "grid":
            combinations = math.prod(len(values) for values in self._grid().values())
            if min(combinations, most or combinations) > MOST:
                raise ValueError(f"the grid has {combinations} combinations; at most {MOST}.")
            products = itertools.product(*self._grid().values())
            return [
                dict(zip(self.parameters, values, strict=True))
                for values in itertools.islice(products, most)
            ]
        if most is None:
            raise ValueError("a random sweep has no end; say how many by --trials or run_cap.")
        return [self._drawn(number, seed) for number in range(most)]

    def _grid(self) -> dict[str, list[Any]]:
        return {name: _all_values(name, one) for name, one in self.parameters.items()}

    def _drawn(self, number: int, seed: int) -> dict[str, Any]:
        found = {}
        for name, one in self.parameters.items():
            generator = random.Random(f"{seed} {number} {name}")
            try:
                found[name] = DISTRIBUTIONS[one["distribution"]].draw(generator, one)
            except (ValueError, TypeError, ZeroDivisionError) as error:
                raise ValueError(f"parameters.{name} {error}.") from None
        return found


def read_space(path: str) -> Space:
    """Read a sweep file.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: naming the key that is wrong.
    """
    file = Path(expand(path))
    if not file.is_file():
        raise FileNotFoundError(f"there is no sweep file {path}; launch/sweep.yaml is an example.")
    try:
        content = yaml.safe_load(file.read_text())
        return _space(content if isinstance(content, dict) else {})
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from None


def _space(content: Mapping[str, Any]) -> Space:
    if odd := [key for key in content if key not in (*KEYS, *FOR_AGENTS)]:
        raise ValueError(f"has the key {odd[0]!r}; expected {', '.join((*KEYS, *FOR_AGENTS))}.")
    method = content.get("method")
    if method == "bayes":
        raise ValueError(
            "method is bayes, which W&B's server decides: give the file to `wandb sweep` and start "
            "`wandb agent`. Here it can be grid or random."
        )
    if method not in ("grid", "random"):
        raise ValueError(f"method is {method!r}; expected grid or random.")
    metric = content.get("metric") or {}
    goal = metric.get("goal", "minimize")
    if goal not in ("minimize", "maximize"):
        raise ValueError(f"metric.goal is {goal!r}; expected minimize or maximize.")
    parameters = dict(_parameters(content.get("parameters") or {}))
    if not parameters:
        raise ValueError("has no parameters; name keys of the recipe.")
    return Space(
        method,
        parameters,
        str(metric.get("name", "train/loss")),
        goal == "maximize",
        content.get("run_cap"),
        tuple(key for key in FOR_AGENTS if key in content),
    )


def _parameters(given: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each by its whole key; ``parameters`` may be nested."""
    for name, one in given.items():
        key = f"{prefix}{name}"
        if not isinstance(one, Mapping):
            raise ValueError(f"parameters.{key} is {one!r}; expected value, values or min and max.")
        if "parameters" in one:
            yield from _parameters(one["parameters"], f"{key}.")
        else:
            yield key, _with_distribution(key, dict(one))


def _with_distribution(key: str, one: dict[str, Any]) -> dict[str, Any]:
    one |= {name: _number(key, name, one[name]) for name in NUMBERS if name in one}
    name = one.get("distribution") or _implied(key, one)
    if name not in DISTRIBUTIONS:
        known = ", ".join(DISTRIBUTIONS)
        raise ValueError(f"parameters.{key}.distribution is {name!r}; expected one of {known}.")
    kind = DISTRIBUTIONS[name]
    takes = kind.takes or {}
    if lacking := [need for need in kind.needs if need not in one]:
        raise ValueError(f"parameters.{key} is {name} and has no {lacking[0]}.")
    if odd := [k for k in one if k not in (*kind.needs, *takes, "distribution")]:
        raise ValueError(f"parameters.{key} is {name} and has the key {odd[0]!r}.")
    if "min" in one and not one["min"] <= one["max"]:
        raise ValueError(f"parameters.{key} has min {one['min']} above max {one['max']}.")
    if "values" in one and not (isinstance(one["values"], list) and one["values"]):
        raise ValueError(f"parameters.{key}.values is {one['values']!r}; expected a list.")
    return {**takes, **one, "distribution": name}


def _number(key: str, name: str, value: Any) -> int | float:
    """YAML takes 1e-4, without a point, for a word."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"parameters.{key}.{name} is {value!r}; expected a number.")
    return value


def _implied(key: str, one: Mapping[str, Any]) -> str:
    """As W&B takes what names no distribution."""
    if "values" in one:
        return "categorical_w_probabilities" if "probabilities" in one else "categorical"
    if "value" in one:
        return "constant"
    bounds = {type(one.get(bound)) for bound in ("min", "max")}
    if bounds == {int}:
        return "int_uniform"
    if bounds == {float}:
        return "uniform"
    raise ValueError(
        f"parameters.{key} has {sorted(one)}; expected value, values, or min and max as two whole "
        "numbers or two with a point."
    )


def _all_values(key: str, one: Mapping[str, Any]) -> list[Any]:
    if one["distribution"] == "constant":
        return [one["value"]]
    if one["distribution"].startswith("categorical"):
        return list(one["values"])
    if one["distribution"] == "int_uniform":
        return [*range(one["min"], one["max"] + 1)]
    raise ValueError(
        f"parameters.{key} is {one['distribution']}, of which a grid cannot take all; give values, "
        "or take method random."
    )

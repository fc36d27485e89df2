"""Distributions of a parameter, by the names and meanings of W&B's sweep files.

Each takes the parameter's keys and a generator. ``q_`` rounds to multiples of ``q``; ``log_``
distributions draw the logarithm, whose bounds ``min`` and ``max`` are, but ``log_..._values`` take
the bounds of the value itself.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Draw = Callable[[random.Random, Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Distribution:
    """How a value is drawn.

    Attributes:
        draw: it.
        needs: keys it cannot do without.
        takes: other keys, with what they are where they are left out.
    """

    draw: Draw
    needs: tuple[str, ...] = ()
    takes: Mapping[str, float] | None = None


def _log(value: float) -> float:
    if value <= 0:
        raise ValueError(f"has the bound {value}; the logarithm is of positive numbers alone")
    return math.log(value)


def _in_values(draw: random.Random, given: Mapping[str, Any]) -> float:
    value = math.exp(draw.uniform(_log(given["min"]), _log(given["max"])))
    return min(max(value, float(given["min"])), float(given["max"]))  # exp may round past one


def _weighted(draw: random.Random, given: Mapping[str, Any]) -> Any:
    (value,) = draw.choices(given["values"], given["probabilities"])
    return value


def _rounded(draw: Draw) -> Draw:
    def rounded(generator: random.Random, given: Mapping[str, Any]) -> float | int:
        q = given["q"]
        value = round(draw(generator, given) / q) * q
        # Without the digits that come of the multiplication: 3 * 0.1 is not 0.3.
        return int(value) if isinstance(q, int) else float(f"{value:.12g}")

    return rounded


_RANGE = ("min", "max")
_NORMAL = {"mu": 0.0, "sigma": 1.0}
_PLAIN = {
    "uniform": Distribution(lambda r, p: r.uniform(p["min"], p["max"]), _RANGE),
    "log_uniform": Distribution(lambda r, p: math.exp(r.uniform(p["min"], p["max"])), _RANGE),
    "log_uniform_values": Distribution(_in_values, _RANGE),
    "normal": Distribution(lambda r, p: r.gauss(p["mu"], p["sigma"]), (), _NORMAL),
    "log_normal": Distribution(lambda r, p: math.exp(r.gauss(p["mu"], p["sigma"])), (), _NORMAL),
    "beta": Distribution(lambda r, p: r.betavariate(p["a"], p["b"]), ("a", "b")),
}
DISTRIBUTIONS = {
    "constant": Distribution(lambda r, p: p["value"], ("value",)),
    "categorical": Distribution(lambda r, p: r.choice(p["values"]), ("values",)),
    "categorical_w_probabilities": Distribution(_weighted, ("values", "probabilities")),
    "int_uniform": Distribution(lambda r, p: r.randint(p["min"], p["max"]), _RANGE),
    "inv_log_uniform": Distribution(lambda r, p: math.exp(-r.uniform(p["min"], p["max"])), _RANGE),
    "inv_log_uniform_values": Distribution(_in_values, _RANGE),
    **_PLAIN,
    **{
        f"q_{name}": Distribution(_rounded(one.draw), one.needs, {**(one.takes or {}), "q": 1})
        for name, one in _PLAIN.items()
    },
}

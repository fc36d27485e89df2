"""Noise of a sampling: an item's own seed, on the CPU."""

from __future__ import annotations

import re
from typing import Any, cast

import numpy as np
import pytest
import torch

from mmfusion.models.generators.base import Sampling


def drawn(sampling: Sampling, count: int) -> list[float]:
    return [float(torch.rand((), generator=g)) for g in sampling.noise(count)]


def test_an_item_draws_from_the_seed_and_its_place_or_from_its_own() -> None:
    by_place, own = drawn(Sampling(seed=4), 3), drawn(Sampling(seed=(5, 9)), 2)
    assert len(set(by_place)) == 3
    assert own[0] == by_place[1]
    assert own[1] == drawn(Sampling(seed=9), 1)[0]


def test_seeds_that_do_not_fit_the_items_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sampling\.seed names 2 seeds; expected 3"):
        Sampling(seed=(1, 2)).noise(3)


def test_samplings_that_draw_nothing_are_refused() -> None:
    assert Sampling(steps=1, guidance_scale=0).guidance_scale == 0
    with pytest.raises(ValueError, match=r"sampling\.steps is 0; expected 1 or more"):
        Sampling(steps=0)
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"guidance_scale is {scale}; expected a finite"):
            Sampling(guidance_scale=scale)


@pytest.mark.parametrize(
    "seed", [2**63, 2**70, -(2**63) - 1, 1.5, "7", None, True, [3], (1, 2**64)]
)
def test_seeds_that_no_generator_takes_are_refused(seed: Any) -> None:
    odd = seed[-1] if isinstance(seed, tuple) else seed
    with pytest.raises(ValueError, match=re.escape(f"sampling.seed is {odd!r}; expected a whole")):
        Sampling(seed=seed)


def test_seeds_of_numpy_draw_as_others() -> None:
    given = (np.int64(5), np.uint8(9))
    assert drawn(Sampling(seed=cast(Any, given)), 2) == drawn(Sampling(seed=(5, 9)), 2)
    assert drawn(Sampling(seed=cast(Any, given[0])), 2) == drawn(Sampling(seed=5), 2)


def test_the_largest_seeds_draw_several_items() -> None:
    for seed in (2**63 - 1, -(2**63)):
        assert len(set(drawn(Sampling(seed=seed), 3))) == 3


def test_what_is_no_number_is_refused() -> None:
    for steps in (2.5, "3", None, True):
        with pytest.raises(ValueError, match=rf"sampling\.steps is {steps!r}; expected 1 or more"):
            Sampling(steps=cast(int, steps))
    with pytest.raises(ValueError, match=r"sampling\.guidance_scale is '7'; expected a finite"):
        Sampling(guidance_scale=cast(float, "7"))
    assert Sampling(guidance_scale=cast(float, np.float32(3))).guidance_scale == 3

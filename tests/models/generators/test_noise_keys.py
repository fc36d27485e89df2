"""Noise is a function of all bits of a key."""

from __future__ import annotations

import torch

from mmfusion.models.generators.noise import generators_of


def draws(keys: list[int], seed: int = 0) -> list[float]:
    return [float(torch.rand((), generator=g)) for g in generators_of(keys, seed)]


def test_keys_that_differ_in_any_bit_draw_other_noise() -> None:
    keys = [7, *(7 ^ 1 << bit for bit in range(63)), -7]
    assert len(set(draws(keys))) == len(keys)
    assert draws([7], 1) != draws([7], 0)


def test_a_key_draws_the_same_beside_any_other() -> None:
    assert draws([3, 1 << 40])[1:] == draws([1 << 40])

"""Noise is a function of all bits of a key, and its levels are those of a schedule."""

from __future__ import annotations

from math import nan
from typing import Any

import pytest
import torch

from mmfusion.models.generators.noise import generators_of, noise_schedule

FLOW, COSINE = "FlowMatchEulerDiscreteScheduler", "CosineDPMSolverMultistepScheduler"


def draws(keys: list[int], seed: int = 0) -> list[float]:
    return [float(torch.rand((), generator=g)) for g in generators_of(keys, seed)]


def test_keys_that_differ_in_any_bit_draw_other_noise() -> None:
    keys = [7, *(7 ^ 1 << bit for bit in range(63)), -7]
    assert len(set(draws(keys))) == len(keys)
    assert draws([7], 1) != draws([7], 0)


def test_a_key_draws_the_same_beside_any_other() -> None:
    assert draws([3, 1 << 40])[1:] == draws([1 << 40])


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIMScheduler", {"beta_schedule": "exp"}),
        ("DDIMScheduler", {"beta_start": -1}),
        ("DDIMScheduler", {"trained_betas": [0.1, 0.2, 0.3]}),
        ("DDIMScheduler", {"num_train_timesteps": 10.5}),
        ("DDIMScheduler", {"num_train_timesteps": True}),
        ("DDIMScheduler", {"num_train_timesteps": 0}),
        (FLOW, {"shift": 0}),
        (FLOW, {"shift": -1}),
        (FLOW, {"num_train_timesteps": "a"}),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": None}),
        (COSINE, {"sigma_max": nan}),
        (COSINE, {"sigma_min": "x"}),
    ],
)
def test_schedules_that_are_none_are_refused(name: str, config: dict[str, Any]) -> None:
    """Most of them diffusers takes without a word."""
    noise_schedule({"_class_name": name, "use_flow_sigmas": "use_flow_sigmas" in config})
    with pytest.raises(ValueError, match=f"the {name} of this configuration cannot be built"):
        noise_schedule({"_class_name": name, **config})

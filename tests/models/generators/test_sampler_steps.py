"""Which steps a sampler takes, against trying them all."""

from __future__ import annotations

import inspect
import re
from typing import Any

import diffusers
import pytest
import torch

from mmfusion.models.generators.sampler_steps import check_steps

LEVELS = 12
SAMPLERS = {
    "DDIMScheduler": {"timestep_spacing": "leading", "steps_offset": 1},
    "DDPMScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True, "steps_offset": 1},
    "EulerDiscreteScheduler": {"timestep_spacing": "leading"},
    "DPMSolverMultistepScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {},
}
"""As published pipelines have them."""


def made(name: str) -> Any:
    return getattr(diffusers, name)(num_train_timesteps=LEVELS, **SAMPLERS[name])


def draws(sampler: Any, steps: int) -> bool:
    """Whether a sampler comes to its end."""
    noise = torch.Generator().manual_seed(0)
    draws = "generator" in inspect.signature(sampler.step).parameters
    latents = torch.randn(1, 4, 2, 2, generator=noise)
    try:
        sampler.set_timesteps(steps)
        for time in sampler.timesteps:
            noisy = sampler.scale_model_input(latents, time) if _scales(sampler) else latents
            options = {"generator": noise} if draws else {}
            latents = sampler.step(0.1 * noisy, time, latents, **options).prev_sample
    except (ValueError, IndexError):
        return False
    return bool(latents.isfinite().all())


def _scales(sampler: Any) -> bool:
    return hasattr(sampler, "scale_model_input")


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_refused_is_what_does_not_come_to_its_end(name: str) -> None:
    taken = [steps for steps in range(1, LEVELS + 1) if draws(made(name), steps)]
    for steps in range(1, LEVELS + 1):
        if steps in taken:
            check_steps(made(name), steps, "it")
            continue
        message = f"steps is {steps}, but the {name} of it takes {max(taken)} at most."
        with pytest.raises(ValueError, match=re.escape(message)):
            check_steps(made(name), steps, "it")
    assert LEVELS - 1 in taken


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_more_steps_than_levels_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"takes {LEVELS - 1} at most|takes {LEVELS} at most"):
        check_steps(made(name), 5 * LEVELS, "it")


def test_a_level_that_rounding_puts_below_the_first_is_refused() -> None:
    """Python takes it for the last: DDIM would end in the noise that it came from."""
    sampler = diffusers.DDIMScheduler(100, timestep_spacing="trailing")
    odd = []
    for steps in range(1, 101):
        sampler.set_timesteps(steps)
        if sampler.timesteps.min() < 0:
            odd.append(steps)
            with pytest.raises(ValueError, match=f"takes {steps - 1} or {steps + 1}, not what"):
                check_steps(sampler, steps, "it")
        else:
            check_steps(sampler, steps, "it")
    assert odd == [29, 31, 58, 62, 97]

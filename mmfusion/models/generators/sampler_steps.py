"""How many steps a sampler of diffusers can take: some look their levels of noise up in a table, by
places that are beyond its ends where there are as many steps as levels, or where rounding adds one.
"""

from __future__ import annotations

from typing import Any

import torch


def check_steps(sampler: Any, steps: int, whose: str) -> None:
    """Refuse a number of steps.

    Args:
        sampler: a scheduler of diffusers; its timesteps are set.
        steps: of sampling.
        whose: the pipeline, for the error.

    Raises:
        ValueError: with the numbers next to it that it can take.
    """
    if _takes(sampler, steps):
        return
    levels = int(sampler.config.num_train_timesteps)
    fewer = range(min(steps - 1, levels), 0, -1)
    below = next((count for count in fewer if _takes(sampler, count)), 0)
    above = next((count for count in range(steps + 1, levels + 1) if _takes(sampler, count)), 0)
    raise ValueError(
        f"sampling.steps is {steps}, but the {type(sampler).__name__} of {whose} takes "
        + (f"{below} or {above}, not what is between." if above else f"{below} at most.")
    )


def _takes(sampler: Any, steps: int) -> bool:
    table = getattr(sampler, "alphas_cumprod", None)
    if table is None:  # its levels are numbers, not places in a table
        return True
    try:
        sampler.set_timesteps(steps)
    except ValueError:
        return False
    if hasattr(sampler, "sigmas"):  # it interpolates in the table; the last is where it arrives
        levels = torch.as_tensor(sampler.sigmas)[:-1]
    else:
        levels = torch.as_tensor(sampler.timesteps)
        if levels.max() >= len(table) or levels.min() < 0:
            return False
    return len(levels.unique()) >= steps  # steps that go nowhere: some samplers divide by them

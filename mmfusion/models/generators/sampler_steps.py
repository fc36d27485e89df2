"""How many steps a sampler of diffusers can take: some look their levels of noise up in a table, by
places that are beyond its end where there are as many steps as levels.
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
        ValueError: with the most it can take.
    """
    if _takes(sampler, steps):
        return
    longest = min(steps - 1, int(sampler.config.num_train_timesteps))
    most = next((count for count in range(longest, 0, -1) if _takes(sampler, count)), 0)
    raise ValueError(
        f"sampling.steps is {steps}, but the {type(sampler).__name__} of {whose} takes {most} at "
        "most."
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
        if levels.max() >= len(table):
            return False
    return len(levels.unique()) >= steps  # steps that go nowhere: some samplers divide by them

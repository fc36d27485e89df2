"""From noise to latents by a pipeline's own sampler, for pipelines of sound: diffusers keeps
AudioLDM's as it is, and wants AudioLDM 2's text encoders although their encodings are given.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from mmfusion.models.generators.base import Sampling
from mmfusion.models.generators.diffusers_pipeline import DiffusersPipeline
from mmfusion.types import Conditioning


def draw_latents(
    generator: DiffusersPipeline,
    shape: Sequence[int],
    ours: Conditioning,
    none: Conditioning,
    sampling: Sampling,
) -> Tensor:
    """(M, *shape) scaled latents: one pass of the denoiser a step, both conditionings in it.

    Args:
        generator: with its denoiser built.
        shape: of one item's latents.
        ours: of M items.
        none: of as many, what guidance leads away from; of the same shapes.
        sampling: steps, scale and seed.
    """
    sampler = generator.sampler()
    sampler.set_timesteps(sampling.steps, device=generator.device)
    noise = sampling.noise(len(ours.tokens))
    first = torch.stack([torch.randn(*shape, generator=g) for g in noise])
    latents = first.to(ours.tokens) * sampler.init_noise_sigma
    guided = sampling.guidance_scale > 1
    given = _both(none, ours) if guided else ours
    draws = "generator" in inspect.signature(sampler.step).parameters
    options = {"generator": noise} if draws else {}
    for time in sampler.timesteps:
        noisy = sampler.scale_model_input(torch.cat([latents] * 2) if guided else latents, time)
        found = generator.denoise(noisy, time.expand(len(noisy)), given)
        if guided:
            away, towards = found.chunk(2)
            found = away + sampling.guidance_scale * (towards - away)
        latents = sampler.step(found, time, latents, **options).prev_sample
    return latents


def _both(none: Conditioning, ours: Conditioning) -> Conditioning:
    """The items of one after those of the other; without a mask all tokens are valid."""
    masks = [
        torch.ones(each.tokens.shape[:2], dtype=torch.bool, device=each.tokens.device)
        if each.mask is None
        else each.mask
        for each in (none, ours)
    ]
    masked = none.mask is not None or ours.mask is not None
    return Conditioning(
        torch.cat([none.tokens, ours.tokens]), mask=torch.cat(masks) if masked else None
    )

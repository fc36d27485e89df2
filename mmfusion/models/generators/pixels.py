"""Pixels as the VAEs of pictures and clips take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def checked_sides(factor: int, **sides: int) -> None:
    """Sides in pixels, by their names.

    Raises:
        ValueError: where one is no multiple of what VAE and denoiser divide it by.
    """
    for name, side in sides.items():
        if side < 1 or side % factor:
            raise ValueError(f"{name} is {side}; expected a multiple of {factor}.")


def picture_moments(vae: Any, pixels_N3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (N, C, H/f, W/f) of an AutoencoderKL's latents of 8 bit
    pictures.
    """
    posterior = vae.encode(as_signed(pixels_N3HW, vae.dtype)).latent_dist
    return posterior.mean, posterior.std


def as_signed(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """8 bit pictures from -1 to 1."""
    return pixels.to(dtype) / 127.5 - 1

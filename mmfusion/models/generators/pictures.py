"""Pictures as generators of images take and give them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmfusion.processing.base import MediaProcessor
from mmfusion.processing.images import center_crop, decode_image, resize
from mmfusion.types import Media, MediaTensors


class SquareProcessor(MediaProcessor):
    """Pictures scaled by their shorter side and cut to a square; 8 bit."""

    modality = "image"

    def __init__(self, size: int) -> None:
        self.size = size

    def num_features(self, media: Media) -> int:
        return 1

    def __call__(self, media: Media, rng: np.random.Generator | None = None) -> MediaTensors:
        picture = resize(decode_image(media.data, media.format), self.size, "bicubic")
        return {"pixels": center_crop(picture, (self.size, self.size))}

    def idle(self) -> MediaTensors:
        return {"pixels": torch.full((3, self.size, self.size), 255, dtype=torch.uint8)}


def checked_size(size: int, factor: int) -> int:
    """A side of pictures, in pixels.

    Raises:
        ValueError: where it is no multiple of what VAE and denoiser divide it by.
    """
    if size % factor:
        raise ValueError(f"size is {size}; expected a multiple of {factor}.")
    return size


def picture_moments(vae: Any, pixels_N3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (N, C, H/f, W/f) of an AutoencoderKL's latents of 8 bit
    pictures.
    """
    posterior = vae.encode(as_signed(pixels_N3HW, vae.dtype)).latent_dist
    return posterior.mean, posterior.std


def as_signed(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """8 bit pictures as VAEs take them, from -1 to 1."""
    return pixels.to(dtype) / 127.5 - 1


def as_png(picture: Image.Image) -> Media:
    """A picture as media."""
    data = io.BytesIO()
    picture.save(data, "png")
    return Media("image", data.getvalue(), "png")

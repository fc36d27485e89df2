"""Pictures as generators of images take and give them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmfusion.models.generators.pixels import checked_sides
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


def picture_size(size: int, denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """A side of pictures, in pixels.

    Args:
        size: that is wanted (0: the denoiser's own).
        denoiser: its configuration.
        vae: its configuration.

    Raises:
        ValueError: where it is no multiple of what the two divide it by.
    """
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    size = size or int(denoiser["sample_size"]) * factor
    checked_sides(factor * int(denoiser.get("patch_size") or 1), size=size)
    return size


def checked_rescale(guidance_rescale: float) -> float:
    """Of guidance, as a generator is given it."""
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale is {guidance_rescale}; expected 0 to 1.")
    return guidance_rescale


def drawn_pictures(pipeline: Any, size: int, **options: Any) -> list[Media]:
    """By a pipeline of diffusers, with its options for these items."""
    return [as_png(made) for made in pipeline(height=size, width=size, **options).images]


def as_png(picture: Image.Image) -> Media:
    """A picture as media."""
    data = io.BytesIO()
    picture.save(data, "png")
    return Media("image", data.getvalue(), "png")

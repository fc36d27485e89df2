"""Pictures: from file bytes to (3, H, W) uint8, and the few operations encoders' processors need.

JPEG is decoded by simplejpeg (with torch's resize three times as fast as PIL), the rest by PIL,
which also stands in where simplejpeg is not installed. Neither applies the EXIF orientation, so it
is done here, the same for both. Data come from strangers: only listed formats are opened, and sizes
are checked on the header, before anything is decoded.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from mmfusion.types import DataError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

MAX_PIXELS = 50_000_000
"""Pixels H*W above which an image is refused."""

FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")
"""What PIL may open. Never EPS and the like, which start other programs."""

_ORIENTATION = 0x0112
_CORRUPT = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, AssertionError, RuntimeError, struct.error, zlib.error),
    Image.DecompressionBombError,
)
"""What PIL's parsers raise on broken files."""


def decode_image(data: bytes, format: str = "", max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode a picture; of an animation, the first frame.

    The EXIF orientation is applied, transparency is laid on white, and every colour mode becomes
    RGB (16 bit by dropping the low byte).

    Args:
        data: the file.
        format: its extension, for messages; the format itself is read from the data.
        max_pixels: limit on H*W.

    Returns:
        (3, H, W) uint8, in channels-last memory.

    Raises:
        DataError: ``corrupt_image``, ``too_many_pixels``.
    """
    image = _open(data, format, max_pixels)
    orientation = _orientation(image)
    if simplejpeg is not None and image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        try:
            if simplejpeg.decode_jpeg_header(data)[:2] != (image.height, image.width):
                raise ValueError("its headers disagree about its size")
            pixels_HWC = simplejpeg.decode_jpeg(data, "RGB")
        except ValueError as error:
            raise _corrupt(format, error) from error
    else:
        try:
            pixels_HWC = np.array(_to_rgb(image))
        except _CORRUPT as error:
            raise _corrupt(format, error) from error
    return torch.from_numpy(_upright(pixels_HWC, orientation)).permute(2, 0, 1)


def jpeg_decoder() -> str:
    """What decodes JPEG here; the two round differently."""
    return "PIL" if simplejpeg is None else "simplejpeg"


def image_size(data: bytes, format: str = "", max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(H, W) of the picture as ``decode_image`` gives it, from the header alone.

    Raises:
        DataError: ``corrupt_image``, ``too_many_pixels``.
    """
    image = _open(data, format, max_pixels)
    width, height = image.size
    return (width, height) if _orientation(image) >= 5 else (height, width)


def resize(
    image: Tensor,
    size: int | tuple[int, int],
    mode: Literal["bicubic", "bilinear"] = "bicubic",
    antialias: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Resize (..., 3, H, W) uint8; with ``antialias`` within rounding of PIL's resize.

    Args:
        image: picture or frames.
        size: (height, width), or the length of the shortest edge (the other one rounds down, as in
            Hugging Face's processors).
        mode: interpolation.
        antialias: filter when shrinking.
        max_pixels: limit on the result, which a picture a pixel high would break.

    Raises:
        DataError: ``too_many_pixels``.
    """
    height, width = image.shape[-2:]
    if isinstance(size, int):
        short = min(height, width)
        size = (int(size * height / short), int(size * width / short))
    _check_pixels(*size, max_pixels)
    if size == (height, width):
        return image
    flat_N3HW = image.reshape(-1, *image.shape[-3:])
    resized = F.interpolate(flat_N3HW, size=size, mode=mode, antialias=antialias)
    return resized.reshape(*image.shape[:-2], *size)


def center_crop(image: Tensor, size: int | tuple[int, int]) -> Tensor:
    """The middle (..., 3, h, w) of a picture that is at least as large."""
    height, width = (size, size) if isinstance(size, int) else size
    if image.shape[-2] < height or image.shape[-1] < width:
        raise ValueError(
            f"cannot crop {height}x{width} from a picture of {image.shape[-2]}x{image.shape[-1]}; "
            "resize it first."
        )
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[..., top : top + height, left : left + width]


def pad_to_square(image: Tensor, fill: Sequence[int] = (255, 255, 255)) -> Tensor:
    """Centre (..., 3, H, W) on a square of the longer edge, filled with one RGB colour."""
    height, width = image.shape[-2:]
    side = max(height, width)
    square = torch.tensor(fill, dtype=image.dtype)[:, None, None]
    square = square.expand(*image.shape[:-2], side, side).clone()
    top, left = (side - height) // 2, (side - width) // 2
    square[..., top : top + height, left : left + width] = image
    return square


def _open(data: bytes, format: str, max_pixels: int) -> Image.Image:
    """Read the header only."""
    Image.init()
    try:
        image = Image.open(io.BytesIO(data), formats=[f for f in FORMATS if f in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise DataError("too_many_pixels", f"{error}; at most {max_pixels} are decoded.") from error
    except UnidentifiedImageError as error:
        raise _corrupt(format, "it is no picture") from error
    except _CORRUPT as error:
        raise _corrupt(format, error) from error
    _check_pixels(image.height, image.width, max_pixels)
    return image


def _check_pixels(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise DataError(
            "too_many_pixels",
            f"the image has {height} x {width} = {height * width} pixels; at most {max_pixels} are "
            "decoded. Shrink it, or raise the limit.",
        )


def _corrupt(format: str, error: BaseException | str) -> DataError:
    name = f"{format} image" if format else "image"
    return DataError("corrupt_image", f"the {name} does not decode ({error}); expected {FORMATS}.")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1-8; 1 where there is none, or where PIL applies it on its own (TIFF)."""
    if image.format == "TIFF":
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _CORRUPT:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} (32 bit) have no known range")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")


def _upright(pixels_HWC: np.ndarray[Any, Any], orientation: int) -> np.ndarray[Any, Any]:
    """Undo an EXIF orientation: 5-8 are transposed, and rows or columns run backwards."""
    if orientation >= 5:
        pixels_HWC = pixels_HWC.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels_HWC = pixels_HWC[::-1]
    if orientation in (2, 3, 6, 7):
        pixels_HWC = pixels_HWC[:, ::-1]
    return np.ascontiguousarray(pixels_HWC)

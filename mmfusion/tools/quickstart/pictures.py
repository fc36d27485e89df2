"""Pictures on white, and short clips in which a picture moves: the derived part of the data."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TypeAlias

import av
import numpy as np
from PIL import Image

Frame: TypeAlias = Image.Image

MOTIONS = {
    "right": "moves right",
    "left": "moves left",
    "up": "moves up",
    "down": "moves down",
    "grow": "grows",
    "shrink": "shrinks",
    "turn": "spins",
    "still": "stays still",
}
"""What a picture does in a clip, and how its caption says so."""

_FROM_TO = {
    "right": ((0.25, 0.5), (0.75, 0.5)),
    "left": ((0.75, 0.5), (0.25, 0.5)),
    "up": ((0.5, 0.75), (0.5, 0.25)),
    "down": ((0.5, 0.25), (0.5, 0.75)),
}


def flatten(image: Frame, size: int, fill: float = 1.0) -> Frame:
    """The picture without its transparent border, its longer side ``fill * size``, in the middle of
    a white square of ``size`` pixels.
    """
    return paste(_fitted(image, fill * size), size)


def paste(image: Frame, size: int, center: tuple[float, float] = (0.5, 0.5)) -> Frame:
    """An RGBA picture on a white square, its middle at ``center`` (fractions of the side)."""
    canvas = Image.new("RGBA", (size, size), "white")
    layer = Image.new("RGBA", (size, size))
    layer.paste(
        image,
        (round(center[0] * size - image.width / 2), round(center[1] * size - image.height / 2)),
    )
    return Image.alpha_composite(canvas, layer).convert("RGB")


def _fitted(image: Frame, side: float) -> Frame:
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox() or (0, 0, *image.size))
    scale = side / max(image.size)
    return image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.BICUBIC
    )


def motion_frames(image: Frame, motion: str, count: int, size: int) -> list[Frame]:
    """``count`` frames of ``size`` pixels in which the picture makes one of ``MOTIONS``."""
    base = _fitted(image, 0.5 * size)
    frames = []
    for progress in np.linspace(0, 1, count).tolist():
        center, moved = (0.5, 0.5), base
        if motion in _FROM_TO:
            (x0, y0), (x1, y1) = _FROM_TO[motion]
            center = (x0 + (x1 - x0) * progress, y0 + (y1 - y0) * progress)
        elif motion in ("grow", "shrink"):
            share = progress if motion == "grow" else 1 - progress
            moved = _fitted(base, (0.25 + 0.65 * share) * size)
        elif motion == "turn":
            moved = base.rotate(-300 * progress, expand=True, resample=Image.BICUBIC)
        elif motion != "still":
            raise ValueError(f"motion {motion!r}: expected one of {sorted(MOTIONS)}")
        frames.append(paste(moved, size, center))
    return frames


def encode_jpeg(image: Frame, quality: int = 88) -> bytes:
    """The picture as a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def encode_mp4(frames: Sequence[Frame], rate: int) -> bytes:
    """H.264 in MP4; the same bytes for the same frames (one thread, no date)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        options = {"crf": "26", "preset": "veryfast", "threads": "1"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return buffer.getvalue()

"""Clips as generators of video take and give them.

M clips, T frames of a clip.
"""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from mmfusion.processing.base import MediaProcessor
from mmfusion.processing.images import center_crop, resize
from mmfusion.processing.videos import decode_video
from mmfusion.types import Media, MediaTensors


class ClipProcessor(MediaProcessor):
    """The first frames of a video at a rate, scaled until they cover a size and cut to it; 8 bit.
    Where the video ends before, its last frame stays.

    Args:
        height: pixels.
        width: pixels.
        num_frames: of a clip.
        fps: frames a second.

    Raises:
        ValueError: for a clip without frames or time.
    """

    modality = "video"

    def __init__(self, height: int, width: int, num_frames: int, fps: float) -> None:
        if num_frames < 1 or not fps > 0:
            raise ValueError(f"num_frames is {num_frames}, fps {fps}; expected more than 0.")
        self.height, self.width = height, width
        self.num_frames, self.fps = num_frames, fps

    def num_features(self, media: Media) -> int:
        return 1

    def __call__(self, media: Media, rng: np.random.Generator | None = None) -> MediaTensors:
        start = media.start or 0.0
        end = start + self.num_frames / self.fps
        if media.end is not None:
            end = min(end, media.end)
        frames = decode_video(
            media.data, media.format, fps=self.fps, max_frames=self.num_frames, start=start, end=end
        )
        cut = covering(frames, self.height, self.width)
        still = cut[-1:].expand(self.num_frames - len(cut), -1, -1, -1)
        return {"pixels": torch.cat([cut, still])}

    def idle(self) -> MediaTensors:
        shape = (self.num_frames, 3, self.height, self.width)
        return {"pixels": torch.full(shape, 255, dtype=torch.uint8)}


def covering(frames_T3HW: Tensor, height: int, width: int) -> Tensor:
    """The middle (T, 3, ``height``, ``width``) of frames scaled until they cover that size. They
    are cut first, to whole pixels: narrow frames that cover a wide size are huge.
    """
    sides = frames_T3HW.shape[-2:]
    scale = max(height / sides[0], width / sides[1])
    box = [
        min(side, max(1, round(wanted / scale)))
        for side, wanted in zip(sides, (height, width), strict=True)
    ]
    return resize(center_crop(frames_T3HW, (box[0], box[1])), (height, width), "bicubic")


def drawn_clips(pipeline: Any, clip: ClipProcessor, **options: Any) -> list[Media]:
    """As large, long and fast as the processor's, by a pipeline of diffusers with its options for
    these items.
    """
    sizes = {"height": clip.height, "width": clip.width, "num_frames": clip.num_frames}
    found = pipeline(output_type="pt", **sizes, **options).frames
    return [as_mp4(frames, clip.fps) for frames in found]


def as_mp4(frames_TCHW: Tensor, fps: float) -> Media:
    """Frames of values from 0 to 1 as media: H.264, 4:2:0, of high quality."""
    pixels = (frames_TCHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1000)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "17"})
        stream.height, stream.width, stream.pix_fmt = pixels.shape[1], pixels.shape[2], "yuv420p"
        for picture in pixels.cpu().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return Media("video", data.getvalue(), "mp4")

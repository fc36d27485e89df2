"""EfficientNet-Lite (arXiv:1905.11946, without squeeze-and-excitation) for images, and frame by
frame for video.

The modules are those of the ``efficientnet_lite_pytorch`` package; its weights file is read as
safetensors. Legend: N items, T frames, S features of a picture, D = 1280.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from mmfusion.models.encoders.base import Encoder
from mmfusion.models.loading import reading
from mmfusion.paths import expand
from mmfusion.processing.base import MediaProcessor
from mmfusion.processing.images import decode_image, pad_to_square, resize
from mmfusion.processing.videos import count_frames, decode_video
from mmfusion.types import Media, MediaTensors

Variant = Literal[
    "efficientnet-lite0",
    "efficientnet-lite1",
    "efficientnet-lite2",
    "efficientnet-lite3",
    "efficientnet-lite4",
]
IMAGE_SIZE = dict(zip(get_args(Variant), (224, 240, 260, 280, 300), strict=True))
WIDTH = 1280
STRIDE = 32


class EfficientNetLite(Encoder):
    """Image features: the cells of the last feature map, row by row.

    Args:
        path: folder with ``model.safetensors``, the state dict of efficientnet_lite_pytorch.
        grid: average the map to grid x grid cells (0: keep its 7 x 7).
        global_token: add the mean of the whole map as a last feature.
        variant: which of the five sizes.
        image_size: side of the square that a picture is scaled to (0: the variant's own).
    """

    def __init__(
        self,
        path: str,
        grid: int = 0,
        global_token: bool = False,
        variant: Variant = "efficientnet-lite0",
        image_size: int = 0,
    ) -> None:
        super().__init__()
        if variant not in IMAGE_SIZE:
            raise ValueError(f"variant {variant!r} is unknown; one of {list(IMAGE_SIZE)}.")
        self.path = path
        self.variant = variant
        if image_size and image_size < STRIDE:
            raise ValueError(f"image_size is {image_size}; it must be {STRIDE} or more, or 0.")
        self.image_size = image_size or IMAGE_SIZE[variant]
        self.cells = -(-self.image_size // STRIDE)
        if not 0 <= grid <= self.cells:
            raise ValueError(f"grid is {grid}; it must be 0 to {self.cells} for {variant}.")
        self.grid = grid or self.cells
        self.global_token = global_token
        self.net: Any = None

    @property
    def out_dim(self) -> int:
        return WIDTH

    @property
    def features_per_picture(self) -> int:
        """S: cells and the global token."""
        return self.grid**2 + self.global_token

    def build(self, pretrained: bool = True) -> None:
        if self.net is not None:
            return
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name(self.variant)
        del self.net._fc  # the classifier is not used
        self.net.to(memory_format=torch.channels_last)  # twice as fast on CPU
        if pretrained:
            self._load()
        self.train(self.training)

    def _load(self) -> None:
        file = Path(expand(self.path)) / "model.safetensors"
        if not file.exists():
            raise FileNotFoundError(
                f"{file} is not there; `mmfusion quickstart` fetches it, or point path to a folder "
                "with the weights of efficientnet_lite_pytorch as model.safetensors."
            )
        with reading(file.parent):
            weights = load_file(file)
        missing, unexpected = self.net.load_state_dict(weights, strict=False)
        unexpected = [name for name in unexpected if not name.startswith("_fc.")]
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]
        if missing or unexpected:
            raise ValueError(
                f"{file} is not a checkpoint of {self.variant}: {len(missing)} weights are missing "
                f"({missing[:5]}), {len(unexpected)} are unknown ({unexpected[:5]})."
            )

    def media_processor(self) -> MediaProcessor:
        return ImageProcessor(self.image_size, self.features_per_picture)

    def forward(self, tensors: MediaTensors) -> Tensor:
        return self.encode_pictures(tensors["pixels"])

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 to (N, S, D)."""
        dtype = self.net._conv_stem.weight.dtype
        scaled = ((pixels.to(dtype) - 127) / 128).contiguous(memory_format=torch.channels_last)
        feature_map = self.net.extract_features(scaled)
        cells = F.adaptive_avg_pool2d(feature_map, self.grid).flatten(2).transpose(1, 2)
        if self.global_token:
            cells = torch.cat([cells, feature_map.mean((2, 3))[:, None]], 1)
        return cells


class EfficientNetLiteVideo(EfficientNetLite):
    """Video features: those of each frame, frame after frame; in a frame row by row.

    Args:
        path: folder with ``model.safetensors``, the state dict of efficientnet_lite_pytorch.
        frames: frames taken, evenly over the clip; with ``fps``, the most that are taken.
        grid: average a frame's map to grid x grid cells (0: keep its 7 x 7).
        global_token: add the mean of a frame's map as its last feature.
        time_steps: average the frames to this many steps (0: keep every frame).
        variant: which of the five sizes.
        image_size: side of the square that a frame is scaled to (0: the variant's own).
        fps: take the frame shown at each 1/fps seconds, so that longer clips get more features;
            evenly spread ones where there would be more than ``frames``.
    """

    def __init__(
        self,
        path: str,
        frames: int = 8,
        grid: int = 2,
        global_token: bool = False,
        time_steps: int = 0,
        variant: Variant = "efficientnet-lite0",
        image_size: int = 0,
        fps: float | None = None,
    ) -> None:
        super().__init__(path, grid, global_token, variant, image_size)
        if fps is not None and (not 0 < fps < math.inf or time_steps):
            raise ValueError(
                f"fps is {fps} and time_steps {time_steps}; expected fps above 0, without "
                "time_steps, because clips then differ in length."
            )
        if frames < 1 or not 0 <= time_steps <= frames:
            raise ValueError(
                f"frames is {frames} and time_steps {time_steps}; expected frames of 1 or more "
                "and time_steps of 0 to frames."
            )
        self.frames = frames
        self.fps = fps
        self.time_steps = time_steps or frames

    def media_processor(self) -> MediaProcessor:
        if self.fps is not None:
            return FpsVideoProcessor(
                self.image_size, self.features_per_picture, self.frames, self.fps
            )
        num_features = self.time_steps * self.features_per_picture
        return VideoProcessor(self.image_size, num_features, self.frames)

    def forward(self, tensors: MediaTensors) -> Tensor:
        pixels = tensors["pixels"]
        if self.fps is not None:
            counts = tensors["num_features"] // self.features_per_picture
            return self._encode_first(pixels, counts).flatten(1, 2)
        cells = self.encode_pictures(pixels.flatten(0, 1))
        cells = cells.unflatten(0, pixels.shape[:2])  # (N, T, S, D)
        if self.time_steps != self.frames:
            steps = F.adaptive_avg_pool1d(cells.flatten(2).transpose(1, 2), self.time_steps)
            cells = steps.transpose(1, 2).unflatten(2, cells.shape[2:])
        return cells.flatten(1, 2)

    def _encode_first(self, pixels: Tensor, counts: Tensor) -> Tensor:
        """(N, T, S, D) of the first ``counts`` (N,) frames of each clip; zeros after them."""
        shown = torch.arange(pixels.shape[1], device=pixels.device) < counts[:, None]
        cells = self.encode_pictures(pixels[shown])
        padded = cells.new_zeros(*shown.shape, *cells.shape[1:])
        return padded.masked_scatter(shown[..., None, None], cells)


class ImageProcessor(MediaProcessor):
    """Pictures fitted into a white square; 8 bit, the encoder scales them."""

    modality = "image"

    def __init__(self, size: int, features: int) -> None:
        self.size = size
        self.features = features

    def num_features(self, media: Media) -> int:
        return self.features

    def __call__(self, media: Media, rng: np.random.Generator | None = None) -> MediaTensors:
        return {"pixels": white_square(decode_image(media.data, media.format), self.size)}

    def idle(self) -> MediaTensors:
        return {"pixels": torch.zeros(3, self.size, self.size, dtype=torch.uint8)}


class VideoProcessor(ImageProcessor):
    """Frames spread evenly over a clip, each as :class:`ImageProcessor` does it."""

    modality = "video"

    def __init__(self, size: int, features: int, frames: int) -> None:
        super().__init__(size, features)
        self.frames = frames

    def __call__(self, media: Media, rng: np.random.Generator | None = None) -> MediaTensors:
        frames = decode_video(
            media.data, media.format, num_frames=self.frames, start=media.start, end=media.end
        )
        return {"pixels": white_square(frames, self.size)}

    def idle(self) -> MediaTensors:
        return {"pixels": super().idle()["pixels"].expand(self.frames, -1, -1, -1)}


class FpsVideoProcessor(ImageProcessor):
    """Frames at a fixed rate, each as :class:`ImageProcessor` does it; at most ``frames``."""

    modality = "video"

    def __init__(self, size: int, features_per_frame: int, frames: int, fps: float) -> None:
        super().__init__(size, features_per_frame)
        self.frames = frames
        self.fps = fps

    def num_features(self, media: Media) -> int:
        return self.features * count_frames(media.data, media.format, **self._chosen(media))

    def __call__(self, media: Media, rng: np.random.Generator | None = None) -> MediaTensors:
        frames = decode_video(media.data, media.format, **self._chosen(media))
        return self._item(white_square(frames, self.size))

    def _chosen(self, media: Media) -> dict[str, Any]:
        span = {"start": media.start, "end": media.end}
        return {"fps": self.fps, "max_frames": self.frames, **span}

    def idle(self) -> MediaTensors:
        return self._item(super().idle()["pixels"][None])

    def _item(self, pixels: Tensor) -> MediaTensors:
        return {"pixels": pixels, "num_features": torch.tensor(self.features * len(pixels))}

    def collate(self, items: Sequence[MediaTensors]) -> MediaTensors:
        """Pad to the longest clip; the encoder passes the padding over."""
        return {
            "pixels": pad_sequence([item["pixels"] for item in items], batch_first=True),
            "num_features": torch.stack([item["num_features"] for item in items]),
        }


def white_square(picture: Tensor, size: int) -> Tensor:
    """(..., 3, H, W) uint8 centred on white and scaled (bicubic, antialiased) to size x size."""
    return resize(pad_to_square(picture), (size, size))

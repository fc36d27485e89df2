"""Any vision encoder that transformers' AutoModel makes from a picture alone: CLIP, SigLIP, DINOv2,
ViT and others, from the hub or a folder.

Legend: N pictures, F features, D width.
"""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import MODEL_MAPPING
from transformers.image_processing_base import ImageProcessingMixin

from mmfusion.models.encoders.base import Encoder, read_config
from mmfusion.models.loading import checked_path, reading, refuse_missing
from mmfusion.processing.base import MediaProcessor
from mmfusion.processing.images import center_crop, decode_image, resize
from mmfusion.types import Media, MediaTensors


class HFVision(Encoder):
    """Patch features of a transformers vision encoder.

    Pictures have the size that ``preprocessor_config.json`` makes. Where that is not the size in
    ``config.json`` (DINOv2), the model interpolates its positions or refuses.

    Args:
        path: hub id or folder, of the vision encoder or of a whole model such as CLIP.
        feature_layer: which hidden states: -1 the last layer's, -2 the one before (LLaVA's choice).
        select: ``patch`` drops class and register tokens, ``full`` keeps them.
        dtype: of the weights; ``auto`` keeps the checkpoint's.
        revision: commit, tag or branch of a hub id.
    """

    def __init__(
        self,
        path: str,
        feature_layer: int = -2,
        select: Literal["patch", "full"] = "patch",
        dtype: Literal["float32", "bfloat16", "auto"] = "float32",
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.path = checked_path(path, "config.json")
        self.revision = revision
        self.feature_layer = feature_layer
        self.select = select
        self.dtype = dtype
        self.model: Any = None

    @cached_property
    def config(self) -> Any:
        """Configuration of the vision encoder (of a whole model, its vision part)."""
        config = read_config(self.path, self.revision)
        return getattr(config, "vision_config", config)

    @cached_property
    def _class(self) -> Any:
        if type(self.config) not in MODEL_MAPPING:
            raise ValueError(
                f"{self.path} has a {type(self.config).__name__}, which AutoModel does not know; "
                "write an encoder for it (docs/extending.md)."
            )
        return MODEL_MAPPING[type(self.config)]

    @property
    def out_dim(self) -> int:
        return int(self.config.hidden_size)

    @cached_property
    def num_prefix(self) -> int:
        """Class and register tokens before the patches."""
        size = int(self.config.image_size)
        patches = (size // self.config.patch_size) ** 2
        prefix = self._count_tokens((size, size)) - patches
        if prefix < 0:
            raise ValueError(
                f"{self._class.__name__} gives fewer tokens than its {patches} patches; "
                "write an encoder for it (docs/extending.md)."
            )
        return prefix

    def _count_tokens(self, size: tuple[int, int]) -> int:
        """Tokens of a picture (height, width), by a model without weights."""
        with torch.device("meta"):
            model = self._class(self.config, **self._without_pooling)
            states = model(pixel_values=torch.zeros(1, 3, *size), output_hidden_states=True)
        return int(states.hidden_states[self.feature_layer].shape[1])

    @property
    def _without_pooling(self) -> dict[str, bool]:
        """Some models' pooling head is not in their checkpoints."""
        takes = "add_pooling_layer" in inspect.signature(self._class.__init__).parameters
        return {"add_pooling_layer": False} if takes else {}

    def build(self, pretrained: bool = True) -> None:
        if self.model is not None:
            return
        if pretrained:
            with reading(self.path):
                self.model, info = self._class.from_pretrained(
                    self.path,
                    revision=self.revision,
                    trust_remote_code=False,
                    config=self.config,
                    dtype=self.dtype,
                    output_loading_info=True,
                    **self._without_pooling,
                )
            refuse_missing(info, self.path, self._class.__name__)
        else:
            dtype = torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype)
            self.model = self._class(self.config, **self._without_pooling).to(dtype)
        self.train(self.training)

    def media_processor(self) -> MediaProcessor:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(
            self.path, revision=self.revision
        )
        try:
            processor = HFImageProcessor(settings)
        except (ValueError, TypeError) as error:
            raise ValueError(f"preprocessor_config.json of {self.path}: {error}") from error
        try:
            tokens = self._count_tokens(processor.size)
        except (ValueError, RuntimeError) as error:
            size = "{} x {}".format(*processor.size)
            raise ValueError(
                f"preprocessor_config.json of {self.path} makes pictures of {size}, which "
                f"{self._class.__name__} of image_size {self.config.image_size} does not take: "
                f"{error}"
            ) from error
        processor.features = tokens - (0 if self.select == "full" else self.num_prefix)
        return processor

    def forward(self, tensors: MediaTensors) -> Tensor:
        pixels = tensors["pixels"].to(self.model.dtype)
        states = self.model(pixel_values=pixels, output_hidden_states=True).hidden_states
        features = states[self.feature_layer]
        return features if self.select == "full" else features[:, self.num_prefix :]


class HFImageProcessor(MediaProcessor):
    """What transformers' image processors do with a picture: resize, crop, scale, normalise.

    Args:
        settings: the ``preprocessor_config.json``.

    Attributes:
        size: (height, width) of the pictures it makes.
        features: the encoder gives for a picture of this size.
    """

    modality = "image"

    def __init__(self, settings: dict[str, Any]) -> None:
        crops = settings.get("do_center_crop", False)
        self.resize_to = _resize_to(settings, crops)
        self.size = _pair(settings, "crop_size") if crops else _pair(settings, "size")
        to = self.resize_to
        height, width = (to, to) if isinstance(to, int) else to
        if self.size[0] > height or self.size[1] > width:
            raise ValueError(f"crop_size {self.size} does not fit into size {to}.")
        modes: dict[int, Literal["bicubic", "bilinear"]] = {2: "bilinear", 3: "bicubic"}
        if (resample := settings.get("resample", 3)) not in modes:
            raise ValueError(f"resample {resample} is not known; expected one of {modes}.")
        self.mode = modes[resample]
        scales, normalises = settings.get("do_rescale", True), settings.get("do_normalize", True)
        self.scale = float(settings.get("rescale_factor", 1 / 255)) if scales else 1.0
        self.mean = _three(settings, "image_mean") if normalises else [0.0] * 3
        self.std = _three(settings, "image_std") if normalises else [1.0] * 3
        self.features = 0

    def num_features(self, media: Media) -> int:
        return self.features

    def __call__(self, media: Media, rng: np.random.Generator | None = None) -> MediaTensors:
        picture = resize(decode_image(media.data, media.format), self.resize_to, self.mode)
        picture = center_crop(picture, self.size)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return {"pixels": (picture * self.scale - mean) / std}

    def idle(self) -> MediaTensors:
        return {"pixels": torch.zeros(3, *self.size)}


def _resize_to(settings: dict[str, Any], crops: bool) -> int | tuple[int, int]:
    """(height, width), or the length of the shortest edge where the middle is cut out then."""
    if not settings.get("do_resize", True):
        raise ValueError("do_resize is false; the encoder needs pictures of one size.")
    size = settings.get("size")
    if isinstance(size, dict) and "shortest_edge" in size:
        size = size["shortest_edge"]
        if not crops:
            raise ValueError(
                "size is a shortest_edge and do_center_crop is not true, so pictures would differ "
                "in size; give height and width, or a crop."
            )
    return int(size) if crops and isinstance(size, int) else _pair(settings, "size")


def _pair(settings: dict[str, Any], key: str) -> tuple[int, int]:
    """A size (height, width); one number stands for both."""
    size = settings.get(key)
    if isinstance(size, int):
        return size, size
    if not isinstance(size, dict) or not {"height", "width"} <= set(size):
        raise ValueError(f"{key} is {size}; expected a number, or height and width.")
    return int(size["height"]), int(size["width"])


def _three(settings: dict[str, Any], key: str) -> list[float]:
    """A value for each of red, green and blue."""
    values = settings.get(key)
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise ValueError(f"{key} is {values}; expected three numbers.")
    return [float(value) for value in values]

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
from transformers import MODEL_MAPPING, AutoConfig
from transformers.image_processing_base import ImageProcessingMixin

from mmfusion.models.encoders.base import Encoder
from mmfusion.models.loading import checked_path, refuse_missing
from mmfusion.processing.base import MediaProcessor
from mmfusion.processing.images import center_crop, decode_image, resize
from mmfusion.types import Media, MediaTensors


class HFVision(Encoder):
    """Patch features of a transformers vision encoder.

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
        config = AutoConfig.from_pretrained(self.path, revision=self.revision)
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

    @property
    def num_patches(self) -> int:
        """Patches of a picture, without class and register tokens."""
        return int(self.config.image_size // self.config.patch_size) ** 2

    @cached_property
    def num_prefix(self) -> int:
        """Class and register tokens before the patches, counted on a model without weights."""
        with torch.device("meta"):
            model = self._class(self.config, **self._without_pooling)
            size = self.config.image_size
            states = model(pixel_values=torch.zeros(1, 3, size, size), output_hidden_states=True)
        prefix = states.hidden_states[self.feature_layer].shape[1] - self.num_patches
        if prefix < 0:
            raise ValueError(
                f"{self._class.__name__} gives fewer tokens than its {self.num_patches} patches; "
                "write an encoder for it (docs/extending.md)."
            )
        return int(prefix)

    @property
    def _without_pooling(self) -> dict[str, bool]:
        """Some models' pooling head is not in their checkpoints."""
        takes = "add_pooling_layer" in inspect.signature(self._class.__init__).parameters
        return {"add_pooling_layer": False} if takes else {}

    def build(self, pretrained: bool = True) -> None:
        if self.model is not None:
            return
        if pretrained:
            self.model, info = self._class.from_pretrained(
                self.path,
                revision=self.revision,
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
        features = self.num_patches + (self.num_prefix if self.select == "full" else 0)
        return HFImageProcessor(settings, int(self.config.image_size), features)

    def forward(self, tensors: MediaTensors) -> Tensor:
        pixels = tensors["pixels"].to(self.model.dtype)
        states = self.model(pixel_values=pixels, output_hidden_states=True).hidden_states
        features = states[self.feature_layer]
        return features if self.select == "full" else features[:, self.num_prefix :]


class HFImageProcessor(MediaProcessor):
    """What transformers' image processors do with a picture: resize, crop, scale, normalise.

    Args:
        settings: the ``preprocessor_config.json``.
        image_size: side of the square the encoder takes.
        features: the encoder gives for a picture.
    """

    modality = "image"

    def __init__(self, settings: dict[str, Any], image_size: int, features: int) -> None:
        size = settings.get("size") or {}
        size = {"shortest_edge": size} if isinstance(size, int) else size
        self.resize_to: int | tuple[int, int]
        if "shortest_edge" in size:
            self.resize_to = int(size["shortest_edge"])
        elif {"height", "width"} <= set(size):
            self.resize_to = (int(size["height"]), int(size["width"]))
        else:
            raise ValueError(
                f"preprocessor_config.json has size {size}; expected shortest_edge, or height and "
                "width."
            )
        modes: dict[int, Literal["bicubic", "bilinear"]] = {2: "bilinear", 3: "bicubic"}
        if (resample := settings.get("resample", 3)) not in modes:
            raise ValueError(f"resample {resample} is not known; expected one of {modes}.")
        self.mode = modes[resample]
        self.crop = bool(settings.get("do_center_crop", False))
        self.scale = float(settings.get("rescale_factor", 1 / 255))
        self.mean = list(settings["image_mean"])
        self.std = list(settings["image_std"])
        self.image_size = image_size
        self.features = features

    def num_features(self, media: Media) -> int:
        return self.features

    def __call__(self, media: Media, rng: np.random.Generator | None = None) -> MediaTensors:
        picture = resize(decode_image(media.data, media.format), self.resize_to, self.mode)
        if self.crop:
            picture = center_crop(picture, self.image_size)
        if picture.shape[1:] != (self.image_size, self.image_size):
            raise ValueError(
                f"preprocessor_config.json makes pictures of {tuple(picture.shape[1:])}, the "
                f"encoder takes {self.image_size} x {self.image_size}."
            )
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return {"pixels": (picture * self.scale - mean) / std}

    def idle(self) -> MediaTensors:
        return {"pixels": torch.zeros(3, self.image_size, self.image_size)}

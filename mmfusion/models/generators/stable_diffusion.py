"""Stable Diffusion 1.x and 2.x (arXiv:2112.10752), and any pipeline of their shape: CLIP text
encoder, U-Net with cross-attention, VAE; epsilon or v-prediction, as its scheduler says.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.schedulers import SchedulerMixin
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel

from mmfusion.models.generators.base import DENOISER, TEXT_ENCODER, VAE, Generator, Sampling
from mmfusion.models.generators.noise import NoiseSchedule, noise_schedule
from mmfusion.models.loading import checked_path, reading, refuse_missing
from mmfusion.processing.base import MediaProcessor
from mmfusion.processing.images import center_crop, decode_image, resize
from mmfusion.types import Conditioning, ConditioningSpec, Media, MediaTensors


class StableDiffusion(Generator):
    """A frozen text-to-image model with one CLIP text encoder.

    Args:
        path: folder of a diffusers pipeline (``model_index.json``), or a hub id.
        size: side of the squares it is trained on (0: the U-Net's own).
        dtype: of the weights.
        revision: commit, tag or branch of a hub id.
    """

    modality = "image"

    def __init__(
        self,
        path: str,
        size: int = 0,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.path = checked_path(path, "model_index.json")
        self.revision, self.dtype = revision, getattr(torch, dtype)
        self.text_encoder: Any = None
        self.vae: Any = None
        self.denoiser: Any = None
        configs = self.configs
        width = int(configs["text_encoder"]["hidden_size"])
        takes = configs["unet"]["cross_attention_dim"]
        if takes != width:
            raise ValueError(
                f"the U-Net of {path} takes conditioning of width {takes}, its text encoder gives "
                f"{width}; expected the same."
            )
        self.factor = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
        self.size = size or int(configs["unet"]["sample_size"]) * self.factor
        if self.size % self.factor:
            raise ValueError(f"size is {size}; expected a multiple of {self.factor}.")
        self.noise_schedule()

    @cached_property
    def configs(self) -> dict[str, dict[str, Any]]:
        """Configurations of the parts."""
        names = {"unet": "config.json", "vae": "config.json", "text_encoder": "config.json",
                 "scheduler": "scheduler_config.json"}  # fmt: skip
        return {
            part: pipeline_config(self.path, part, file, self.revision)
            for part, file in names.items()
        }

    @property
    def spec(self) -> ConditioningSpec:
        text = self.configs["text_encoder"]
        return ConditioningSpec(int(text["max_position_embeddings"]), int(text["hidden_size"]))

    def noise_schedule(self) -> NoiseSchedule:
        return noise_schedule(self.configs["scheduler"])

    def target_processor(self) -> MediaProcessor:
        return SquareProcessor(self.size)

    def build(self, parts: Collection[str], pretrained: bool = True) -> None:
        if TEXT_ENCODER in parts and self.text_encoder is None:
            self.text_encoder = self._load(CLIPTextModel, "text_encoder", pretrained)
        if VAE in parts and self.vae is None:
            self.vae = self._load(AutoencoderKL, "vae", pretrained)
        if DENOISER in parts and self.denoiser is None:
            self.denoiser = self._load(UNet2DConditionModel, "unet", pretrained)
        self.train(self.training)

    def _load(self, kind: Any, part: str, pretrained: bool) -> Any:
        if not pretrained:
            config = dict(self.configs[part])
            made = (
                kind(kind.config_class(**config))
                if hasattr(kind, "config_class")
                else kind.from_config(config)
            )
            return made if self.dtype == torch.float32 else made.to(self.dtype)
        with reading(Path(self.path) / part):
            model, info = kind.from_pretrained(
                self.path,
                subfolder=part,
                revision=self.revision,
                torch_dtype=self.dtype,
                use_safetensors=True,
                output_loading_info=True,
            )
        refuse_missing(info, f"{self.path}/{part}", kind.__name__)
        return model

    @cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(
            self.path, subfolder="tokenizer", revision=self.revision
        )

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        length = self.spec.tokens
        ids = self._tokenizer(
            list(captions), padding="max_length", max_length=length, truncation=True,
            return_tensors="pt",
        ).input_ids  # fmt: skip
        device = next(self.text_encoder.parameters()).device
        return Conditioning(self.text_encoder(ids.to(device)).last_hidden_state)

    @torch.no_grad()
    def encode_media(self, tensors: MediaTensors, generators: Sequence[torch.Generator]) -> Tensor:
        pixels = tensors["pixels"].to(self.dtype) / 127.5 - 1
        posterior: DiagonalGaussianDistribution = self.vae.encode(pixels).latent_dist
        noise = [torch.randn(posterior.mean.shape[1:], generator=g) for g in generators]
        drawn = posterior.mean + posterior.std * torch.stack(noise).to(posterior.mean)
        return drawn * self.vae.config.scaling_factor

    def denoise(self, noisy: Tensor, timesteps_M: Tensor, conditioning: Conditioning) -> Tensor:
        tokens = conditioning.tokens.to(self.dtype)
        return self.denoiser(
            noisy.to(self.dtype), timesteps_M, tokens, encoder_attention_mask=conditioning.mask
        ).sample

    @torch.no_grad()
    def sample(
        self, conditioning: Conditioning, empty: Conditioning, sampling: Sampling
    ) -> list[Media]:
        pipeline: Any = StableDiffusionPipeline(
            self.vae, None, None, self.denoiser, self._sampler(), None, None,
            requires_safety_checker=False,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        count = len(conditioning.tokens)
        tokens = conditioning.tokens.to(self.dtype)
        pictures = pipeline(
            prompt_embeds=tokens,
            negative_prompt_embeds=empty.tokens.to(tokens).expand_as(tokens),
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            height=self.size,
            width=self.size,
            generator=[torch.Generator().manual_seed(sampling.seed + m) for m in range(count)],
        ).images
        return [as_png(picture) for picture in pictures]

    def _sampler(self) -> SchedulerMixin:
        import diffusers

        config = self.configs["scheduler"]
        return getattr(diffusers, config["_class_name"]).from_config(config)


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


def pipeline_config(path: str, part: str, file: str, revision: str | None = None) -> dict[str, Any]:
    """The configuration of a part of a pipeline.

    Raises:
        FileNotFoundError: where the folder does not have it.
    """
    folder = Path(path)
    if folder.is_dir():
        found = folder / part / file
        if not found.is_file():
            raise FileNotFoundError(
                f"{path} has no {part}/{file}; expected the folder of a diffusers pipeline."
            )
    else:
        from huggingface_hub import hf_hub_download

        found = Path(hf_hub_download(path, file, subfolder=part, revision=revision))
    with reading(found.parent):
        return dict(json.loads(found.read_bytes()))


def as_png(picture: Image.Image) -> Media:
    """A picture as media."""
    data = io.BytesIO()
    picture.save(data, "png")
    return Media("image", data.getvalue(), "png")

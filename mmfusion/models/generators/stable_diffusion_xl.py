"""Stable Diffusion XL (arXiv:2307.01952): two CLIP text encoders side by side, and the pooled
vector of the second beside the size of the picture.

The conditioning is that of diffusers' ``StableDiffusionXLPipeline.encode_prompt``, the loss that of
its ``examples/text_to_image/train_text_to_image_sdxl.py``, for pictures that are neither scaled up
nor cut off centre: original and target size are ``size``, the corner of the crop is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from mmfusion.models.generators.base import DENOISER, TEXT_ENCODER, VAE, Sampling
from mmfusion.models.generators.diffusers_pipeline import Component, DiffusersPipeline, DType
from mmfusion.models.generators.pictures import (
    SquareProcessor,
    checked_rescale,
    drawn_pictures,
    picture_size,
)
from mmfusion.models.generators.pixels import picture_moments
from mmfusion.processing.base import MediaProcessor
from mmfusion.types import Conditioning, ConditioningSpec, Media, MediaTensors

TIME_IDS = 6
"""Numbers that tell of the picture's size."""


class StableDiffusionXL(DiffusersPipeline):
    """A frozen text-to-image model with two CLIP text encoders.

    Args:
        path: folder of a diffusers pipeline (``model_index.json``), or a hub id.
        size: side of the squares it is trained on (0: the U-Net's own).
        dtype: of the weights.
        revision: commit, tag or branch of a hub id.
        guidance_rescale: as of
            :class:`~mmfusion.models.generators.stable_diffusion.StableDiffusion`.

    Raises:
        ValueError: for widths that do not fit, a dtype in which the VAE overflows, or a
            ``guidance_rescale`` that is not within 0 to 1.
    """

    modality = "image"
    components = {
        "text_encoder": Component(TEXT_ENCODER, "text_encoder", CLIPTextModel),
        "text_encoder_2": Component(TEXT_ENCODER, "text_encoder_2", CLIPTextModelWithProjection),
        "vae": Component(VAE, "vae", AutoencoderKL),
        "denoiser": Component(DENOISER, "unet", UNet2DConditionModel),
    }
    text_encoder_2: Any

    def __init__(
        self,
        path: str,
        size: int = 0,
        dtype: DType = "float32",
        revision: str | None = None,
        guidance_rescale: float = 0.0,
    ) -> None:
        super().__init__(path, dtype, revision)
        self.guidance_rescale = checked_rescale(guidance_rescale)
        unet, vae = self.configs["denoiser"], self.configs["vae"]
        sizes = TIME_IDS * int(unet["addition_time_embed_dim"] or 0)
        self.check_width(unet["cross_attention_dim"], self.spec.dim)
        self.check_width(
            unet["projection_class_embeddings_input_dim"] - sizes, self.spec.pooled_dim, "pooled"
        )
        self.check_width(unet["in_channels"], vae["latent_channels"], "latents")
        if self.dtype == torch.float16 and vae.get("force_upcast", True):
            raise ValueError(
                f"dtype is float16, in which the VAE of {path} overflows (force_upcast in its "
                "config.json); use bfloat16 or float32."
            )
        self.size = picture_size(size, unet, vae)

    @property
    def spec(self) -> ConditioningSpec:
        first, second = self.configs["text_encoder"], self.configs["text_encoder_2"]
        return ConditioningSpec(
            tokens=int(first["max_position_embeddings"]),
            dim=int(first["hidden_size"]) + int(second["hidden_size"]),
            pooled_dim=int(second["projection_dim"]),
        )

    def target_processor(self) -> MediaProcessor:
        return SquareProcessor(self.size)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        """For "" zeros, where the pipeline was trained so (``force_zeros_for_empty_prompt``)."""
        tokens, (_, second) = encode_by_both(self, captions, self.spec.tokens)
        pooled = second.text_embeds
        if self.index.get("force_zeros_for_empty_prompt", True):
            empty = [m for m, caption in enumerate(captions) if not caption]
            tokens[empty], pooled[empty] = 0.0, 0.0
        return Conditioning(tokens, pooled)

    @torch.no_grad()
    def moments(self, tensors: MediaTensors) -> tuple[Tensor, Tensor]:
        return picture_moments(self.vae, tensors["pixels"])

    def predict(self, noisy: Tensor, timesteps_M: Tensor, given: Conditioning) -> Tensor:
        sizes = noisy.new_tensor([self.size, self.size, 0, 0, self.size, self.size])
        return self.denoiser(
            noisy,
            timesteps_M,
            given.tokens,
            encoder_attention_mask=given.mask,
            added_cond_kwargs={
                "text_embeds": given.pooled,
                "time_ids": sizes.expand(len(noisy), -1),
            },
        ).sample

    def draw(self, ours: Conditioning, none: Conditioning, sampling: Sampling) -> list[Media]:
        pipeline = self.pipeline(
            StableDiffusionXLPipeline, tokenizer=None, tokenizer_2=None, add_watermarker=False
        )
        options = self.options(ours, none, sampling)
        rescale = self.guidance_rescale
        return drawn_pictures(pipeline, self.size, guidance_rescale=rescale, **options)


def encode_by_both(
    generator: DiffusersPipeline, captions: Sequence[str], length: int
) -> tuple[Tensor, list[Any]]:
    """By two CLIP text encoders: (M, length, D) of their last states but one, side by side; and
    all that each gives.
    """
    found = []
    for name, folder in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        ids, _ = generator.tokenize(captions, length, folder)
        found.append(getattr(generator, name)(ids, output_hidden_states=True))
    return torch.cat([each.hidden_states[-2] for each in found], -1), found

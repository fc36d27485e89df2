"""Stable Diffusion 1.x and 2.x (arXiv:2112.10752), and any pipeline of their shape: CLIP text
encoder, U-Net with cross-attention, VAE; epsilon or v-prediction, as its scheduler says.

The loss is that of diffusers' ``examples/text_to_image/train_text_to_image.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from mmfusion.models.generators.base import DENOISER, TEXT_ENCODER, VAE, Sampling
from mmfusion.models.generators.diffusers_pipeline import Component, DType
from mmfusion.models.generators.pictures import (
    SquareProcessor,
    checked_rescale,
    drawn_pictures,
    picture_size,
)
from mmfusion.models.generators.pixels import as_signed, picture_moments
from mmfusion.models.generators.trainable import TrainablePipeline
from mmfusion.processing.base import MediaProcessor
from mmfusion.types import Conditioning, ConditioningSpec, Media, MediaTensors


class StableDiffusion(TrainablePipeline):
    """A frozen text-to-image model with one CLIP text encoder.

    Args:
        path: folder of a diffusers pipeline (``model_index.json``), or a hub id.
        size: side of the squares it is trained on (0: the U-Net's own).
        dtype: of the weights.
        revision: commit, tag or branch of a hub id.
        guidance_rescale: how much of the contrast that guidance adds is taken out again when
            pictures are drawn, 0 to 1 (arXiv:2305.08891, section 3.4, which uses 0.7): with too
            much of it colors shift, most of all under v-prediction.

    Raises:
        ValueError: for widths that do not fit, or a ``guidance_rescale`` that is not within 0 to 1.
    """

    modality = "image"
    components = {
        "text_encoder": Component(TEXT_ENCODER, "text_encoder", CLIPTextModel),
        "vae": Component(VAE, "vae", AutoencoderKL),
        "denoiser": Component(DENOISER, "unet", UNet2DConditionModel),
    }

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
        self.check_width(unet["cross_attention_dim"], self.spec.dim)
        self.check_width(unet["in_channels"], vae["latent_channels"], "latents")
        self.size = picture_size(size, unet, vae)

    @property
    def spec(self) -> ConditioningSpec:
        text = self.configs["text_encoder"]
        return ConditioningSpec(int(text["max_position_embeddings"]), int(text["hidden_size"]))

    def target_processor(self) -> MediaProcessor:
        return SquareProcessor(self.size)

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        ids, _ = self.tokenize(captions, self.spec.tokens)
        return Conditioning(self.text_encoder(ids).last_hidden_state)

    def vae_input(self, tensors: MediaTensors) -> Tensor:
        """(M, 3, H, W) from -1 to 1."""
        return as_signed(tensors["pixels"], self.vae.dtype)

    @torch.no_grad()
    def moments(self, tensors: MediaTensors) -> tuple[Tensor, Tensor]:
        return picture_moments(self.vae, tensors["pixels"])

    def predict(self, noisy: Tensor, timesteps_M: Tensor, given: Conditioning) -> Tensor:
        return self.denoiser(
            noisy, timesteps_M, given.tokens, encoder_attention_mask=given.mask
        ).sample

    def draw(self, ours: Conditioning, none: Conditioning, sampling: Sampling) -> list[Media]:
        pipeline = self.pipeline(
            StableDiffusionPipeline, tokenizer=None, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
        options = self.options(ours, none, sampling)
        rescale = self.guidance_rescale
        return drawn_pictures(pipeline, self.size, guidance_rescale=rescale, **options)

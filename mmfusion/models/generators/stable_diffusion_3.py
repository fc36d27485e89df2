"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206): a transformer over text and picture together,
trained by flow matching. The tokens of two CLIP encoders, padded to the transformer's width, are
followed by those of T5; the pooled vectors of both CLIPs lie side by side.

The conditioning is that of diffusers' ``StableDiffusion3Pipeline.encode_prompt``, the loss that of
its ``examples/dreambooth/train_dreambooth_sd3.py`` with logit-normal times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from mmfusion.models.generators.base import DENOISER, TEXT_ENCODER, VAE, Sampling
from mmfusion.models.generators.diffusers_pipeline import Component, DiffusersPipeline, DType
from mmfusion.models.generators.pictures import SquareProcessor, drawn_pictures, picture_size
from mmfusion.models.generators.pixels import picture_moments
from mmfusion.models.generators.stable_diffusion_xl import encode_by_both
from mmfusion.processing.base import MediaProcessor
from mmfusion.types import Conditioning, ConditioningSpec, Media, MediaTensors


class StableDiffusion3(DiffusersPipeline):
    """A frozen text-to-image model with two CLIP text encoders and, mostly, T5.

    Args:
        path: folder of a diffusers pipeline (``model_index.json``), or a hub id. Without a
            ``text_encoder_3`` its tokens are zeros.
        size: side of the squares it is trained on (0: the transformer's own).
        t5_tokens: tokens of T5's part of the conditioning.
        dtype: of the weights.
        revision: commit, tag or branch of a hub id.
    """

    modality = "image"
    components = {
        "text_encoder": Component(TEXT_ENCODER, "text_encoder", CLIPTextModelWithProjection),
        "text_encoder_2": Component(TEXT_ENCODER, "text_encoder_2", CLIPTextModelWithProjection),
        "text_encoder_3": Component(TEXT_ENCODER, "text_encoder_3", T5EncoderModel, optional=True),
        "vae": Component(VAE, "vae", AutoencoderKL),
        "denoiser": Component(DENOISER, "transformer", SD3Transformer2DModel),
    }
    text_encoder_2: Any
    text_encoder_3: Any

    def __init__(
        self,
        path: str,
        size: int = 0,
        t5_tokens: int = 256,
        dtype: DType = "float32",
        revision: str | None = None,
    ) -> None:
        super().__init__(path, dtype, revision)
        self.t5_tokens = t5_tokens
        transformer, vae = self.configs["denoiser"], self.configs["vae"]
        if "text_encoder_3" in self.configs:
            self.check_width(
                transformer["joint_attention_dim"], self.configs["text_encoder_3"]["d_model"]
            )
        self.check_width(transformer["pooled_projection_dim"], self.spec.pooled_dim, "pooled")
        self.check_width(transformer["in_channels"], vae["latent_channels"], "latents")
        self.size = picture_size(size, transformer, vae)

    @property
    def spec(self) -> ConditioningSpec:
        clips = [self.configs[name] for name in ("text_encoder", "text_encoder_2")]
        return ConditioningSpec(
            tokens=int(clips[0]["max_position_embeddings"]) + self.t5_tokens,
            dim=int(self.configs["denoiser"]["joint_attention_dim"]),
            pooled_dim=sum(int(clip["projection_dim"]) for clip in clips),
        )

    def target_processor(self) -> MediaProcessor:
        return SquareProcessor(self.size)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        spec = self.spec
        clip, found = encode_by_both(self, captions, spec.tokens - self.t5_tokens)
        clip = F.pad(clip, (0, spec.dim - clip.shape[-1]))
        t5 = clip.new_zeros(len(captions), self.t5_tokens, spec.dim)
        if self.text_encoder_3 is not None:
            ids, _ = self.tokenize(captions, self.t5_tokens, "tokenizer_3")
            t5 = self.text_encoder_3(ids).last_hidden_state
        pooled = torch.cat([each.text_embeds for each in found], -1)
        return Conditioning(torch.cat([clip, t5.to(clip)], 1), pooled)

    @torch.no_grad()
    def moments(self, tensors: MediaTensors) -> tuple[Tensor, Tensor]:
        return picture_moments(self.vae, tensors["pixels"])

    def predict(self, noisy: Tensor, timesteps_M: Tensor, given: Conditioning) -> Tensor:
        return self.denoiser(
            hidden_states=noisy,
            timestep=timesteps_M,
            encoder_hidden_states=given.tokens,
            pooled_projections=given.pooled,
        ).sample

    def paired(
        self, conditioning: Conditioning, empty: Conditioning
    ) -> tuple[Conditioning, Conditioning]:
        if conditioning.tokens.shape[1] != empty.tokens.shape[1]:
            raise ValueError(
                "Stable Diffusion 3 attends to text and picture at once, where repeated tokens "
                f'weigh more: guidance needs as many as the encoding of "" has, '
                f"{empty.tokens.shape[1]}; got {conditioning.tokens.shape[1]}. Use a QueryDecoder."
            )
        return super().paired(conditioning, empty)

    def draw(self, ours: Conditioning, none: Conditioning, sampling: Sampling) -> list[Media]:
        pipeline = self.pipeline(
            StableDiffusion3Pipeline, tokenizer=None, tokenizer_2=None, tokenizer_3=None
        )
        return drawn_pictures(pipeline, self.size, **self.options(ours, none, sampling))

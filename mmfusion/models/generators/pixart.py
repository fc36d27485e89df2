"""PixArt-alpha (arXiv:2310.00426) and PixArt-sigma (arXiv:2403.04692): a diffusion transformer that
attends to the tokens of T5 under their mask, and predicts a variance beside the noise.

The conditioning is that of diffusers' ``PixArtAlphaPipeline`` and ``PixArtSigmaPipeline``
(``encode_prompt``); the loss is that of the noise alone, as in diffusers'
``examples/research_projects/pixart/train_pixart_controlnet_hf.py``.

The mask is the text encoding's: alignment looks at the tokens that a caption fills. What an output
projector gives has no mask, all its tokens are valid, so those that captions seldom fill learn what
to say from denoising alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import (
    AutoencoderKL,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from torch import Tensor
from transformers import T5EncoderModel

from mmfusion.models.generators.base import DENOISER, TEXT_ENCODER, VAE, Sampling
from mmfusion.models.generators.diffusers_pipeline import Component, DiffusersPipeline, DType
from mmfusion.models.generators.pictures import SquareProcessor, drawn_pictures, picture_size
from mmfusion.models.generators.pixels import picture_moments
from mmfusion.processing.base import MediaProcessor
from mmfusion.types import Conditioning, ConditioningSpec, Media, MediaTensors

TOKENS = {PixArtAlphaPipeline: 120, PixArtSigmaPipeline: 300}
"""Of a caption, as each pipeline cuts it."""


class PixArt(DiffusersPipeline):
    """A frozen text-to-image model with T5.

    Args:
        path: folder of a diffusers pipeline (``model_index.json``), or a hub id.
        size: side of the squares it is trained on (0: the transformer's own).
        dtype: of the weights.
        revision: commit, tag or branch of a hub id.
    """

    modality = "image"
    components = {
        "text_encoder": Component(TEXT_ENCODER, "text_encoder", T5EncoderModel),
        "vae": Component(VAE, "vae", AutoencoderKL),
        "denoiser": Component(
            DENOISER, "transformer", PixArtTransformer2DModel, aliases=("Transformer2DModel",)
        ),
    }

    def __init__(
        self,
        path: str,
        size: int = 0,
        dtype: DType = "float32",
        revision: str | None = None,
    ) -> None:
        super().__init__(path, dtype, revision)
        sigma = self.index["_class_name"] == PixArtSigmaPipeline.__name__
        self.kind = PixArtSigmaPipeline if sigma else PixArtAlphaPipeline
        transformer, vae = self.configs["denoiser"], self.configs["vae"]
        self.check_width(transformer["caption_channels"], self.spec.dim)
        self.check_width(transformer["in_channels"], vae["latent_channels"], "latents")
        self.size = picture_size(size, transformer, vae)

    @property
    def spec(self) -> ConditioningSpec:
        return ConditioningSpec(TOKENS[self.kind], int(self.configs["text_encoder"]["d_model"]))

    def target_processor(self) -> MediaProcessor:
        return SquareProcessor(self.size)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        plain = [caption.lower().strip() for caption in captions]
        ids, mask = self.tokenize(plain, self.spec.tokens)
        tokens = self.text_encoder(ids, attention_mask=mask).last_hidden_state
        return Conditioning(tokens, mask=mask.bool())

    @torch.no_grad()
    def moments(self, tensors: MediaTensors) -> tuple[Tensor, Tensor]:
        return picture_moments(self.vae, tensors["pixels"])

    def predict(self, noisy: Tensor, timesteps_M: Tensor, given: Conditioning) -> Tensor:
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.denoiser.use_additional_conditions:
            side = noisy.new_full((len(noisy), 1), self.size)
            sizes = {"resolution": side.expand(-1, 2), "aspect_ratio": torch.ones_like(side)}
        found = self.denoiser(
            noisy,
            encoder_hidden_states=given.tokens,
            encoder_attention_mask=given.mask,
            timestep=timesteps_M,
            added_cond_kwargs=sizes,
        ).sample
        return found[:, : noisy.shape[1]]

    def check(self, sampling: Sampling) -> None:
        if sampling.steps < 2 and self.kind is PixArtAlphaPipeline:
            raise ValueError(
                f"sampling.steps is {sampling.steps}; expected 2 or more: diffusers takes a single "
                "step of PixArt-alpha for that of a distilled model."
            )
        super().check(sampling)

    def draw(self, ours: Conditioning, none: Conditioning, sampling: Sampling) -> list[Media]:
        pipeline = self.pipeline(self.kind, tokenizer=None)
        return drawn_pictures(
            pipeline,
            self.size,
            prompt_attention_mask=ours.valid.long(),
            negative_prompt=None,
            negative_prompt_attention_mask=none.valid.long(),
            use_resolution_binning=False,
            **self.options(ours, none, sampling),
        )

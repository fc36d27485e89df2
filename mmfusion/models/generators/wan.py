"""Wan 2.1 (arXiv:2503.20314): a transformer over the latents of a whole clip, trained by flow
matching, which attends to the tokens of UMT5.

The conditioning is that of diffusers' ``WanPipeline.encode_prompt``: what lies beyond the caption
is zero, and attended to. Latents are normalised by the VAE's mean and deviation of each channel, as
the pipeline undoes it. diffusers has no training script for Wan; the loss is flow matching with
logit-normal times, shifted as the scheduler says.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor
from transformers import UMT5EncoderModel

from mmfusion.models.generators.base import DENOISER, TEXT_ENCODER, VAE, Sampling
from mmfusion.models.generators.clips import ClipProcessor, drawn_clips
from mmfusion.models.generators.diffusers_pipeline import Component, DType
from mmfusion.models.generators.pixels import as_signed, checked_sides
from mmfusion.models.generators.trainable import TrainablePipeline
from mmfusion.processing.base import MediaProcessor
from mmfusion.types import Conditioning, ConditioningSpec, Media, MediaTensors

SIDES = 16
"""Height and width are multiples of it."""


class Wan(TrainablePipeline):
    """A frozen text-to-video model with UMT5.

    Args:
        path: folder of a diffusers pipeline (``model_index.json``), or a hub id.
        height: of the frames it is trained on and makes, in pixels.
        width: likewise.
        num_frames: of a clip; one more than a multiple of the VAE's factor (4).
        fps: frames a second of targets and of what is made.
        tokens: of the conditioning.
        dtype: of the weights.
        revision: commit, tag or branch of a hub id.
    """

    modality = "video"
    components = {
        "text_encoder": Component(TEXT_ENCODER, "text_encoder", UMT5EncoderModel),
        "vae": Component(VAE, "vae", AutoencoderKLWan),
        "denoiser": Component(DENOISER, "transformer", WanTransformer3DModel),
    }

    def __init__(
        self,
        path: str,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        fps: float = 16.0,
        tokens: int = 512,
        dtype: DType = "float32",
        revision: str | None = None,
    ) -> None:
        super().__init__(path, dtype, revision)
        self.tokens = tokens
        transformer, vae = self.configs["denoiser"], self.configs["vae"]
        if self.index.get("boundary_ratio") is not None or self.index.get("expand_timesteps"):
            raise ValueError(
                f"{path} is Wan 2.2, with two transformers or a time for each token "
                "(boundary_ratio, expand_timesteps); expected Wan 2.1."
            )
        self.check_width(transformer["text_dim"], self.spec.dim)
        self.check_width(transformer["in_channels"], vae["z_dim"], "latents")
        checked_sides(SIDES, height=height, width=width)
        factor = int(vae.get("scale_factor_temporal", 4))
        if num_frames < 1 or (num_frames - 1) % factor:
            raise ValueError(
                f"num_frames is {num_frames}; expected one more than a multiple of {factor}."
            )
        self.clip = ClipProcessor(height, width, num_frames, fps)

    @property
    def spec(self) -> ConditioningSpec:
        return ConditioningSpec(self.tokens, int(self.configs["text_encoder"]["d_model"]))

    def target_processor(self) -> MediaProcessor:
        return self.clip

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        plain = [" ".join(html.unescape(html.unescape(text)).split()) for text in captions]
        ids, mask = self.tokenize(plain, self.tokens)
        tokens = self.text_encoder(ids, attention_mask=mask).last_hidden_state
        return Conditioning(tokens * mask.to(tokens)[..., None])

    def vae_input(self, tensors: MediaTensors) -> Tensor:
        """(M, 3, T, H, W) from -1 to 1."""
        return as_signed(tensors["pixels"].transpose(1, 2), self.vae.dtype)

    def reconstructed(self, latents: Tensor) -> Tensor:
        """Before the VAE cuts it to -1 to 1: what is cut has no gradient, and stays white."""
        pieces: list[Tensor] = []
        hook = self.vae.decoder.register_forward_hook(lambda *found: pieces.append(found[-1]))
        self.vae.decode(latents)
        hook.remove()
        whole, patch = torch.cat(pieces, 2), self.configs["vae"].get("patch_size")
        return unpatchify(whole, patch) if patch else whole

    def standardize(self, mean: Tensor, std: Tensor) -> None:
        axes = [axis for axis in range(mean.ndim) if axis != 1]
        deviation = (mean.var(axes) + std.square().mean(axes)).sqrt()
        self.vae.register_to_config(
            latents_mean=mean.mean(axes).tolist(), latents_std=deviation.tolist()
        )

    @torch.no_grad()
    def moments(self, tensors: MediaTensors) -> tuple[Tensor, Tensor]:
        """(M, C, t, h, w) each; the VAE joins frames."""
        posterior = self.vae.encode(self.vae_input(tensors)).latent_dist
        return posterior.mean, posterior.std

    def scaled(self, latents: Tensor) -> Tensor:
        mean, std = (
            latents.new_tensor(self.configs["vae"][name]).view(-1, 1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        return (latents - mean) / std

    def predict(self, noisy: Tensor, timesteps_M: Tensor, given: Conditioning) -> Tensor:
        return self.denoiser(noisy, timesteps_M, given.tokens).sample

    def draw(self, ours: Conditioning, none: Conditioning, sampling: Sampling) -> list[Media]:
        """Guidance is a second pass of each step."""
        pipeline = self.pipeline(WanPipeline, tokenizer=None)
        return drawn_clips(pipeline, self.clip, **self.options(ours, none, sampling))

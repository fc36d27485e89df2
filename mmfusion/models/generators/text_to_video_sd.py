"""ModelScope's text-to-video (arXiv:2308.06571) and its kin such as Zeroscope: Stable Diffusion's
text encoder and VAE, applied to each frame, and a U-Net over frames.

The conditioning is that of diffusers' ``TextToVideoSDPipeline.encode_prompt``; the loss is that of
Stable Diffusion over the latents of all frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, TextToVideoSDPipeline, UNet3DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from mmfusion.models.generators.base import DENOISER, TEXT_ENCODER, VAE, Sampling
from mmfusion.models.generators.clips import ClipProcessor, drawn_clips
from mmfusion.models.generators.diffusers_pipeline import Component, DiffusersPipeline, DType
from mmfusion.models.generators.pixels import checked_sides, picture_moments
from mmfusion.processing.base import MediaProcessor
from mmfusion.types import Conditioning, ConditioningSpec, Media, MediaTensors


class TextToVideoSD(DiffusersPipeline):
    """A frozen text-to-video model with one CLIP text encoder.

    Args:
        path: folder of a diffusers pipeline (``model_index.json``), or a hub id.
        height: of the frames it is trained on and makes, in pixels (0: the U-Net's own; Zeroscope
            576w: 320).
        width: likewise (Zeroscope 576w: 576).
        num_frames: of a clip (Zeroscope: 24).
        fps: frames a second of targets and of what is made.
        dtype: of the weights.
        revision: commit, tag or branch of a hub id.
    """

    modality = "video"
    components = {
        "text_encoder": Component(TEXT_ENCODER, "text_encoder", CLIPTextModel),
        "vae": Component(VAE, "vae", AutoencoderKL),
        "denoiser": Component(DENOISER, "unet", UNet3DConditionModel),
    }

    def __init__(
        self,
        path: str,
        height: int = 0,
        width: int = 0,
        num_frames: int = 16,
        fps: float = 8.0,
        dtype: DType = "float32",
        revision: str | None = None,
    ) -> None:
        super().__init__(path, dtype, revision)
        unet, vae = self.configs["denoiser"], self.configs["vae"]
        self.check_width(unet["cross_attention_dim"], self.spec.dim)
        self.check_width(unet["in_channels"], vae["latent_channels"], "latents")
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        own = int(unet["sample_size"]) * factor
        self.clip = ClipProcessor(height or own, width or own, num_frames, fps)
        checked_sides(factor, height=self.clip.height, width=self.clip.width)

    @property
    def spec(self) -> ConditioningSpec:
        text = self.configs["text_encoder"]
        return ConditioningSpec(int(text["max_position_embeddings"]), int(text["hidden_size"]))

    def target_processor(self) -> MediaProcessor:
        return self.clip

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        ids, _ = self.tokenize(captions, self.spec.tokens)
        return Conditioning(self.text_encoder(ids).last_hidden_state)

    @torch.no_grad()
    def moments(self, tensors: MediaTensors) -> tuple[Tensor, Tensor]:
        """(M, C, T, h, w) each, of one frame after the other."""
        pixels_MT3HW = tensors["pixels"]
        mean, std = (
            found.unflatten(0, pixels_MT3HW.shape[:2]).transpose(1, 2)
            for found in picture_moments(self.vae, pixels_MT3HW.flatten(0, 1))
        )
        return mean, std

    def predict(self, noisy: Tensor, timesteps_M: Tensor, given: Conditioning) -> Tensor:
        return self.denoiser(noisy, timesteps_M, given.tokens).sample

    def draw(self, ours: Conditioning, none: Conditioning, sampling: Sampling) -> list[Media]:
        pipeline = self.pipeline(TextToVideoSDPipeline, tokenizer=None)
        return drawn_clips(pipeline, self.clip, **self.options(ours, none, sampling))

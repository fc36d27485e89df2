"""AudioLDM (arXiv:2301.12503), and any pipeline of its shape: CLAP text encoder, U-Net with a class
embedding instead of cross-attention, VAE over log-mel frames, HiFi-GAN vocoder.

The conditioning is one vector of length 1, the pooled text encoding. It enters the U-Net as its
class label. Cosine is the distance to align it by: the mean squared error of two unrelated unit
vectors of 512 numbers is 2/512 = 0.004, and as small are its gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from transformers import ClapTextModelWithProjection, SpeechT5HifiGan

from mmfusion.models.generators.base import DENOISER, TEXT_ENCODER, VAE, VOCODER, Sampling
from mmfusion.models.generators.diffusers_pipeline import Component, DType
from mmfusion.models.generators.griffin_lim import GriffinLim
from mmfusion.models.generators.sampling import draw_latents
from mmfusion.models.generators.sounds import MelClip, mel_moments
from mmfusion.models.generators.trainable import TrainablePipeline
from mmfusion.processing.base import MediaProcessor
from mmfusion.types import Conditioning, ConditioningSpec, Media, MediaTensors


class AudioLDM(TrainablePipeline):
    """A frozen text-to-audio model with one CLAP vector.

    Sampling rate, mel bins and the samples of a mel frame are those of its vocoder. What an output
    projector gives is brought to length 1 before the U-Net sees it, as CLAP's vectors are.

    Args:
        path: folder of a diffusers pipeline (``model_index.json``), or a hub id.
        seconds: of a clip, in training and in answers (0: the U-Net's own, 5.12 of the published
            ones, which were trained on 10.24); rounded up to whole latents.
        window: samples of the Fourier transform that mel frames are made by.
        dtype: of the weights.
        revision: commit, tag or branch of a hub id.
    """

    modality = "audio"
    components = {
        "text_encoder": Component(TEXT_ENCODER, "text_encoder", ClapTextModelWithProjection),
        "vae": Component(VAE, "vae", AutoencoderKL),
        "denoiser": Component(DENOISER, "unet", UNet2DConditionModel),
        "vocoder": Component(VOCODER, "vocoder", SpeechT5HifiGan, aliases=("GriffinLim",)),
    }

    def __init__(
        self,
        path: str,
        seconds: float = 0.0,
        window: int = 1024,
        dtype: DType = "float32",
        revision: str | None = None,
    ) -> None:
        super().__init__(path, dtype, revision)
        unet, vae = self.configs["denoiser"], self.configs["vae"]
        if unet.get("class_embed_type") != "simple_projection":
            raise ValueError(
                f"the U-Net of {self.path} has class_embed_type {unet.get('class_embed_type')!r}; "
                "AudioLDM's takes its conditioning by 'simple_projection'."
            )
        self.check_width(unet["projection_class_embeddings_input_dim"], self.spec.dim)
        self.check_width(unet["in_channels"], vae["latent_channels"], "latents")
        self.clip = MelClip(self.path, self.configs, seconds, window)

    def _load(self, name: str, component: Component, pretrained: bool) -> Any:
        if name == "vocoder" and "GriffinLim" in self.index["vocoder"]:
            component = replace(component, kind=GriffinLim)
        return super()._load(name, component, pretrained)

    @property
    def spec(self) -> ConditioningSpec:
        return ConditioningSpec(1, int(self.configs["text_encoder"]["projection_dim"]))

    def target_processor(self) -> MediaProcessor:
        return self.clip.processor()

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        # RoBERTa keeps two positions for itself. What is padding in all captions is left out.
        longest = int(self.configs["text_encoder"]["max_position_embeddings"]) - 2
        ids, mask = self.tokenize(captions, longest)
        used = int(mask.sum(1).max())
        found = self.text_encoder(ids[:, :used], attention_mask=mask[:, :used]).text_embeds
        return Conditioning(F.normalize(found, dim=-1)[:, None])

    def vae_input(self, tensors: MediaTensors) -> Tensor:
        """(M, 1, T, W)."""
        return tensors["mel"][:, None].to(self.vae.dtype)

    @torch.no_grad()
    def moments(self, tensors: MediaTensors) -> tuple[Tensor, Tensor]:
        return mel_moments(self.vae, tensors["mel"])

    def predict(self, noisy: Tensor, timesteps_M: Tensor, given: Conditioning) -> Tensor:
        label = F.normalize(given.tokens[:, 0].float(), dim=-1).to(noisy)
        return self.denoiser(noisy, timesteps_M, None, class_labels=label).sample

    def draw(self, ours: Conditioning, none: Conditioning, sampling: Sampling) -> list[Media]:
        latents = draw_latents(self, self.clip.latents, ours, none, sampling)
        return self.clip.heard(latents, self.vae, self.vocoder)

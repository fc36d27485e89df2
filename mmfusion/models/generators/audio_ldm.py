"""AudioLDM (arXiv:2301.12503), and any pipeline of its shape: CLAP text encoder, U-Net with a class
embedding instead of cross-attention, VAE over log-mel frames, HiFi-GAN vocoder.

The conditioning is one vector of length 1, the pooled text encoding. It enters the U-Net as its
class label. Cosine is the distance to align it by: the mean squared error of two unrelated unit
vectors of 512 numbers is 2/512 = 0.004, and as small are its gradients.

M clips, T mel frames, W mel bins, f the VAE's factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AudioLDMPipeline, AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from transformers import ClapTextModelWithProjection, SpeechT5HifiGan

from mmfusion.models.generators.base import DENOISER, TEXT_ENCODER, VAE, VOCODER, Sampling
from mmfusion.models.generators.diffusers_pipeline import Component, DiffusersPipeline, DType
from mmfusion.models.generators.sounds import MelProcessor
from mmfusion.processing.audios import as_wav
from mmfusion.processing.base import MediaProcessor
from mmfusion.types import Conditioning, ConditioningSpec, Media, MediaTensors


class AudioLDM(DiffusersPipeline):
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
        "vocoder": Component(VOCODER, "vocoder", SpeechT5HifiGan),
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
        self.clip = MelClip(self.path, vae, self.configs["vocoder"], seconds, unet["sample_size"])
        self.window = window

    @property
    def spec(self) -> ConditioningSpec:
        return ConditioningSpec(1, int(self.configs["text_encoder"]["projection_dim"]))

    def target_processor(self) -> MediaProcessor:
        clip = self.clip
        return MelProcessor(clip.rate, clip.hop, clip.frames, clip.bins, self.window)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        # RoBERTa keeps two positions for itself. What is padding in all captions is left out.
        longest = int(self.configs["text_encoder"]["max_position_embeddings"]) - 2
        ids, mask = self.tokenize(captions, longest)
        used = int(mask.sum(1).max())
        found = self.text_encoder(ids[:, :used], attention_mask=mask[:, :used]).text_embeds
        return Conditioning(F.normalize(found, dim=-1)[:, None])

    @torch.no_grad()
    def moments(self, tensors: MediaTensors) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(tensors["mel"][:, None].to(self.dtype)).latent_dist
        return posterior.mean, posterior.std

    def denoise(self, noisy: Tensor, timesteps_M: Tensor, conditioning: Conditioning) -> Tensor:
        return self.denoiser(
            noisy.to(self.dtype), timesteps_M, None, class_labels=self._label(conditioning)
        ).sample

    def _label(self, conditioning: Conditioning) -> Tensor:
        """(M, D_g), each of length 1."""
        return F.normalize(conditioning.tokens[:, 0].float(), dim=-1).to(self.device, self.dtype)

    @torch.no_grad()
    def sample(
        self, conditioning: Conditioning, empty: Conditioning, sampling: Sampling
    ) -> list[Media]:
        pipeline = self.pipeline(AudioLDMPipeline, tokenizer=None)
        pipeline.text_encoder = self.denoiser  # asked for its dtype alone
        ours = self._label(conditioning)
        sounds = pipeline(
            prompt_embeds=ours,
            negative_prompt_embeds=self._label(empty).expand_as(ours),
            audio_length_in_s=self.clip.seconds,
            **self.options(sampling, len(ours)),
        ).audios
        return [as_wav(sound, self.clip.rate) for sound in sounds]


class MelClip:
    """Sizes of a clip, from the configurations of what makes it.

    Args:
        path: of the pipeline, for messages.
        vae: its configuration.
        vocoder: its configuration.
        seconds: asked for (0: as the denoiser).
        latents: frames of the denoiser's latents.

    Attributes:
        rate: samples a second.
        hop: samples of a mel frame.
        bins: W.
        frames: T, a multiple of f.
    """

    def __init__(
        self, path: str, vae: dict[str, Any], vocoder: dict[str, Any], seconds: float, latents: Any
    ) -> None:
        self.rate = int(vocoder["sampling_rate"])
        self.hop = math.prod(vocoder["upsample_rates"])
        self.bins = int(vocoder["model_in_dim"])
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        if vae["in_channels"] != 1 or self.bins % factor:
            raise ValueError(
                f"the VAE of {path} takes {vae['in_channels']} channels and divides by {factor}, "
                f"its vocoder takes {self.bins} mel bins; expected 1 channel, and bins that the "
                "VAE can divide."
            )
        own = latents[0] if isinstance(latents, (list, tuple)) else latents
        if seconds < 0 or not (seconds or own):
            raise ValueError(
                f"seconds is {seconds}; expected more than 0, or 0 where the denoiser of {path} "
                "says how long its clips are (sample_size)."
            )
        wanted = seconds * self.rate / self.hop or int(own) * factor
        self.frames = factor * math.ceil(wanted / factor - 1e-6)

    @property
    def seconds(self) -> float:
        """Of a clip."""
        return self.frames * self.hop / self.rate

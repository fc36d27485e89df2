"""Stable Audio Open (arXiv:2407.14358): T5, a diffusion transformer over the latents of a 1D VAE
(Oobleck) of waves, and two numbers, where in its recording a clip starts and ends.

The conditioning are the text's tokens as the transformer takes them, zeros where a caption has no
more: it attends to those as well, so a projector is to learn them (and squared error is the
distance to align by; a zero has no cosine). Start and end are added here. Without a text it was
trained on zeros, start and end among the tokens included: so "" is encoded as zeros, to which start
and end are not added. Guidance leads away from that, and dropped conditioning is that.

Always the whole window of the transformer is diffused (47.6 s), with silence after the clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderOobleck, StableAudioDiTModel, StableAudioProjectionModel
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor
from torch.nn import functional as F
from transformers import T5EncoderModel

from mmfusion.models.generators.base import DENOISER, TEXT_ENCODER, VAE, Sampling
from mmfusion.models.generators.diffusers_pipeline import Component, DiffusersPipeline, DType
from mmfusion.models.generators.noise import CosineNoise
from mmfusion.models.generators.sounds import ClipProcessor
from mmfusion.processing.audios import as_wav
from mmfusion.processing.base import MediaProcessor
from mmfusion.types import Conditioning, ConditioningSpec, Media, MediaTensors


class StableAudio(DiffusersPipeline):
    """A frozen text-to-audio model of 44.1 kHz stereo; targets are one channel, given twice.

    Sampled by DDIM at the noise levels of its sampler (diffusers' own needs torchsde).

    Args:
        path: folder of a diffusers pipeline (``model_index.json``), or a hub id.
        seconds: of a clip, in training and in answers (0: the longest).
        text_tokens: of the conditioning (128 in the published one); what is longer is cut.
        dtype: of the weights.
        revision: commit, tag or branch of a hub id.
    """

    modality = "audio"
    components = {
        "text_encoder": Component(TEXT_ENCODER, "text_encoder", T5EncoderModel),
        # One component of two uses: that of text, and that of start and end.
        "text_projection": Component(TEXT_ENCODER, "projection_model", StableAudioProjectionModel),
        "vae": Component(VAE, "vae", AutoencoderOobleck),
        "denoiser": Component(DENOISER, "transformer", StableAudioDiTModel),
        "span": Component(DENOISER, "projection_model", StableAudioProjectionModel),
    }
    text_projection: Any
    span: Any

    def __init__(
        self,
        path: str,
        seconds: float = 0.0,
        text_tokens: int = 128,
        dtype: DType = "float32",
        revision: str | None = None,
    ) -> None:
        super().__init__(path, dtype, revision)
        transformer, vae = self.configs["denoiser"], self.configs["vae"]
        projection = self.configs["span"]
        self.check_width(
            projection["text_encoder_dim"], self.configs["text_encoder"]["d_model"], "text"
        )
        self.check_width(transformer["cross_attention_input_dim"], projection["conditioning_dim"])
        self.check_width(transformer["in_channels"], vae["decoder_input_channels"], "latents")
        self.text_tokens = text_tokens
        self.rate = int(vae["sampling_rate"])
        self.hop = math.prod(vae["downsampling_ratios"])
        self.frames = int(transformer["sample_size"])
        longest = self.frames * self.hop / self.rate
        if not 0 <= seconds <= longest:
            raise ValueError(
                f"seconds is {seconds}; expected at most {longest:.2f} of {path}, or 0 for that."
            )
        self.seconds = seconds or longest

    @property
    def spec(self) -> ConditioningSpec:
        return ConditioningSpec(self.text_tokens, int(self.configs["span"]["conditioning_dim"]))

    def noise_schedule(self) -> CosineNoise:
        found = super().noise_schedule()
        if not isinstance(found, CosineNoise):
            raise ValueError(
                f"the scheduler of {self.path} is {self.configs['scheduler'].get('_class_name')}; "
                "Stable Audio is trained as CosineDPMSolverMultistepScheduler says."
            )
        return found

    def paired(
        self, conditioning: Conditioning, empty: Conditioning
    ) -> tuple[Conditioning, Conditioning]:
        """As the base class, for equal numbers of tokens.

        Raises:
            ValueError: for others: it attends to start and end beside them, which repeated tokens
                would outweigh.
        """
        ours, none = conditioning.tokens.shape[1], empty.tokens.shape[1]
        if ours != none:
            raise ValueError(
                f"Stable Audio takes as many tokens as its text encoding has, {none}; got {ours}. "
                "Use a QueryDecoder."
            )
        return super().paired(conditioning, empty)

    def target_processor(self) -> MediaProcessor:
        return ClipProcessor(self.rate, round(self.seconds * self.rate))

    def scaled(self, latents: Tensor) -> Tensor:
        """Its VAE's latents are taken as they are."""
        return latents

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        """Zeros after each caption's tokens, and for ""."""
        ids, mask = self.tokenize(captions, self.text_tokens)
        states = self.text_encoder(ids, attention_mask=mask).last_hidden_state
        found = self.text_projection(text_hidden_states=states).text_hidden_states
        mask[[m for m, caption in enumerate(captions) if not caption]] = 0
        return Conditioning(found * mask[..., None].to(found))

    @torch.no_grad()
    def moments(self, tensors: MediaTensors) -> tuple[Tensor, Tensor]:
        waves = tensors["samples"].to(self.vae.dtype)
        whole = F.pad(waves, (0, self.frames * self.hop - waves.shape[-1]))
        channels = int(self.configs["vae"]["audio_channels"])
        posterior = self.vae.encode(whole[:, None].expand(-1, channels, -1)).latent_dist
        return posterior.mean, posterior.std

    def predict(self, noisy: Tensor, timesteps_M: Tensor, given: Conditioning) -> Tensor:
        return self._predicted(noisy, timesteps_M, *self._with_span(given.tokens))

    def _with_span(self, tokens_MCD: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens with those of start and end after them, (M, C + 2, D), all zeros where the
        tokens are; and start and end side by side, (M, 1, 2 D).
        """
        count = len(tokens_MCD)
        start = torch.zeros(count, device=tokens_MCD.device)
        found = self.span(start_seconds=start, end_seconds=start + self.seconds)
        both = (found.seconds_start_hidden_states, found.seconds_end_hidden_states)
        span = [each.to(tokens_MCD) for each in both]
        given = (tokens_MCD != 0).flatten(1).any(1)[:, None, None]
        return torch.cat([tokens_MCD, *(each * given for each in span)], 1), torch.cat(span, 2)

    def _predicted(self, noisy: Tensor, times_M: Tensor, tokens: Tensor, span: Tensor) -> Tensor:
        rotary = get_1d_rotary_pos_embed(
            int(self.configs["denoiser"]["attention_head_dim"]) // 2,
            noisy.shape[2] + span.shape[1],
            use_real=True,
            repeat_interleave_real=False,
        )
        return self.denoiser(
            noisy.to(tokens),
            times_M.to(tokens),
            encoder_hidden_states=tokens,
            global_hidden_states=span,
            rotary_embedding=rotary,
        ).sample

    def check(self, sampling: Sampling) -> None:
        """Its sampler, which is not diffusers', takes any number of steps."""

    def check_drawn(self, given: ConditioningSpec) -> None:
        """It draws away from zeros, as many as there are tokens."""

    def sample(
        self, conditioning: Conditioning, empty: Conditioning, sampling: Sampling
    ) -> list[Media]:
        """As the base class, away from as many zeros as there are tokens."""
        zeros = Conditioning(torch.zeros_like(conditioning.tokens))
        return super().sample(conditioning, zeros, sampling)

    def draw(self, ours: Conditioning, none: Conditioning, sampling: Sampling) -> list[Media]:
        guided = sampling.guidance_scale > 1
        both = torch.cat([none.tokens, ours.tokens]) if guided else ours.tokens
        tokens, span = self._with_span(both)
        shape = (int(self.configs["denoiser"]["in_channels"]), self.frames)
        drawn = [torch.randn(*shape, generator=g) for g in sampling.noise(len(ours.tokens))]
        latents = torch.stack(drawn).to(self.device)
        times = self.noise_schedule().sampled(sampling.steps)
        for time, after in zip(times, [*times[1:], 0.0], strict=True):
            noisy = torch.cat([latents] * 2) if guided else latents
            each = torch.full((len(noisy),), time, device=self.device)
            found = self._predicted(noisy, each, tokens, span).float()
            if guided:
                away, towards = found.chunk(2)
                found = away + sampling.guidance_scale * (towards - away)
            latents = CosineNoise.step(latents, found, time, after)
        waves = self.vae.decode(latents.to(self.vae.dtype)).sample.float().cpu()
        length = round(self.seconds * self.rate)
        return [as_wav(wave[:, :length].T.numpy(), self.rate) for wave in waves]

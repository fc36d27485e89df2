"""What the contract has to know of the families of sound."""

from __future__ import annotations

import io
from typing import Any

import diffusers
import numpy as np
import soundfile
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, T5EncoderModel

from mmfusion.models.generators.audio_ldm import AudioLDM
from mmfusion.models.generators.audio_ldm_2 import AudioLDM2
from mmfusion.models.generators.stable_audio import StableAudio
from mmfusion.types import Conditioning, Media
from tests.models.generators import tiny_sound
from tests.models.generators.families import Family


class Sounds(Family):
    """Clips of 16 frames of 64 samples, at 4 kHz."""

    made_shape = (1024,)

    def media(self, seed: int) -> Media:
        return noise(seed)

    def decoded(self, media: Media) -> Tensor:
        """On the scale of 8 bit."""
        samples, rate = soundfile.read(io.BytesIO(media.data), dtype="float32")
        assert rate == 4000
        return torch.from_numpy(samples) * 128

    def latents(self, g: Any, tensors: dict[str, Tensor], draw: torch.Generator) -> Tensor:
        posterior = g.vae.encode(tensors["mel"][:, None]).latent_dist
        noise = torch.randn(posterior.mean.shape[1:], generator=draw)
        return (posterior.mean + posterior.std * noise) * g.vae.config.scaling_factor


class AudioLDMFamily(Sounds):
    save = staticmethod(tiny_sound.save_audio_ldm)
    misfits = (
        (
            "text_encoder",
            {"projection_dim": 31},
            "conditioning of width 32, its text encoder gives 31",
        ),
        ("vae", {"latent_channels": 3}, "latents of width 4, its VAE gives 3"),
    )

    def make(self, path: str, **options: Any) -> Any:
        return AudioLDM(path, window=128, **options)

    def encoded(self, path: str, captions: list[str]) -> tuple[Conditioning, Conditioning]:
        pipeline = diffusers.AudioLDMPipeline.from_pretrained(path)
        both = pipeline._encode_prompt(captions, "cpu", 1, True)[:, None]
        none, ours = both.chunk(2)
        return Conditioning(ours), Conditioning(none)

    def predicted(self, g: Any, noisy: Tensor, time: Tensor, given: Conditioning) -> Tensor:
        label = F.normalize(given.tokens[:, 0], dim=-1)
        return g.denoiser(noisy, time, None, class_labels=label).sample


class AudioLDM2Family(Sounds):
    save = staticmethod(tiny_sound.save_audio_ldm_2)
    misfits = (
        ("text_encoder_2", {"d_model": 48}, "conditioning of width 32, its text encoder gives 48"),
        ("language_model", {"n_embd": 24}, "conditioning of width 16, its text encoder gives 24"),
        ("vae", {"latent_channels": 3}, "latents of width 4, its VAE gives 3"),
    )

    def make(self, path: str, **options: Any) -> Any:
        return AudioLDM2(path, t5_tokens=6, window=128, **options)

    def encoded(self, path: str, captions: list[str]) -> tuple[Conditioning, Conditioning]:
        """Each caption alone, so that none is padded."""
        pipeline = diffusers.AudioLDM2Pipeline.from_pretrained(path, feature_extractor=None)

        def joined(texts: list[str]) -> Conditioning:
            tokens, mask = torch.zeros(len(texts), 10, 32), torch.zeros(len(texts), 10).bool()
            for i, text in enumerate(texts):
                with torch.no_grad():
                    t5, _, states = pipeline.encode_prompt(
                        [text], "cpu", 1, False, max_new_tokens=4
                    )
                t5 = t5[:, :6]
                tokens[i, :4, :16], tokens[i, 4 : 4 + t5.shape[1]] = states[0], t5[0]
                mask[i, : 4 + t5.shape[1]] = True
            return Conditioning(tokens, mask=mask)

        return joined(captions), joined([""] * len(captions))

    def predicted(self, g: Any, noisy: Tensor, time: Tensor, given: Conditioning) -> Tensor:
        # What is masked is as good as not there.
        t5 = (
            given.tokens[:, 4:] if given.mask is None else given.tokens[:, 4:][:, given.mask[0, 4:]]
        )
        return g.denoiser(
            noisy, time, encoder_hidden_states=given.tokens[:, :4, :16], encoder_hidden_states_1=t5
        ).sample


class StableAudioFamily(Sounds):
    save = staticmethod(tiny_sound.save_stable_audio)
    made_shape = (128, 2)
    misfits = (
        ("text_encoder", {"d_model": 48}, "text of width 32, its text encoder gives 48"),
        ("projection_model", {"conditioning_dim": 9}, "of width 8, its text encoder gives 9"),
        ("vae", {"decoder_input_channels": 4}, "latents of width 3, its VAE gives 4"),
    )

    def make(self, path: str, **options: Any) -> Any:
        return StableAudio(path, text_tokens=6, **options)

    def pipeline(self, path: str) -> Any:
        """Of its components: its own sampler needs torchsde."""
        kinds = {
            "vae": diffusers.AutoencoderOobleck,
            "text_encoder": T5EncoderModel,
            "projection_model": diffusers.StableAudioProjectionModel,
            "tokenizer": AutoTokenizer,
            "transformer": diffusers.StableAudioDiTModel,
        }
        made = {name: kind.from_pretrained(path, subfolder=name) for name, kind in kinds.items()}
        sampler = diffusers.EDMDPMSolverMultistepScheduler()
        return diffusers.StableAudioPipeline(**made, scheduler=sampler)

    def encoded(self, path: str, captions: list[str]) -> tuple[Conditioning, Conditioning]:
        """The pipeline leads away from zeros where there is no negative prompt."""
        with torch.no_grad():
            ours = self.pipeline(path).encode_prompt(captions, "cpu", False)
        return Conditioning(ours), Conditioning(torch.zeros_like(ours))

    def latents(self, g: Any, tensors: dict[str, Tensor], draw: torch.Generator) -> Tensor:
        stereo = tensors["samples"][:, None].repeat(1, 2, 1)
        posterior = g.vae.encode(stereo).latent_dist
        return posterior.mean + posterior.std * torch.randn(3, 16, generator=draw)

    def loss(self, g: Any, x: Tensor, given: Conditioning, draw: torch.Generator) -> Tensor:
        """stable-audio-tools' training/diffusion.py, objective v, in words of one item."""
        time = torch.rand(1, generator=draw)
        alpha, sigma = torch.cos(time * torch.pi / 2), torch.sin(time * torch.pi / 2)
        noise = torch.randn(x.shape[1:], generator=draw)[None]
        found = self.predicted(g, x * alpha + noise * sigma, time, given)
        return F.mse_loss(found, noise * alpha - x * sigma)

    def predicted(self, g: Any, noisy: Tensor, time: Tensor, given: Conditioning) -> Tensor:
        start, end = self.pipeline(g.path).encode_duration(0.0, 128 / 4000, "cpu", False, 1)
        return g.denoiser(
            noisy, time, torch.cat([given.tokens, start, end], 1), torch.cat([start, end], 2),
            get_1d_rotary_pos_embed(2, 17, use_real=True, repeat_interleave_real=False),
        ).sample  # fmt: skip


def noise(seed: int) -> Media:
    """A quarter of a second and more."""
    file = io.BytesIO()
    samples = np.random.default_rng(seed).normal(0, 0.1, 1500).astype(np.float32)
    soundfile.write(file, samples, 4000, format="WAV", subtype="FLOAT")
    return Media("audio", file.getvalue(), "wav")

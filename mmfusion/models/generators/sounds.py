"""Sounds as generators of audio take them: clips of one length, as log-mel frames or as samples.

M clips, T mel frames, W mel bins, f the VAE's factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.audio_utils import mel_filter_bank

from mmfusion.processing.audios import as_wav, decode_audio
from mmfusion.processing.base import MediaProcessor
from mmfusion.types import DataError, Media, MediaTensors

PEAK = 0.5
"""Of a clip that is turned into mel frames (AudioLDM's own)."""
SILENCE = 1e-4
"""A clip that stays below this is refused: brought to a common loudness it would be noise."""
FLOOR = 1e-5
"""Under the logarithm."""


class ClipProcessor(MediaProcessor):
    """The first ``samples`` of a sound, or of a span of it; a shorter one is followed by silence.

    Args:
        rate: samples a second.
        samples: of a clip.
    """

    modality = "audio"

    def __init__(self, rate: int, samples: int) -> None:
        self.rate, self.samples = rate, samples

    def num_features(self, media: Media) -> int:
        return 1

    def __call__(self, media: Media, rng: np.random.Generator | None = None) -> MediaTensors:
        return {"samples": self.padded(self.clip(media))}

    def idle(self) -> MediaTensors:
        return {"samples": torch.zeros(self.samples)}

    def clip(self, media: Media) -> Tensor:
        """Up to ``samples``, float32.

        Raises:
            DataError: ``silent_audio``, and those of :func:`decode_audio`.
        """
        begin = media.start or 0.0
        end = begin + self.samples / self.rate
        end = end if media.end is None else min(end, media.end)
        wave = decode_audio(media.data, media.format, self.rate, begin, end)[: self.samples]
        if (peak := float((wave - wave.mean()).abs().max())) < SILENCE:
            raise DataError(
                "silent_audio",
                f"the {media.format} audio is silent from {begin} to {end} s: its peak is "
                f"{peak:.1e}; expected {SILENCE:.0e} or more.",
            )
        return wave

    def padded(self, wave: Tensor) -> Tensor:
        """(samples,)."""
        return F.pad(wave, (0, self.samples - len(wave)))


class MelProcessor(ClipProcessor):
    """Log-mel frames of a clip that is brought to a common loudness.

    Args:
        rate: samples a second.
        hop: samples from a frame to the next.
        frames: T of a clip.
        bins: of the mel scale, from 0 Hz to half the rate.
        window: samples of the Fourier transform.
    """

    def __init__(self, rate: int, hop: int, frames: int, bins: int, window: int) -> None:
        super().__init__(rate, frames * hop)
        self.hop, self.frames, self.bins, self.window = hop, frames, bins, window

    def __call__(self, media: Media, rng: np.random.Generator | None = None) -> MediaTensors:
        mel = log_mel(self.wave(media), self.rate, self.hop, self.bins, self.window)
        return {"mel": mel[: self.frames]}

    def wave(self, media: Media) -> Tensor:
        """(samples,) of the clip, its peak at ``PEAK``."""
        clip = self.clip(media)
        clip = clip - clip.mean()
        return self.padded(clip * (PEAK / clip.abs().max()))

    def idle(self) -> MediaTensors:
        return {"mel": torch.full((self.frames, self.bins), float(np.log(FLOOR)))}


class MelClip:
    """Sizes of a clip, from the configurations of what makes it.

    Args:
        path: of the pipeline, for messages.
        configs: of its ``denoiser``, ``vae`` and ``vocoder``.
        seconds: asked for (0: as the denoiser).
        window: samples of the Fourier transform.

    Attributes:
        rate: samples a second.
        hop: samples of a mel frame.
        bins: W.
        frames: T, a multiple of f.
        factor: f.
        channels: of the VAE's latents.
        scale: of the VAE's latents.
    """

    def __init__(
        self, path: str, configs: Mapping[str, dict[str, Any]], seconds: float, window: int
    ) -> None:
        vae, vocoder = configs["vae"], configs["vocoder"]
        latents = configs["denoiser"]["sample_size"]
        self.window, self.channels = window, int(vae["latent_channels"])
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
        self.factor, self.scale = factor, float(vae.get("scaling_factor", 0.18215))
        self.frames = factor * math.ceil(wanted / factor - 1e-6)

    @property
    def seconds(self) -> float:
        """Of a clip."""
        return self.frames * self.hop / self.rate

    def processor(self) -> MelProcessor:
        """Of clips."""
        return MelProcessor(self.rate, self.hop, self.frames, self.bins, self.window)

    @property
    def latents(self) -> tuple[int, int, int]:
        """Shape of a clip's latents."""
        return self.channels, self.frames // self.factor, self.bins // self.factor

    def heard(self, latents: Tensor, vae: Any, vocoder: Any) -> list[Media]:
        """M clips of their scaled latents."""
        mels = vae.decode(latents / self.scale).sample[:, 0]
        waves = vocoder(mels)[:, : self.frames * self.hop].float().cpu().numpy()
        return [as_wav(wave, self.rate) for wave in waves]


def mel_moments(vae: Any, mel_MTW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (M, C, T/f, W/f) of an AutoencoderKL's latents of mel frames."""
    posterior = vae.encode(mel_MTW[:, None].to(vae.dtype)).latent_dist
    return posterior.mean, posterior.std


def log_mel(wave: Tensor, rate: int, hop: int, bins: int, window: int) -> Tensor:
    """(..., samples // hop + 1, bins) natural logarithms of mel-scaled magnitudes, frames centred,
    as Tacotron 2 and AudioLDM take them (https://github.com/haoheliu/AudioLDM, ``audio/stft.py``).

    Args:
        wave: (..., samples).
        rate: samples a second.
        hop: samples from a frame to the next.
        bins: of the mel scale.
        window: samples of the Fourier transform.
    """
    spectrum = torch.stft(
        wave, window, hop, window=torch.hann_window(window).to(wave), return_complex=True
    ).abs()
    return (mel_filters(rate, bins, window).to(wave) @ spectrum).clamp(min=FLOOR).log().mT


@lru_cache(maxsize=4)
def mel_filters(rate: int, bins: int, window: int) -> Tensor:
    """(bins, window // 2 + 1) Slaney filters, from 0 Hz to half the rate."""
    bank = mel_filter_bank(
        window // 2 + 1, bins, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney"
    )
    return torch.from_numpy(bank).float().T

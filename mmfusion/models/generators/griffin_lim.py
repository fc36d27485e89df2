"""A vocoder without training: the spectrum that fits the mel frames best, and phases that fit the
spectrum best (fast Griffin-Lim, Perraudin et al. 2013, doi:10.1109/WASPAA.2013.6701851).

It stands in a pipeline's folder where HiFi-GAN stands in others. Whatever the precision it is kept
in, it works in fp32. M clips, T mel frames, W bins, K frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor

from mmfusion.models.generators.sounds import mel_filters

MOMENTUM = 0.99


class GriffinLim(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Log-mel frames to waves. The arguments are named as SpeechT5HifiGan's.

    Args:
        sampling_rate: samples a second.
        upsample_rates: their product is the samples from a frame to the next.
        model_in_dim: W.
        window: samples of the Fourier transform.
        iterations: of the search for phases.
    """

    @register_to_config
    def __init__(
        self,
        sampling_rate: int = 16000,
        upsample_rates: Sequence[int] = (160,),
        model_in_dim: int = 64,
        window: int = 1024,
        iterations: int = 60,
    ) -> None:
        super().__init__()
        self.hop, self.window, self.iterations = math.prod(upsample_rates), window, iterations
        # What its file holds; half precision rounds it, so nothing is computed from it.
        self.register_buffer("filters", mel_filters(sampling_rate, model_in_dim, window))

    @torch.no_grad()
    def forward(self, mel_MTW: Tensor) -> Tensor:
        """(M, T * hop) waves, float32; each depends on its own frames alone."""
        with torch.autocast(mel_MTW.device.type, enabled=False):
            return self._waves(mel_MTW.float())

    def _waves(self, mel_MTW: Tensor) -> Tensor:
        magnitude = self.spectrum(mel_MTW)
        length = mel_MTW.shape[1] * self.hop
        # Phases begin at random, the same for every clip: the same frames sound the same.
        draws = torch.rand(magnitude.shape[1:], generator=torch.Generator().manual_seed(0))
        phase = torch.polar(torch.ones_like(magnitude), 2 * math.pi * draws.to(magnitude))
        before = torch.zeros_like(phase)
        for _ in range(self.iterations):
            rebuilt = self._spectrum_of(self._wave_of(magnitude * phase, length))
            phase = rebuilt + MOMENTUM * (rebuilt - before)
            phase, before = phase / phase.abs().clamp(min=1e-8), rebuilt
        return self._wave_of(magnitude * phase, length)

    def spectrum(self, mel_MTW: Tensor, updates: int = 60) -> Tensor:
        """(M, K, T + 1) magnitudes, none negative, whose mel frames are nearest: multiplicative
        updates (Lee and Seung 2001).
        """
        wanted = mel_MTW.exp().mT
        made: Any = self.config
        filters = mel_filters(made.sampling_rate, made.model_in_dim, self.window).to(wanted)
        found = (torch.linalg.pinv(filters) @ wanted).clamp(min=1e-6)
        for _ in range(updates):
            found = found * (filters.T @ wanted) / (filters.T @ (filters @ found) + 1e-8)
        return torch.nn.functional.pad(found, (0, 1))  # one frame is centred on the end

    def _wave_of(self, spectrum: Tensor, length: int) -> Tensor:
        window = torch.hann_window(self.window, device=spectrum.device)
        return torch.istft(spectrum, self.window, self.hop, window=window, length=length)

    def _spectrum_of(self, wave: Tensor) -> Tensor:
        window = torch.hann_window(self.window, device=wave.device)
        return torch.stft(wave, self.window, self.hop, window=window, return_complex=True)

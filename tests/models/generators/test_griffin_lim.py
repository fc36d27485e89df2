"""Mel frames of known sounds, and what is heard of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmfusion.models.generators.griffin_lim import GriffinLim
from mmfusion.models.generators.sounds import log_mel

RATE, HOP, BINS, WINDOW, FRAMES = 16000, 160, 64, 1024, 48


def tone(frequency: float) -> torch.Tensor:
    seconds = torch.arange(FRAMES * HOP) / RATE
    return 0.5 * torch.sin(2 * torch.pi * frequency * seconds)


def mel(wave: torch.Tensor) -> torch.Tensor:
    return log_mel(wave, RATE, HOP, BINS, WINDOW)[..., :FRAMES, :]


def loudest(wave: torch.Tensor) -> float:
    return float(torch.fft.rfft(wave).abs().argmax()) * RATE / len(wave)


def test_tones_are_heard_again() -> None:
    waves = torch.stack([tone(440.0), tone(1250.0)])
    found = GriffinLim()(mel(waves))
    assert found.shape == waves.shape
    for wave, frequency in zip(found, (440.0, 1250.0), strict=True):
        assert loudest(wave) == pytest.approx(frequency, rel=0.06)  # a bin of the mel scale
    # Away from both ends, where the window sees other samples.
    wanted, heard = (mel(x)[:, 8 : FRAMES - 8] for x in (waves, found))
    loud = wanted > wanted.amax((1, 2), keepdim=True) - 1
    assert (heard - wanted)[loud].abs().max() < 0.5


def test_the_spectrum_has_the_mel_frames() -> None:
    frames = mel(tone(700.0))[None]
    vocoder = GriffinLim()
    found = vocoder.spectrum(frames)[..., :-1]
    assert (found >= 0).all()
    torch.testing.assert_close(vocoder.filters @ found, frames.exp().mT, rtol=0.1, atol=0.05)


def test_the_same_frames_sound_the_same_beside_others() -> None:
    frames = torch.stack([mel(tone(440.0)), mel(tone(900.0))])
    vocoder = GriffinLim(iterations=4)
    torch.testing.assert_close(vocoder(frames)[1:], vocoder(frames[1:]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_sounds_as_in_full(tmp_path: Path, dtype: torch.dtype) -> None:
    frames = mel(tone(700.0))[None]
    vocoder = GriffinLim(iterations=4)
    vocoder.save_pretrained(tmp_path)
    half = GriffinLim.from_pretrained(tmp_path, torch_dtype=dtype)
    assert half.filters.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):  # as beside a denoiser that trains
        found = half(frames)
    torch.testing.assert_close(found, vocoder(frames))
    assert half(frames.to(dtype)).isfinite().all()


def test_it_is_saved_and_loaded_as_a_model_of_diffusers(tmp_path: Path) -> None:
    vocoder = GriffinLim(sampling_rate=8000, upsample_rates=[8, 8], model_in_dim=16, window=256)
    vocoder.save_pretrained(tmp_path)
    again = GriffinLim.from_pretrained(tmp_path)
    assert again.hop == 64
    torch.testing.assert_close(again.filters, vocoder.filters)

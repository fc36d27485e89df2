"""Target processors of sound, against slow references."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers.audio_utils import mel_filter_bank

from mmfusion.models.generators.sounds import ClipProcessor, MelProcessor, log_mel
from mmfusion.types import DataError, Media

RATE, HOP, FRAMES, BINS, WINDOW = 4000, 64, 16, 8, 128


@pytest.fixture
def mels() -> MelProcessor:
    return MelProcessor(RATE, HOP, FRAMES, BINS, WINDOW)


def wav(samples: np.ndarray, rate: int = RATE, **span: float) -> Media:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return Media("audio", file.getvalue(), "wav", **span)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


def slow_mel(wave: np.ndarray) -> np.ndarray:
    """AudioLDM's audio/stft.py, frame by frame, in float64."""
    wave = np.pad(wave.astype(np.float64), WINDOW // 2, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    filters = mel_filter_bank(
        WINDOW // 2 + 1, BINS, 0, RATE / 2, RATE, norm="slaney", mel_scale="slaney"
    )
    starts = range(0, len(wave) - WINDOW + 1, HOP)
    frames = [np.abs(np.fft.rfft(wave[i : i + WINDOW] * hann)) @ filters for i in starts]
    return np.log(np.maximum(frames, 1e-5))


def test_mel_frames_are_those_of_the_slow_reference() -> None:
    wave = noise(FRAMES * HOP)
    found = log_mel(torch.from_numpy(wave), RATE, HOP, BINS, WINDOW)
    assert found.shape == (FRAMES + 1, BINS)
    np.testing.assert_allclose(found, slow_mel(wave), atol=2e-4)


def test_a_tone_is_loudest_in_its_own_bin() -> None:
    edges = np.linspace(0, 2595 * np.log10(1 + 2000 / 700), BINS + 2)  # about the filters' centres
    tone = np.sin(2 * np.pi * 1000 * np.arange(FRAMES * HOP) / RATE).astype(np.float32)
    loudest = log_mel(torch.from_numpy(tone), RATE, HOP, BINS, WINDOW).mean(0).argmax()
    expected = np.abs(700 * (10 ** (edges[1:-1] / 2595) - 1) - 1000).argmin()
    assert abs(int(loudest) - int(expected)) <= 1


def test_clips_are_cut_padded_and_brought_to_one_loudness(mels: MelProcessor) -> None:
    wave = noise(2 * FRAMES * HOP)
    cut = wave[: FRAMES * HOP]
    cut = cut - cut.mean()
    found = mels(wav(wave))["mel"]
    assert found.shape == (FRAMES, BINS)
    np.testing.assert_allclose(found, slow_mel(cut * 0.5 / np.abs(cut).max())[:FRAMES], atol=2e-3)
    torch.testing.assert_close(mels(wav(0.3 * wave))["mel"], found, atol=1e-3, rtol=0)
    short = mels(wav(wave[: 4 * HOP]))["mel"]
    torch.testing.assert_close(short[7:], mels.idle()["mel"][7:])  # silence
    assert short[:3].mean() > -6


def test_a_span_is_a_clip_of_its_own(mels: MelProcessor) -> None:
    wave = noise(3 * FRAMES * HOP)
    begin = FRAMES * HOP
    span = {"start": begin / RATE, "end": (begin + 4 * HOP) / RATE}
    alone = mels(wav(wave[begin : begin + 4 * HOP]))["mel"]
    torch.testing.assert_close(mels(wav(wave, **span))["mel"], alone, atol=1e-3, rtol=0)


def test_clips_of_samples_are_padded_with_silence() -> None:
    processor = ClipProcessor(RATE, 100)
    wave = noise(60)
    found = processor(wav(wave))["samples"]
    assert found.shape == processor.idle()["samples"].shape == (100,)
    np.testing.assert_allclose(found[:60], wave, atol=1e-6)
    assert not found[60:].any()


@pytest.mark.parametrize("level", [1e-6, 0.2])
def test_a_clip_without_a_sound_is_a_data_error(mels: MelProcessor, level: float) -> None:
    constant = np.full(FRAMES * HOP, level, np.float32)
    with pytest.raises(DataError, match="its peak is") as error:
        mels(wav(constant))
    assert error.value.reason == "silent_audio"


def test_silence_before_the_end_of_the_clip_counts_alone(mels: MelProcessor) -> None:
    late = np.concatenate([np.zeros(FRAMES * HOP, np.float32), noise(FRAMES * HOP)])
    with pytest.raises(DataError, match="zero") as error:
        mels(wav(late))
    assert error.value.reason == "silent_audio"


def test_a_real_recording_of_another_rate_and_codec_is_read(
    mels: MelProcessor, assets: Path
) -> None:
    data = (assets / "speech" / "apple.ogg").read_bytes()
    found = mels(Media("audio", data, "ogg"))["mel"]
    assert found.shape == (FRAMES, BINS)
    assert found.std() > 0.5

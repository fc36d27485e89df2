from __future__ import annotations

import io

import av
import numpy as np
import pytest
import soundfile
import soxr

from mmfusion.processing.audios import audio_seconds, decode_audio
from mmfusion.types import DataError

SOUNDFILE = {"wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS", "mp3": "MPEG_LAYER_III"}
CONTAINERS = {"mp4": "aac", "adts": "aac", "webm": "libopus", "matroska": "aac", "mpegts": "aac"}
PCM_64 = {"w64": "pcm_s64le", "wav": "pcm_s64le", "nut": "pcm_s64be"}


def chirp(rate: int = 16000, seconds: float = 2.0) -> np.ndarray:
    """A tone that rises, so that no two spans sound alike."""
    t = np.arange(round(rate * seconds)) / rate
    return (0.5 * np.sin(2 * np.pi * (200 + 300 * t) * t)).astype(np.float32)


def written(
    samples: np.ndarray, rate: int = 16000, format: str = "wav", subtype: str = ""
) -> bytes:
    file = io.BytesIO()
    subtype = subtype or SOUNDFILE[format]
    soundfile.write(file, samples, rate, format=format.upper(), subtype=subtype)
    return file.getvalue()


def muxed(samples: np.ndarray, rate: int, format: str, codec: str = "") -> bytes:
    """The samples in a container that soundfile cannot read."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec or CONTAINERS[format], rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        resampler = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=rate)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return file.getvalue()


def reason(data: bytes, format: str = "wav", **options: float) -> str:
    with pytest.raises(DataError) as error:
        decode_audio(data, format, 16000, **options)
    return error.value.reason


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


@pytest.mark.parametrize("format", SOUNDFILE)
def test_same_rate_gives_the_samples(format: str) -> None:
    decoded = decode_audio(written(chirp(), format=format), format, 16000).numpy()
    assert decoded.dtype == np.float32
    assert decoded.shape == (32000,)
    if format in ("wav", "flac"):
        assert np.abs(decoded - chirp()).max() < 1e-4
    else:
        assert correlation(decoded, chirp()) > 0.99


@pytest.mark.parametrize("format", CONTAINERS)
def test_containers_that_soundfile_cannot_read(format: str) -> None:
    data = muxed(chirp(48000), 48000, format)
    with pytest.raises(soundfile.SoundFileError):
        soundfile.info(io.BytesIO(data))
    decoded = decode_audio(data, format, 48000).numpy()
    assert len(decoded) == round(audio_seconds(data) * 48000)
    assert abs(len(decoded) / 48000 - 2.0) < 0.06
    shifts = range(0, 2400, 8)
    best = max(correlation(decoded[s : s + 9000], chirp(48000)[:9000]) for s in shifts)
    assert best > 0.99


@pytest.mark.parametrize("format", PCM_64)
def test_integers_of_64_bits_give_the_samples(format: str) -> None:
    data = muxed(chirp(), 16000, format, PCM_64[format])
    np.testing.assert_allclose(decode_audio(data, format, 16000).numpy(), chirp(), atol=1e-6)


@pytest.mark.parametrize("format", [*SOUNDFILE, *CONTAINERS])
def test_span_is_that_part_of_the_whole(format: str) -> None:
    rate = 48000
    data = (
        written(chirp(rate), rate, format)
        if format in SOUNDFILE
        else muxed(chirp(rate), rate, format)
    )
    whole = decode_audio(data, format, rate).numpy()
    span = decode_audio(data, format, rate, start=1.0, end=1.5).numpy()
    assert len(span) == rate // 2
    assert audio_seconds(data, format, 1.0, 1.5) == pytest.approx(0.5)
    # Some containers keep times in milliseconds.
    shifts = range(-48, 49, 8) if format in ("webm", "matroska") else [0]
    assert max(correlation(span, whole[rate + s :][: rate // 2]) for s in shifts) > 0.999


def test_resampling_is_high_quality_soxr() -> None:
    decoded = decode_audio(written(chirp(44100), 44100, "flac"), "flac", 16000).numpy()
    expected = soxr.resample(chirp(44100), 44100, 16000, quality="HQ")
    assert len(decoded) == 32000
    assert np.abs(decoded - expected[:32000]).max() < 1e-3


@pytest.mark.parametrize(("channels", "rate"), [(2, 44100), (8, 192000), (1, 8000)])
def test_channels_are_averaged_at_any_rate(channels: int, rate: int) -> None:
    gains = np.arange(1, channels + 1) / channels
    data = written(chirp(rate)[:, None] * gains, rate, "wav")
    decoded = decode_audio(data, "wav", 16000).numpy()
    expected = soxr.resample(chirp(rate) * gains.mean(), rate, 16000, quality="HQ")
    assert np.abs(decoded - expected[: len(decoded)]).max() < 1e-3


def test_empty_silent_and_not_finite_audio_have_their_own_reasons() -> None:
    assert reason(written(chirp()[:0])) == "empty_audio"
    assert reason(written(np.zeros(16000, np.float32))) == "silent_audio"
    broken = chirp()
    broken[100] = np.nan
    assert reason(written(broken, subtype="FLOAT")) == "corrupt_audio"


def test_channels_whose_mean_is_not_finite_are_corrupt() -> None:
    loud = np.full((1600, 2), 3e38, np.float32)
    assert reason(written(loud, subtype="FLOAT")) == "corrupt_audio"


def test_a_header_that_lies_allocates_nothing() -> None:
    data = bytearray(written(np.random.default_rng(0).normal(0, 0.1, (1000, 8)), 48000, "flac"))
    # STREAMINFO: 20 bits of rate, 3 of channels - 1, 5 of bits - 1, 36 of frames
    fields = int.from_bytes(data[18:26], "big")
    fields = (655_350 << 44) | (fields & ((1 << 44) - (1 << 36))) | (655_350 * 3599)
    data[18:26] = fields.to_bytes(8, "big")
    assert reason(bytes(data), "flac") == "too_large_audio"


def test_span_outside_the_file() -> None:
    data = written(chirp())
    assert reason(data, start=3.0) == "empty_audio"
    assert reason(data, start=1.0, end=1.0) == "bad_span"
    assert reason(data, start=-1.0) == "bad_span"
    assert reason(data, start=float("nan")) == "bad_span"
    assert len(decode_audio(data, "wav", 16000, start=1.5, end=9.0)) == 8000


@pytest.mark.parametrize("format", [*SOUNDFILE, "mp4"])
def test_damaged_file_is_corrupt(format: str) -> None:
    data = written(chirp(), format=format) if format in SOUNDFILE else muxed(chirp(), 16000, format)
    for part in (b"", data[:30], b"\0" * 500):
        assert reason(part, format) == "corrupt_audio"
    if format != "wav":  # libsndfile takes half a WAV for a shorter one
        assert reason(data[: len(data) // 2], format) == "corrupt_audio"


def test_header_that_promises_an_hour_is_refused_before_decoding() -> None:
    assert reason(written(chirp()), max_seconds=1.9) == "too_long_audio"
    assert len(decode_audio(written(chirp()), "wav", 16000, end=1.0, max_seconds=1.9)) == 16000


def test_video_without_sound_says_so() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        container.mux(stream.encode(None))
    assert reason(file.getvalue(), "mp4") == "no_audio_stream"


@pytest.mark.parametrize("format", [*SOUNDFILE, "mp4", "webm"])
def test_damage_gives_sound_or_a_data_error(format: str) -> None:
    rng = np.random.default_rng(0)
    sound = chirp(seconds=0.3)
    data = written(sound, format=format) if format in SOUNDFILE else muxed(sound, 48000, format)
    for _ in range(40):
        broken = np.frombuffer(data, np.uint8).copy()
        broken[rng.integers(0, min(len(data), 600), 5)] = rng.integers(0, 256, 5)
        try:
            assert decode_audio(broken.tobytes(), format, 16000, max_seconds=60).isfinite().all()
        except DataError as error:
            assert error.reason.endswith(("audio", "audio_stream"))  # noqa: PT017

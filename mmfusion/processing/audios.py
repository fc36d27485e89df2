"""Sound: from file bytes to mono float32 at the rate an encoder wants, and from samples to a file.

soundfile reads WAV, FLAC, OGG and MP3 and seeks to a span; PyAV reads what it cannot (AAC, M4A, the
sound of a video file). soxr resamples, at its high quality. Lengths are checked on the header,
before anything is decoded.
"""

from __future__ import annotations

import io
import math
from typing import Any

import av
import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from mmfusion.processing.containers import DAMAGE, open_container, start_seconds
from mmfusion.types import DataError, Media

MAX_SECONDS = 3600.0
"""Seconds of sound above which a file, or a span of it, is refused."""

MAX_VALUES = 2**28
"""Samples of all channels together above which it is refused: 1 GiB."""

MAX_CHANNELS = 64
MAX_RATE = 768_000

RUN_UP_SECONDS = 0.5
"""Decoded before a span and thrown away: a codec needs some packets before it is exact again."""

MAX_MISSING_SECONDS, MAX_MISSING_SHARE = 0.1, 0.02
"""How much shorter than its header's promise a sound may decode (codecs pad) before it counts as
truncated."""

Array = np.ndarray[Any, Any]


def decode_audio(
    data: bytes,
    format: str,
    rate: int,
    start: float | None = None,
    end: float | None = None,
    max_seconds: float = MAX_SECONDS,
) -> Tensor:
    """Decode a sound file, or a span of it, as one channel.

    Args:
        data: the file.
        format: its extension, for messages; the format itself is read from the data.
        rate: samples a second of the result.
        start: seconds; None is the file's start.
        end: seconds; None is the file's end.
        max_seconds: limit on the length decoded.

    Returns:
        (round(audio_seconds(...) * rate),) float32, the mean of the channels. A codec's padding at
        the end is cut or filled to that length.

    Raises:
        DataError: ``corrupt_audio``, ``empty_audio`` (no sample), ``silent_audio`` (every sample is
            zero), ``too_long_audio``, ``too_large_audio``, ``no_audio_stream``,
            ``bad_span``.
    """
    seconds = audio_seconds(data, format, start, end, max_seconds)
    if _soundfile_seconds(data) is None:
        channels, file_rate = _read_pyav(data, format, start or 0.0, seconds)
    else:
        channels, file_rate = _read_soundfile(data, format, start or 0.0, seconds)
    if not channels.any():
        raise DataError(
            "silent_audio",
            f"all {len(channels)} samples of the {format} audio {_span(start, end)} are zero.",
        )
    mono = channels.mean(axis=1, dtype=np.float32)
    if file_rate != rate:
        mono = soxr.resample(mono, file_rate, rate, quality="HQ")
    if not np.isfinite(mono).all():
        raise DataError("corrupt_audio", f"the {format} audio holds NaN or infinite samples.")
    return torch.from_numpy(_fit(mono, round(seconds * rate), rate, format))


def audio_seconds(
    data: bytes,
    format: str = "",
    start: float | None = None,
    end: float | None = None,
    max_seconds: float = MAX_SECONDS,
) -> float:
    """Length of the sound, or of a span of it, from the header (packets are counted, not decoded,
    for the containers that PyAV reads).

    Raises:
        DataError: ``corrupt_audio``, ``empty_audio``, ``too_long_audio``, ``no_audio_stream``,
            ``bad_span``.
    """
    check_span(start, end)
    total = _soundfile_seconds(data)
    if total is None:
        total = _pyav_seconds(data, format)
    seconds = (total if end is None else min(end, total)) - (start or 0.0)
    if seconds * 1000 < 1:
        raise DataError(
            "empty_audio",
            f"the {format} audio of {total:.3f} s has less than a millisecond {_span(start, end)}.",
        )
    if seconds > max_seconds:
        raise DataError(
            "too_long_audio",
            f"the audio lasts {seconds:.1f} s; at most {max_seconds:.0f} s are decoded. Cut it, "
            "give a span, or raise the limit.",
        )
    return seconds


def as_wav(samples: Array, rate: int, caption: str | None = None) -> Media:
    """Samples in [-1, 1] as a 16 bit WAV file; what is louder is clipped.

    Args:
        samples: (T,) or (T, channels) float32.
        rate: samples a second.
        caption: what is heard, in words.
    """
    file = io.BytesIO()
    soundfile.write(file, samples.clip(-1, 1), rate, format="WAV", subtype="PCM_16")
    return Media("audio", file.getvalue(), "wav", caption=caption)


def check_span(start: float | None, end: float | None) -> None:
    """Refuse a span that starts before 0 or ends before it starts."""
    first = 0.0 if start is None else start
    last = math.inf if end is None else end
    if not 0 <= first < last:
        raise DataError("bad_span", f"got the span {_span(start, end)}; expected 0 <= start < end.")


def _soundfile_seconds(data: bytes) -> float | None:
    """Length by soundfile; None for what it cannot open, or where the header does not say."""
    try:
        info = soundfile.info(io.BytesIO(data))
    except soundfile.SoundFileError:
        return None
    _check_layout(info.channels, info.samplerate)
    return info.frames / info.samplerate if info.frames < 2**60 else None


def _pyav_seconds(data: bytes, format: str) -> float:
    """Length by the packets' times: headers of such containers often guess."""
    try:
        with open_container(data) as container:
            stream = _sound_stream(container, format)
            ends = [
                float((packet.pts + (packet.duration or 0)) * packet.time_base)
                for packet in container.demux(stream)
                if packet.pts is not None
            ]
            return max(ends, default=0.0) - start_seconds(stream)
    except DAMAGE as error:
        raise _corrupt(format, error) from error


def _read_soundfile(data: bytes, format: str, start: float, seconds: float) -> tuple[Array, int]:
    """(frames, channels) of the span, and its rate."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            first, count = round(start * file.samplerate), round(seconds * file.samplerate)
            # libsndfile lands beside the place in MP3s (also between two reads): one read from 0.
            run_up = first if file.format == "MP3" else round(RUN_UP_SECONDS * file.samplerate)
            skip = max(first - run_up, 0)
            _check_size(first - skip + count, file.channels)
            if skip:
                file.seek(min(skip, file.frames))
            channels = file.read(first - skip + count, dtype="float32", always_2d=True)
            return channels[first - skip :], file.samplerate
    except soundfile.SoundFileError as error:
        raise _corrupt(format, error) from error


def _read_pyav(data: bytes, format: str, start: float, seconds: float) -> tuple[Array, int]:
    """(frames, channels) of the span, and its rate."""
    pieces: list[Array] = []
    try:
        with open_container(data) as container:
            stream = _sound_stream(container, format)
            _check_layout(stream.channels, stream.rate)
            rate, origin = stream.rate, start_seconds(stream)
            _check_size(round(seconds * rate), stream.channels)
            if start:
                run_up = max(start - RUN_UP_SECONDS, 0.0) + origin
                container.seek(int(run_up / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.sample_rate != rate or frame.time is None:
                    raise _corrupt(format, "its rate changes, or a frame has no time")
                offset = round((frame.time - origin - start) * rate)
                if offset >= round(seconds * rate):
                    break
                pieces.append(_to_float(frame)[max(-offset, 0) :])
    except DAMAGE as error:
        raise _corrupt(format, error) from error
    if not pieces:
        raise _corrupt(format, "no frame decodes")
    if len({piece.shape[1] for piece in pieces}) > 1:
        raise _corrupt(format, "the number of channels changes")
    return np.concatenate(pieces), rate


def _check_size(frames: int, channels: int) -> None:
    """Refuse what would take too much memory, whatever its header says."""
    if frames * channels > MAX_VALUES:
        raise DataError(
            "too_large_audio",
            f"the audio has {frames} frames of {channels} channels; at most {MAX_VALUES} values "
            "are decoded. Lower its rate, or give a span.",
        )


def _to_float(frame: Any) -> Array:
    """(frames, channels) float32 in [-1, 1] of a decoded frame."""
    if frame.format.name.startswith("s64"):  # which NumPy's view of a frame lacks
        (frame,) = av.AudioResampler(format="dblp").resample(frame)
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, len(frame.layout.channels)).T
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128) / 128
    elif samples.dtype.kind == "i":
        samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    return samples.T.astype(np.float32)


def _fit(mono: Array, length: int, rate: int, format: str) -> Array:
    """Cut or zero-fill to the length that the header promised, if it nearly has it."""
    missing = length - len(mono)
    if missing > max(MAX_MISSING_SECONDS * rate, MAX_MISSING_SHARE * length):
        raise _corrupt(format, f"{len(mono)} samples where its header promises {length}")
    fitted = np.zeros(length, dtype=np.float32)
    fitted[: len(mono)] = mono[:length]
    return fitted


def _sound_stream(container: Any, format: str) -> Any:
    if not container.streams.audio:
        raise DataError("no_audio_stream", f"the {format} file holds no sound.")
    stream = container.streams.audio[0]
    if stream.codec_context is None:
        raise _corrupt(format, "no decoder for it")
    return stream


def _check_layout(channels: int, rate: int) -> None:
    if not (0 < channels <= MAX_CHANNELS and 0 < rate <= MAX_RATE):
        raise DataError(
            "corrupt_audio",
            f"the audio has {channels} channels at {rate} Hz; expected at most {MAX_CHANNELS} "
            f"channels and {MAX_RATE} Hz.",
        )


def _corrupt(format: str, error: BaseException | str) -> DataError:
    return DataError("corrupt_audio", f"the {format} audio does not decode ({error}).")


def _span(start: float | None, end: float | None) -> str:
    return f"from {start or 0} s to {'its end' if end is None else f'{end} s'}"

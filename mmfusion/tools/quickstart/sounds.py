"""Short, clearly different sounds, played from the recordings in a SoundFont.

A SoundFont 2 file (the RIFF format of Creative's specification 2.04) holds one array of 16-bit
recordings and, for each, where it begins and ends and which part of it repeats. A sound here is a
recording at another pitch, its repeated part repeated, faded out: a sampler of one note.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from mmfusion.tools.quickstart.concepts import fraction

RATE, SECONDS = 16000, 0.96
SEMITONES = 4.0
"""The furthest a recording is moved from its own pitch."""
_HEADER = struct.Struct("<20sIIIIIBbHH")


@dataclass(frozen=True)
class Kind:
    """A kind of sound.

    Attributes:
        recordings: how the names of its recordings begin.
        fade: seconds in which it falls to 1/e; 0: it goes on.
    """

    recordings: tuple[str, ...]
    fade: float = 0.0


KINDS = {
    "a trumpet": Kind(("Trump",)),
    "a bird": Kind(("Bird",)),
    "ocean waves": Kind(("OceanWaves",)),
    "a helicopter": Kind(("Helicopter",)),
    "a telephone": Kind(("Telephone",)),
    "a bell": Kind(("TubeBell",), 0.7),
    "a cymbal": Kind(("Med Crash Cymbal", "ChinaCrashCymb", "Ride Ping"), 0.4),
    "a drum": Kind(("Taiko", "Timp", "Acoustic Tom"), 0.15),
}
"""What can be heard, by its name in captions."""


@dataclass(frozen=True)
class Recording:
    """One recording. ``loop`` is the part that repeats, in samples from its start."""

    name: str
    samples: np.ndarray
    loop: tuple[int, int]
    rate: int


def read_recordings(file: Path) -> list[Recording]:
    """All recordings of a SoundFont.

    Raises:
        ValueError: for a file that is none.
    """
    data = file.read_bytes()
    if data[:4] != b"RIFF" or data[8:12] != b"sfbk":
        raise ValueError(f"{file} is no SoundFont 2 file.")
    chunks = dict(_chunks(data, 12, len(data)))
    pcm = np.frombuffer(chunks[b"smpl"], "<i2")
    headers = chunks[b"shdr"]
    found = []
    for at in range(0, len(headers) - _HEADER.size, _HEADER.size):  # the last one is a mark
        name, start, end, first, last, rate, *_ = _HEADER.unpack_from(headers, at)
        text = name.split(b"\0")[0].decode("latin-1")
        found.append(Recording(text, pcm[start:end], (first - start, last - start), rate))
    return found


def _chunks(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of a RIFF file, those within lists as well."""
    while start + 8 <= end:
        name, (size,) = data[start : start + 4], struct.unpack_from("<I", data, start + 4)
        if name == b"LIST":
            yield from _chunks(data, start + 12, start + 8 + size)
        else:
            yield name, data[start + 8 : start + 8 + size]
        start += 8 + size + size % 2


def play(recording: Recording, semitones: float, fade: float, level: float) -> np.ndarray:
    """(RATE * SECONDS,) float32: the recording at another pitch.

    Args:
        recording: what is played.
        semitones: above its own pitch.
        fade: seconds in which it falls to 1/e; 0: it goes on.
        level: its largest value.
    """
    seconds = np.arange(round(RATE * SECONDS)) / RATE
    places = seconds * recording.rate * 2 ** (semitones / 12)
    first, last = recording.loop
    looped = first + np.mod(places - first, max(1, last - first))
    places = np.where(places < last, places, looped)
    samples = np.interp(places, np.arange(len(recording.samples)), recording.samples)
    if fade:
        samples = samples * np.exp(-np.maximum(seconds - 0.05, 0) / fade)
    samples = samples * np.minimum(1, (SECONDS - seconds) / 0.05)  # an end without a click
    return (samples * (level / np.abs(samples).max())).astype(np.float32)


def sounds(file: Path, per_kind: int, split: str) -> Iterator[tuple[str, str, bytes]]:
    """(key, what it is, FLAC file) of ``per_kind`` sounds of each of ``KINDS``, each with its own
    recording, pitch, fade and level.
    """
    recordings = read_recordings(file)
    for name, kind in KINDS.items():
        chosen = [r for r in recordings if r.name.startswith(kind.recordings)]
        for number in range(per_kind):
            key = f"{split}-{name.replace(' ', '-')}-{number:04d}"
            recording = chosen[int(fraction(f"recording of {key}") * len(chosen))]
            semitones = SEMITONES * (2 * fraction(f"pitch of {key}") - 1)
            fade = kind.fade * (0.7 + 0.7 * fraction(f"fade of {key}"))
            samples = play(recording, semitones, fade, 0.4 + 0.4 * fraction(f"level of {key}"))
            buffer = io.BytesIO()
            soundfile.write(buffer, samples, RATE, format="FLAC")
            yield key, name, buffer.getvalue()

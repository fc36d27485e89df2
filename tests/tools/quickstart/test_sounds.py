"""A SoundFont written by the test, played back."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mmfusion.tools.quickstart.sounds import (
    KINDS,
    RATE,
    SECONDS,
    Recording,
    play,
    read_recordings,
    sounds,
)

FREQUENCY = 504.0
"""A whole number of waves fits into the part that repeats."""


def chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def soundfont(file: Path, names: list[str], rate: int = 8000) -> Path:
    """Each recording is 0.25 s of a sine; its last half repeats."""
    count = rate // 4
    sine = (np.sin(2 * np.pi * FREQUENCY * np.arange(count) / rate) * 20000).astype("<i2")
    headers = b""
    for i, name in enumerate([*names, "EOS"]):
        start = i * count
        places = (start, start + count, start + count // 2, start + count, rate)
        headers += struct.pack("<20sIIIIIBbHH", name.encode(), *places, 60, 0, 0, 1)
    samples = np.tile(sine, len(names)).tobytes()
    lists = chunk(b"LIST", b"sdta" + chunk(b"smpl", samples))
    lists += chunk(b"LIST", b"pdta" + chunk(b"odd ", b"x") + chunk(b"shdr", headers))
    file.write_bytes(chunk(b"RIFF", b"sfbk" + lists))
    return file


def loudest(samples: np.ndarray) -> float:
    """Frequency, in Hz."""
    return float(np.abs(np.fft.rfft(samples)).argmax()) * RATE / len(samples)


def test_recordings_are_read_with_names_loops_and_rates(tmp_path: Path) -> None:
    found = read_recordings(soundfont(tmp_path / "a.sf2", ["Flute A", "Bird"]))
    assert [r.name for r in found] == ["Flute A", "Bird"]
    assert {(len(r.samples), r.loop, r.rate) for r in found} == {(2000, (1000, 2000), 8000)}


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.sf2").write_bytes(b"RIFF\0\0\0\0WAVE")
    with pytest.raises(ValueError, match=r"a\.sf2 is no SoundFont 2 file"):
        read_recordings(tmp_path / "a.sf2")


@pytest.mark.parametrize("semitones", [0.0, 12.0, -5.0])
def test_pitch_follows_the_semitones_beyond_the_end_of_the_recording(
    tmp_path: Path, semitones: float
) -> None:
    (recording,) = read_recordings(soundfont(tmp_path / "a.sf2", ["Flute"]))
    samples = play(recording, semitones, fade=0.0, level=0.5)
    assert len(samples) == round(RATE * SECONDS)
    assert np.abs(samples).max() == pytest.approx(0.5)
    assert loudest(samples) == pytest.approx(FREQUENCY * 2 ** (semitones / 12), abs=4)
    middle, late = np.abs(samples[4000:6000]).max(), np.abs(samples[12000:14000]).max()
    assert late == pytest.approx(middle, rel=0.1)


def test_what_fades_falls_to_1_over_e() -> None:
    recording = Recording("x", np.ones(100, "<i2"), (0, 100), RATE)
    samples = play(recording, 0.0, fade=0.2, level=1.0)
    assert samples[round(0.45 * RATE)] / samples[round(0.25 * RATE)] == pytest.approx(
        np.exp(-1), rel=0.01
    )


def test_every_kind_has_its_sounds_and_the_sides_share_none(tmp_path: Path) -> None:
    names = [kind.recordings[0] for kind in KINDS.values()]
    file = soundfont(tmp_path / "a.sf2", names)
    train, val = (list(sounds(file, 2, side)) for side in ("train", "val"))
    assert [name for _, name, _ in train] == [name for name in KINDS for _ in range(2)]
    assert len({data for _, _, data in [*train, *val]}) == len(train) + len(val)
    assert list(sounds(file, 2, "train")) == train
    samples, rate = soundfile.read(io.BytesIO(train[0][2]))
    assert (rate, len(samples)) == (RATE, round(RATE * SECONDS))

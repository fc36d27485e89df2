"""A real voice, loaded by the real code."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mmfusion.models.speakers.piper import Piper, sentences_of
from mmfusion.types import Media

TEXT = "The cat sat on the mat. Is it black?"


def heard(media: Media | None) -> tuple[np.ndarray, int]:
    assert media is not None
    return soundfile.read(io.BytesIO(media.data), dtype="float32")


@pytest.fixture(scope="module")
def calm(voice: Path) -> Piper:
    return Piper(str(voice), variation=0.0)


def test_a_text_becomes_sound_of_the_length_and_loudness_of_speech(calm: Piper) -> None:
    said = calm.say(TEXT)
    assert said is not None
    assert (said.modality, said.format, said.caption) == ("audio", "wav", TEXT)
    sound, rate = heard(said)
    assert rate == 22_050
    assert 1.5 < len(sound) / rate < 5  # nine words
    assert 0.02 < np.sqrt((sound**2).mean()) < 0.3
    assert np.abs(sound).max() <= 1
    quarters = [np.abs(part).mean() for part in np.array_split(sound, 4)]
    assert min(quarters) > 0.005  # it talks all the time


def test_other_words_are_another_sound_and_more_words_a_longer_one(calm: Piper) -> None:
    short, long = heard(calm.say("A cat."))[0], heard(calm.say("A cat and seventeen dogs."))[0]
    other = heard(calm.say("A dog."))[0]
    assert len(long) > 1.5 * len(short)
    length = min(len(short), len(other))
    assert np.abs(short[:length] - other[:length]).mean() > 0.01


def test_without_variation_a_text_always_sounds_the_same(calm: Piper) -> None:
    assert calm.say("A cat.", 1) == calm.say("A cat.", 2)


def test_speed_divides_the_length(calm: Piper, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = heard(calm.say("One, two, three, four."))[0]
    monkeypatch.setattr(calm, "speed", 2.0)
    fast = heard(calm.say("One, two, three, four."))[0]
    assert 1.6 < len(usual) / len(fast) < 2.4


@pytest.mark.slow
def test_two_readings_differ_by_their_seed_alone(voice: Path) -> None:
    piper = Piper(str(voice))
    first, again, other = (piper.say("A cat.", seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_punctuation_reaches_the_voice(calm: Piper) -> None:
    marks = {calm.config["phoneme_id_map"][mark][0] for mark in ",?"}
    (sentence,) = sentences_of("Well, is it?")
    assert marks < set(calm.ids(sentence))
    question, statement = (calm.ids(sentences_of(f"It is{mark}")[0]) for mark in "?.")
    assert question[:-3] == statement[:-3]
    assert question != statement


def test_ids_lie_between_start_and_end_with_pads(calm: Piper) -> None:
    ids = calm.ids(sentences_of("a")[0])
    start, end, pad = (calm.config["phoneme_id_map"][mark][0] for mark in "^$_")
    assert ids[0] == start
    assert ids[-1] == end
    assert set(ids[1:-1:2]) == {pad}


@pytest.mark.parametrize("text", ["", " \n ", "...", "\U0001f600"])
def test_what_cannot_be_said_is_no_sound(calm: Piper, text: str) -> None:
    if text == "\U0001f600":  # espeak-ng knows its name
        assert calm.say(text) is not None
    else:
        assert calm.say(text) is None


def test_sounds_the_voice_lacks_are_left_out_and_named(
    voice: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lacking = copy_of(voice, tmp_path)
    config = json.loads((tmp_path / "voice.onnx.json").read_text())
    del config["phoneme_id_map"]["æ"]
    (tmp_path / "voice.onnx.json").write_text(json.dumps(config))
    piper = Piper(str(lacking))
    (cat,) = sentences_of("cat")
    assert len(Piper(str(voice)).ids(cat)) == len(piper.ids(cat)) + 2  # and its pad
    assert "['æ']" in caplog.text


def test_clauses_keep_their_marks_and_numbers_stay_whole() -> None:
    assert sentences_of("Hello, you! 3.5 is it?\nno mark") == [
        [("Hello", ","), ("you", "!")],
        [("3.5 is it", "?")],
        [("no mark", "")],
    ]
    assert sentences_of('He said "Go." Then...') == [[('He said "Go', ".")], [("Then", ".")]]


def copy_of(voice: Path, folder: Path) -> Path:
    (folder / "voice.onnx").symlink_to(voice)
    shutil.copy(f"{voice}.json", folder / "voice.onnx.json")
    return folder / "voice.onnx"


def tiny_voice(folder: Path, **changes: object) -> Path:
    """A configuration beside a file that is no model."""
    config = {
        "audio": {"sample_rate": 22_050},
        "espeak": {"voice": "en-us"},
        "inference": {"noise_scale": 0.667, "length_scale": 1, "noise_w": 0.8},
        "phoneme_id_map": {"_": [0], "^": [1], "$": [2], "e": [3]},
        **changes,
    }
    (folder / "voice.onnx").write_bytes(b"no model")
    (folder / "voice.onnx.json").write_text(json.dumps(config))
    return folder / "voice.onnx"


def test_voices_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.onnx; give the"):
        Piper(str(tmp_path / "absent.onnx"))
    path = tiny_voice(tmp_path, phoneme_type="text")
    with pytest.raises(ValueError, match="phonemes of type 'text'"):
        Piper(str(path))
    tiny_voice(tmp_path, espeak={"voice": "../x"})
    with pytest.raises(ValueError, match=r"language '\.\./x'"):
        Piper(str(path))
    tiny_voice(tmp_path, num_speakers=2)
    with pytest.raises(ValueError, match=r"speaker is 2, but .* has 2, counted from 0"):
        Piper(str(path), speaker=2)
    with pytest.raises(ValueError, match="speed is 0"):
        Piper(str(path), speed=0)
    with pytest.raises(ValueError, match="variation -1"):
        Piper(str(path), variation=-1)
    (tmp_path / "voice.onnx.json").write_text('{"audio": {}}')
    with pytest.raises(ValueError, match=r"lacks \['espeak', 'inference', 'phoneme_id_map'\]"):
        Piper(str(path))
    (tmp_path / "voice.onnx.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*voice\.onnx\.json"):
        Piper(str(path))


@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="espeak-ng is not installed")
def test_a_file_that_is_no_voice_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match="is no voice that can be read"):
        Piper(str(tiny_voice(tmp_path))).say("a")


def test_without_espeak_the_message_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt-get install espeak-ng"):
        Piper(str(tiny_voice(tmp_path))).say("a")


@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="espeak-ng is not installed")
def test_without_onnxruntime_the_message_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"mmfusion\[speech\]"):
        Piper(str(tiny_voice(tmp_path))).say("a")


@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="espeak-ng is not installed")
def test_a_language_that_espeak_lacks_is_named(tmp_path: Path) -> None:
    path = tiny_voice(tmp_path, espeak={"voice": "zz-zz"})
    with pytest.raises(ValueError, match="espeak-ng fails on 'a'"):
        Piper(str(path)).say("a")

"""A stage that learns to speak, through the command, and its answers said aloud."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import mmfusion
from mmfusion.cli import main
from mmfusion.data.validation import spread
from mmfusion.inference import Chat
from mmfusion.models.generation import split_speech
from mmfusion.models.generators.base import Sampling
from mmfusion.models.speakers.base import Speaker
from mmfusion.models.speakers.piper import Piper
from mmfusion.processing.audios import as_wav
from mmfusion.tools.chat import Session
from mmfusion.training.callbacks.validation import Validation
from mmfusion.training.rebuild import from_recipe
from mmfusion.training.resume import find
from mmfusion.types import Media, Text
from tests.training.callbacks.test_validation import trainer_of
from tests.training.pictures import LORA, NEW
from tests.training.tiny import fit, write_recipe

CONVERTER = "mmfusion.data.converters.text_to_speech.TextToSpeech"


class Beeps(Speaker):
    """A beep of 10 ms for each word, higher by the seed."""

    def __init__(self, pitch: int = 1) -> None:
        self.pitch = pitch

    def say(self, text: str, seed: int = 0) -> Media | None:
        times = np.arange(80 * len(text.split()))
        wave = np.sin(times * (seed + self.pitch) / 8).astype(np.float32)
        return as_wav(wave, 8000, text) if text.strip() else None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whatever it is asked, it speaks."""
    home = tmp_path_factory.mktemp("speech")
    converter = {"class_path": CONVERTER, "init_args": {"prompts": ["w33 {caption}"]}}
    recipe = write_recipe(
        home,
        model__encoders={},
        model__input_projectors={},
        model__speaker={"class_path": "tests.training.test_speech_stage.Beeps"},
        model__tuning={"llm": [LORA, NEW]},
        data__sources={"said": {"shards": f"{home}/words-*.tar", "converter": converter}},
        trainer__max_steps=60,
        checkpoint__every_n_steps=60,
    )
    return fit(recipe).path


@pytest.fixture(scope="module")
def chat(run: Path) -> Chat:
    return mmfusion.load(run, device="cpu")


def test_the_model_decides_to_speak(chat: Chat) -> None:
    """Untrained, one of 60 answers would begin so."""
    asked = [f"w33 w{i} w{i + 1}" for i in range(20)]
    answers = chat.generate(asked, max_new_tokens=8, do_sample=True, seed=0)
    begun = [bool(answer.parts) and answer.parts[0].spoken for answer in answers]
    assert sum(begun) >= 5, begun
    assert chat.model.llm.new_tokens == ["<speech>", "</speech>"]


def test_validation_counts_who_is_answered_aloud(run: Path, chat: Chat) -> None:
    def converter(spoken: bool) -> dict[str, Any]:
        return {
            "class_path": CONVERTER,
            "init_args": {"prompts": ["w33 {caption}"], "spoken": spoken},
        }

    sources = {
        name: {"shards": f"{run.parent}/words-*.tar", "converter": converter(name == "said")}
        for name in ("said", "written")
    }
    module, data = from_recipe(f"{run}/config.yaml", [f"--data.val_sources={json.dumps(sources)}"])
    module.restore(find(run))
    callback = Validation(generate_samples=6, table_samples=0, max_new_tokens=4)
    (figures,) = trainer_of(callback).validate(module, data, verbose=False)
    right = given = 0
    for name, source in data.val_sources.items():
        for index in spread(len(source), 6):
            answer = chat.generate([source[index].messages[0]], max_new_tokens=4)
            aloud = any(part.spoken for part in answer.parts)
            given, right = given + aloud, right + (aloud and name == "said")
    assert right
    assert figures["val/emission/recall/speech"] == pytest.approx(right / 6)
    assert figures["val/emission/precision/speech"] == pytest.approx(right / given)
    assert figures["val/emission/f1/speech"] == pytest.approx(2 * right / (given + 6))


def forced(chat: Chat, answer: str) -> dict[str, Any]:
    """Options of generate: these tokens and no others are given."""
    tokenizer = chat.processor.tokenizer
    ids = [*tokenizer.convert_tokens_to_ids(answer.split()), tokenizer.eos_token_id]
    return {
        "max_new_tokens": len(ids),
        "prefix_allowed_tokens_fn": lambda row, given: [ids[len(given)]],
    }


ANSWER = "w3 <speech> w1 w2 </speech> w4"


def test_an_answer_holds_what_was_said_with_its_words(chat: Chat) -> None:
    answer = chat.generate("w33 w1 w2", **forced(chat, ANSWER))
    said = Beeps().say("w1 w2")
    assert answer == "w3 w1 w2 w4"
    assert answer.parts == (Text("w3"), Text("w1 w2", spoken=True, sound=said), Text("w4"))
    assert answer.media == [said]
    samples, rate = soundfile.read(io.BytesIO(said.data))
    assert (rate, len(samples)) == (8000, 160)


def test_a_stream_shows_the_words_then_the_sound_and_returns_the_answer(chat: Chat) -> None:
    stream = chat.generate("w33 w1 w2", stream=True, **forced(chat, ANSWER))

    def read() -> Iterator[Any]:
        whole.append((yield from stream))

    whole: list[Any] = []
    pieces = list(read())
    assert "".join(pieces[:-1]).split() == ["w3", "w1", "w2", "w4"]
    assert pieces[-1] == Beeps().say("w1 w2")
    assert whole[0].parts == chat.generate("w33 w1 w2", **forced(chat, ANSWER)).parts


def test_the_seed_of_sampling_is_that_of_the_voice(chat: Chat) -> None:
    options = forced(chat, ANSWER)
    for seed, drawn in ((3, 3), ((5,), 5)):
        answer = chat.generate("w33 w1", sampling=Sampling(seed=seed), **options)
        assert answer.media == [Beeps().say("w1 w2", drawn)]


def test_speak_says_what_is_written_as_well(chat: Chat) -> None:
    answer = chat.generate("w34 w1", speak=True, **forced(chat, ANSWER))
    assert [part.spoken for part in answer.parts] == [False, True, False]
    assert answer.media == [Beeps().say(text) for text in ("w3", "w1 w2", "w4")]


def test_speaking_without_a_voice_is_refused(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "speaker", None)
    with pytest.raises(ValueError, match="no voice to speak with"):
        chat.generate("w34 w1", speak=True)


def test_words_are_split_at_the_signal_tokens() -> None:
    def split(*ids: int) -> list[tuple[list[int], bool]]:
        return [(x.tolist(), said) for x, said in split_speech(torch.tensor(ids), (8, 9))]

    assert split(1, 8, 2, 3, 9, 4) == [([1], False), ([2, 3], True), ([4], False)]
    assert split(8, 2, 9, 8, 3) == [([2], True), ([3], True)]  # the last was cut
    assert split(9, 1, 9, 2) == [([1], False), ([2], False)]
    assert split(8, 9) == []
    assert split_speech(torch.tensor([1, 8]), None)[0][0].tolist() == [1, 8]


def test_the_chat_saves_what_was_said_and_goes_on(
    chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session(chat, forced(chat, ANSWER), media_dir=tmp_path / "said")
    session.handle("w33 w1 w2")
    session.handle("w33 w4")
    out = capsys.readouterr().out
    assert "error" not in out
    assert f"(audio {tmp_path / 'said' / '0001.wav'})" in out
    assert [message.role for message in session.history] == ["user", "assistant"] * 2
    assert [part.spoken for part in session.history[1].content] == [False, True, False]
    shown = chat.processor.prompt(session.history[:3]).planned.input_ids
    assert set(chat.processor.speech_ids) < set(shown.tolist())


def test_any_run_speaks_with_a_voice_of_the_command_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("w33 w1\n"))
    options = ["--device=cpu", "--max_new_tokens=4", f"--media_dir={tmp_path / 'said'}"]
    voice = ["--speaker", "tests.training.test_speech_stage.Beeps", "--speaker.pitch=3"]
    main(["chat", str(run), *options, *voice])
    assert f"(audio {tmp_path / 'said' / '0001.wav'})" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["chat", str(run), "--speaker", "mmfusion.models.llms.base.LLM"])


def test_a_real_voice_says_an_answer(
    chat: Chat, voice: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "speaker", Piper(str(voice), variation=0.0))
    answer = chat.generate("w33 w1 w2", **forced(chat, ANSWER))
    samples, rate = soundfile.read(io.BytesIO(answer.media[0].data))
    assert rate == 22_050
    assert len(samples) > rate / 2
    assert np.abs(samples).max() > 0.05

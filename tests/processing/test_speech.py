"""Words of answers that are to be said aloud: signal tokens around them."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from mmfusion.processing.processor import Processor
from mmfusion.processing.special_tokens import SPEECH
from mmfusion.types import DataError, Message, Sample, Text
from tests.processing.conftest import CHATML, GENERATION, LLAMA2


def made(tokenizer: Any, template: str = CHATML, speaks: bool = True) -> Processor:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    tokenizer.add_tokens(list(SPEECH), special_tokens=True)
    return Processor(tokenizer, {}, {}, speaks=speaks)


def talk(*answer: Text, ask: str = "say it") -> Sample:
    return Sample((Message("user", (Text(ask),)), Message("assistant", answer)))


@pytest.mark.parametrize("template", [CHATML, LLAMA2, GENERATION])
def test_signal_tokens_stand_around_the_words_and_are_trained(
    trained_tokenizer: Any, template: str
) -> None:
    processor = made(trained_tokenizer, template)
    said = (Text("Listen: "), Text("a cat", spoken=True), Text(" and read"))
    planned = processor.plan(talk(*said))
    ids = planned.input_ids.tolist()
    begin, end = (ids.index(index) for index in processor.speech_ids)
    assert processor.tokenizer.decode(ids[begin + 1 : end]).strip() == "a cat"
    assert planned.trained[begin : end + 1].all()
    assert sum(index in processor.speech_ids for index in ids) == 2
    assert planned.targets == ()
    assert "a cat" not in processor.tokenizer.decode(ids[:begin])


def test_a_spoken_answer_is_trained_to_its_end_token_as_a_written_one(
    trained_tokenizer: Any,
) -> None:
    processor = made(trained_tokenizer)
    spoken, written = (processor.plan(talk(Text("a cat", spoken=aloud))) for aloud in (True, False))
    assert int(spoken.trained.sum()) == int(written.trained.sum()) + 2
    assert spoken.input_ids[spoken.trained][-1] == written.input_ids[written.trained][-1]


def test_what_a_user_says_is_text(trained_tokenizer: Any) -> None:
    processor = made(trained_tokenizer)
    asked = [
        processor.prompt([Message("user", (Text("a cat", spoken=aloud),))]).planned.input_ids
        for aloud in (True, False)
    ]
    assert asked[0].tolist() == asked[1].tolist()


@pytest.mark.parametrize("spoken", [True, False])
def test_words_cannot_forge_the_signal_tokens(trained_tokenizer: Any, spoken: bool) -> None:
    forged = talk(Text("a </speech> cat", spoken=spoken))
    with pytest.raises(DataError, match="'</speech>'") as error:
        made(trained_tokenizer).plan(forged)
    assert error.value.reason == "special_token_in_text"


def test_a_model_without_a_voice_refuses_words_to_be_said(trained_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"no voice; add `model\.speaker`"):
        made(trained_tokenizer, speaks=False).plan(talk(Text("a cat", spoken=True)))


def test_the_fingerprint_knows_whether_the_model_speaks(trained_tokenizer: Any) -> None:
    speaks, silent = (made(trained_tokenizer, speaks=aloud) for aloud in (True, False))
    assert speaks.fingerprint() != silent.fingerprint()

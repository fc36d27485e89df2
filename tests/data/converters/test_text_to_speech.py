"""A request for words, and the words said."""

from __future__ import annotations

import json

import pytest

from mmfusion.data.converters.conversation import Conversation
from mmfusion.data.converters.text_to_speech import TextToSpeech
from mmfusion.types import DataError, Message, Text

PROMPTS = ["Say: {caption}", "Read {caption} to me"]


def test_the_words_are_asked_for_and_said() -> None:
    convert = TextToSpeech(PROMPTS[:1])
    sample = convert({"wav": b"\1", "txt": b" a cat \n"}, "s.tar", "k")
    asked, answered = sample.messages
    assert asked == Message("user", (Text("Say: a cat"),))
    assert answered == Message("assistant", (Text("a cat", spoken=True),))
    assert (sample.media, sample.targets, sample.shard, sample.key) == ([], [], "s.tar", "k")
    written = TextToSpeech(["Write: {caption}"], spoken=False, text="json:a")
    (part,) = written({"json": b'{"a": "a dog"}'}, "s", "k").messages[1].content
    assert part == Text("a dog")


def test_a_record_has_always_the_same_request_and_others_have_others() -> None:
    convert, record = TextToSpeech(PROMPTS), {"txt": b"a"}
    asked = [convert(record, "s", f"k{i}").messages[0] for i in range(20)]
    assert asked == [convert(record, "s", f"k{i}").messages[0] for i in range(20)]
    assert {message.content[0].text for message in asked} == {"Say: a", "Read a to me"}


def test_unusable_texts_and_requests_are_named() -> None:
    with pytest.raises(DataError) as error:
        TextToSpeech(PROMPTS)({"txt": b" "}, "s", "k")
    assert error.value.reason == "empty_text"
    with pytest.raises(ValueError, match=r"prompts is \['Say'\]; expected requests"):
        TextToSpeech(["Say"])


def test_a_conversation_may_answer_with_words_to_be_said() -> None:
    part = {"type": "speech", "text": "Hello."}

    def talk(asked: object, answered: object) -> dict[str, bytes]:
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return {"json": json.dumps({"messages": turns}).encode()}

    sample = Conversation()(talk("Greet me", [part, {"type": "text", "text": "x"}]), "s", "k")
    assert sample.messages[1].content == (Text("Hello.", spoken=True), Text("x"))
    with pytest.raises(DataError, match="or in an assistant turn 'speech'") as error:
        Conversation()(talk([part], "x"), "s", "k")
    assert error.value.reason == "unknown_part"

"""A request and the medium that answers it."""

from __future__ import annotations

import pytest

from mmfusion.data.converters.conversation import Conversation
from mmfusion.data.converters.text_to_media import TextToMedia
from mmfusion.types import DataError, Media, Text

PROMPTS = {"image": ["Draw {caption}!", "Show me {caption}."], "audio": ["Play {caption}."]}


def test_the_caption_is_asked_for_and_the_medium_answers() -> None:
    convert = TextToMedia({"audio": ["Play {caption}."]}, answer="Listen: ")
    sample = convert({"wav": b"\1", "txt": b" a {dog} \n"}, "s.tar", "k")
    asked, answered = sample.messages
    assert asked.content == (Text("Play a {dog}."),)
    assert answered.content == (Text("Listen: "), Media("audio", b"\1", "wav", caption="a {dog}"))
    assert (sample.format, sample.shard, sample.key) == ("chat", "s.tar", "k")
    assert sample.media == []
    assert len(sample.targets) == 1


def test_a_record_has_always_the_same_request_and_others_have_others() -> None:
    convert = TextToMedia(PROMPTS)
    record = {"jpg": b"\1", "txt": b"a cat"}
    asked = [convert(record, "s", f"k{i}").messages[0].content[0].text for i in range(40)]
    assert asked == [convert(record, "s", f"k{i}").messages[0].content[0].text for i in range(40)]
    assert set(asked) == {"Draw a cat!", "Show me a cat."}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"jpg": b"", "0.jpg": b"", "txt": b"a"}, "media_count"),
        ({"txt": b"a"}, "media_count"),
        ({"mp4": b"", "txt": b"a"}, "no_prompt"),
        ({"jpg": b"", "txt": b" "}, "empty_text"),
        ({"jpg": b""}, "missing_member"),
    ],
)
def test_unusable_records_have_their_own_reasons(record: dict[str, bytes], reason: str) -> None:
    with pytest.raises(DataError) as error:
        TextToMedia(PROMPTS)(record, "s", "k")
    assert error.value.reason == reason


@pytest.mark.parametrize("requests", [[], ["Draw"], ["{caption} and {caption}"]])
def test_requests_without_the_caption_are_refused(requests: list[str]) -> None:
    with pytest.raises(ValueError, match=r"prompts\.image is .*; expected requests that each hold"):
        TextToMedia({"image": requests})


def test_a_conversation_may_answer_with_media_and_their_captions() -> None:
    document = (
        b'{"messages": [{"role": "user", "content": "<image> draw it again"},'
        b'{"role": "assistant", "content": [{"type": "text", "text": "Here:"},'
        b'{"type": "image", "image": "1.png", "caption": "a cat"}]}]}'
    )
    record = {"json": document, "0.png": b"\0", "1.png": b"\1"}
    sample = Conversation()(record, "s", "k")
    assert sample.media == [Media("image", b"\0", "png")]
    assert sample.targets == [Media("image", b"\1", "png", caption="a cat")]
    wrong = record | {"json": document.replace(b'"a cat"', b"7")}
    with pytest.raises(DataError, match="the caption of a image part is 7") as error:
        Conversation()(wrong, "s", "k")
    assert error.value.reason == "bad_text"

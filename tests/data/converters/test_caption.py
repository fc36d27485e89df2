from __future__ import annotations

import json
import pickle

import pytest

from mmfusion.data.converters.caption import Caption
from mmfusion.types import DataError, Media, Sample, Text


def texts(sample: Sample) -> list[str]:
    return [p.text for m in sample.messages for p in m.content if isinstance(p, Text)]


def reason(converter: Caption, record: dict[str, bytes]) -> str:
    with pytest.raises(DataError) as error:
        converter(record, "shard", "key")
    return error.value.reason


def test_media_prompt_caption_and_end() -> None:
    record = {"jpg": b"picture", "txt": b" A black bird. \n"}
    sample = Caption(prompt="Image caption:", eos=True)(record, "a.tar", "0001")
    assert (sample.format, sample.eos, sample.shard, sample.key) == ("plain", True, "a.tar", "0001")
    user, assistant = sample.messages
    assert user.content == (Media("image", b"picture", "jpg"), Text("Image caption:"))
    assert assistant.content == (Text(" A black bird.\n"),)


def test_without_a_prompt_the_caption_follows_the_media() -> None:
    sample = Caption(end="")({"png": b"p", "txt": b"A bird."}, "", "")
    assert texts(sample) == ["A bird."]


def test_prompt_by_modality() -> None:
    converter = Caption(prompt={"audio": "Transcript: ", "image": "Caption:"})
    assert texts(converter({"ogg": b"s", "txt": b"Hi"}, "", "")) == ["Transcript: ", "Hi\n"]
    assert texts(converter({"jpg": b"p", "txt": b"Hi"}, "", "")) == ["Caption:", " Hi\n"]
    assert texts(converter({"mp4": b"v", "txt": b"Hi"}, "", "")) == ["Hi\n"]


def test_caption_from_a_json_key() -> None:
    record = {"webp": b"p", "json": json.dumps({"caption": "größer ☃"}).encode()}
    assert texts(Caption("json:caption")(record, "", "")) == ["größer ☃\n"]


def test_media_come_in_numeric_order_whatever_the_order_in_the_shard() -> None:
    record = {"10.jpg": b"c", "2.jpg": b"b", "txt": b"three", "1.PNG": b"a"}
    media = Caption()(record, "", "").media
    assert [(m.data, m.format) for m in media] == [(b"a", "png"), (b"b", "jpg"), (b"c", "jpg")]


def test_own_media_map_replaces_the_usual_one() -> None:
    record = {"left.bin": b"l", "jpg": b"thumbnail", "txt": b"x"}
    media = Caption(media={"left.bin": "video"})(record, "", "").media
    assert media == [Media("video", b"l", "bin")]


@pytest.mark.parametrize(
    ("text", "member", "expected"),
    [
        ("txt", {}, "missing_member"),
        ("txt", {"txt": b"\xff\xfe"}, "bad_text"),
        ("txt", {"txt": b" \n "}, "empty_text"),
        ("json:caption", {"json": b'{"caption": NaN}'}, "bad_json"),
        ("json:caption", {"json": b'{"caption": "a'}, "bad_json"),
        ("json:caption", {"json": b"[" * 100_000}, "bad_json"),
        ("json:caption", {"json": b"\xff"}, "bad_text"),
        ("json:caption", {"json": b'{"title": "a"}'}, "missing_key"),
        ("json:caption", {"json": b'["caption"]'}, "missing_key"),
        ("json:caption", {"json": b'{"caption": 3}'}, "bad_text"),
        ("json:caption", {"json": b'{"caption": "\\ud800"}'}, "bad_text"),
    ],
)
def test_unusable_records_have_their_own_reasons(
    text: str, member: dict[str, bytes], expected: str
) -> None:
    assert reason(Caption(text), {"jpg": b"p", **member}) == expected


def test_record_without_media_is_refused() -> None:
    assert reason(Caption(), {"txt": b"a", "json": b"{}"}) == "media_count"


def test_converter_pickles() -> None:
    converter = pickle.loads(pickle.dumps(Caption(prompt="a")))  # noqa: S301
    record = {"jpg": b"p", "txt": b"x"}
    assert converter(record, "s", "k") == Caption(prompt="a")(record, "s", "k")

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmfusion.data.converters.conversation import Conversation
from mmfusion.types import DataError, Media, Message, Text

FILES = {"0.jpg": b"first", "1.jpg": b"second", "wav": b"sound"}
ANSWER = {"role": "assistant", "content": "Yes."}


def convert(document: Any, files: dict[str, bytes] | None = None, **options: Any) -> list[Message]:
    record = {"json": json.dumps(document).encode(), **(files or {})}
    return list(Conversation(**options)(record, "a.tar", "dir/0001").messages)


def reason(document: Any, files: dict[str, bytes] | None = None) -> str:
    with pytest.raises(DataError) as error:
        convert(document, files)
    return error.value.reason


EXPECTED = [
    Message(
        "user",
        (
            Media("image", b"first", "jpg"),
            Text("\nWhat?"),
            Media("audio", b"sound", "wav"),
            Media("image", b"second", "jpg"),
        ),
    ),
    Message("assistant", (Text("Yes."),)),
]


def test_llava_style() -> None:
    document = {
        "id": "7",
        "image": "coco/000.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?<audio><image>"},
            {"from": "gpt", "value": "Yes."},
        ],
    }
    assert convert(document, FILES) == EXPECTED


def test_plain_strings_with_markers() -> None:
    turns = [{"role": "user", "content": "<image>\nWhat?<audio><image>"}, ANSWER]
    assert convert({"messages": turns}, FILES) == EXPECTED
    assert convert(turns, FILES) == EXPECTED


@pytest.mark.parametrize("named", [True, False])
def test_openai_style(named: bool) -> None:
    content = [
        {"type": "image", **({"image": "0.jpg"} if named else {})},
        {"type": "text", "text": "\nWhat?"},
        {"type": "input_audio", **({"input_audio": {"data": "wav"}} if named else {})},
        {"type": "image_url", **({"image_url": {"url": "x/0001.1.jpg"}} if named else {})},
    ]
    turns = [{"role": "user", "content": content}, ANSWER]
    assert convert({"messages": turns}, FILES) == EXPECTED


def test_media_anywhere_in_many_turns() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        ANSWER,
        {"role": "user", "content": "b <image>"},
        {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
    ]
    messages = convert(turns, {"png": b"p"})
    assert [m.role for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[3].content == (Text("b "), Media("image", b"p", "png"))


def test_time_span_of_a_part() -> None:
    part = {"type": "video", "video": "mp4", "start": 1, "end": 2.5}
    turns = [{"role": "user", "content": [part]}, ANSWER]
    assert convert(turns, {"mp4": b"v"})[0].content == (Media("video", b"v", "mp4", 1.0, 2.5),)
    part["start"] = "now"
    assert reason(turns, {"mp4": b"v"}) == "bad_span"


def test_one_file_may_be_shown_twice_by_name() -> None:
    part = {"type": "image", "image": "jpg"}
    messages = convert([{"role": "user", "content": [part, part]}, ANSWER], {"jpg": b"p"})
    assert len(messages[0].content) == 2


def test_system_message_is_added_where_there_is_none() -> None:
    turns = [{"role": "user", "content": "a"}, ANSWER]
    system = Message("system", (Text("Be kind."),))
    assert convert(turns, system="Be kind.")[0] == system
    own = [{"role": "system", "content": "Mine."}, *turns]
    assert convert(own, system="Be kind.")[0].content == (Text("Mine."),)


@pytest.mark.parametrize(
    ("question", "files"),
    [
        ("<image> a", {}),
        ("<image><image> a", {"jpg": b"p"}),
        ("a", {"jpg": b"p"}),
        ("<image> a", {"0.jpg": b"p", "1.jpg": b"q"}),
        ("<video> a", {"jpg": b"p"}),
        ([{"type": "image", "image": "2.jpg"}], {"0.jpg": b"p"}),
    ],
)
def test_too_few_and_too_many_media_are_refused(question: Any, files: dict[str, bytes]) -> None:
    turns = [{"role": "user", "content": question}, ANSWER]
    assert reason(turns, files) == "media_count"


@pytest.mark.parametrize(
    ("names", "files", "shown"),
    [
        (["pictures/a.jpg"], {"jpg": b"p", "wav": b"s"}, True),
        (["pictures/a.JPG", "pictures/a.JPG"], {"jpg": b"p", "wav": b"s"}, True),
        (["pictures/a.jpg", "pictures/b.jpg"], {"jpg": b"p", "wav": b"s"}, False),
        (["pictures/a.jpg"], {"0.jpg": b"p", "1.wav": b"s"}, False),
        (["pictures/a.png"], {"jpg": b"p", "wav": b"s"}, False),
        (["pictures/a.jpg"], {"jpg": b"p", "png": b"q", "wav": b"s"}, False),
    ],
)
def test_a_foreign_name_stands_for_the_only_medium_alone(
    names: list[str], files: dict[str, bytes], shown: bool
) -> None:
    parts = [{"type": "image", "image": name} for name in names] + [{"type": "audio"}]
    turns = [{"role": "user", "content": parts}, ANSWER]
    if shown:
        images = [Media("image", b"p", "jpg")] * len(names)
        assert convert(turns, files)[0].content == (*images, Media("audio", b"s", "wav"))
    else:
        assert reason(turns, files) == "media_count"


def test_names_in_json_are_never_opened(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    for name in (str(secret), f"file://{secret}", "http://localhost:1/a.jpg", "../../secret.jpg"):
        content = [{"type": "image_url", "image_url": {"url": name}}]
        assert reason([{"role": "user", "content": content}, ANSWER]) == "media_count"


@pytest.mark.parametrize(
    "roles",
    [
        ["assistant", "user"],
        ["user"],
        ["user", "user", "assistant"],
        ["system", "assistant"],
        ["user", "assistant", "system"],
        ["system"],
    ],
)
def test_wrong_order_is_refused(roles: list[str]) -> None:
    assert reason([{"role": role, "content": "a"} for role in roles]) == "wrong_order"


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ([{"role": "tool", "content": "a"}], "unknown_role"),
        ([{"role": ["user"], "content": "a"}], "unknown_role"),
        ([{"role": "user"}], "missing_key"),
        ([{"content": "a"}], "missing_key"),
        (["a"], "missing_key"),
        ([], "missing_key"),
        ({"messages": "a"}, "missing_key"),
        (3, "missing_key"),
        ([{"role": "user", "content": None}], "bad_text"),
        ([{"role": "user", "content": [{"type": "file"}]}], "unknown_part"),
        ([{"role": "user", "content": [{"type": ["image"]}]}], "unknown_part"),
        ([{"role": "user", "content": ["a"]}], "unknown_part"),
        ([{"role": "user", "content": [{"type": "text"}]}], "bad_text"),
        ([{"role": "user", "content": [{"type": "image", "image": 3}]}], "bad_text"),
        (float("nan"), "bad_json"),
    ],
)
def test_malformed_documents_have_their_own_reasons(document: Any, expected: str) -> None:
    assert reason(document) == expected


@pytest.mark.parametrize("number", ["1" + 400 * "0", "-1" + 400 * "0", "1e999", "true", "[0]"])
@pytest.mark.parametrize("name", ["start", "end"])
def test_a_time_that_is_no_number_of_seconds_is_a_bad_span(name: str, number: str) -> None:
    part = {"type": "audio", "audio": "wav", name: "NUMBER"}
    document = json.dumps([{"role": "user", "content": [part]}, ANSWER])
    record = {"json": document.replace('"NUMBER"', number).encode(), **FILES}
    with pytest.raises(DataError, match=rf"'{name}' of a media part is .*; expected sec") as error:
        Conversation()(record, "", "")
    assert error.value.reason == "bad_span"
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "document",
    [
        '[{"role": NEST, "content": "a"}]',
        '[{"role": "user", "content": NEST}]',
        '[{"role": "user", "content": {"a": NEST}}]',
        '[{"role": "user", "content": [{"type": NEST}]}]',
        '[{"role": "user", "content": [{"type": "image", "image": NEST}]}]',
        '[{"role": "user", "content": [{"type": "image", "image": "0.jpg", "start": NEST}]}]',
        "NEST",
    ],
)
def test_nesting_of_any_depth_is_a_data_error(document: str) -> None:
    for depth in (*range(900, 960), 100_000):
        record = {"json": document.replace("NEST", "[" * depth + "]" * depth).encode(), **FILES}
        with pytest.raises(DataError):
            Conversation()(record, "", "")


def test_members_with_long_numbers_in_their_names_keep_numeric_order() -> None:
    names = ["2.jpg", "10.jpg", f"{'9' * 5000}.jpg", f"1{'0' * 5000}.jpg"]
    question = {"role": "user", "content": "<image>" * len(names)}
    files = {name: name.encode() for name in reversed(names)}
    shown = convert([question, ANSWER], files)[0].content
    assert [item.data.decode() for item in shown if isinstance(item, Media)] == names


def test_missing_and_unreadable_members() -> None:
    for record, expected in (({}, "missing_member"), ({"json": b"\xff"}, "bad_text")):
        with pytest.raises(DataError) as error:
            Conversation()(record, "", "")
        assert error.value.reason == expected

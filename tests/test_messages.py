"""What users write, as messages."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from mmfusion.messages import conversation
from mmfusion.types import Media, Message, Text

IMAGE = b"\5\6\7"


def test_plain_dicts_make_the_same_conversation(tmp_path: Path) -> None:
    (tmp_path / "a.BIN").write_bytes(IMAGE)
    uri = "data:image/bin;base64," + base64.b64encode(IMAGE).decode()
    expected = [Message("user", (Media("image", IMAGE, "bin"), Text("w1")))]
    for part in (
        {"type": "image", "path": tmp_path / "a.BIN"},
        {"type": "image", "data": IMAGE, "format": "bin"},
        {"type": "image_url", "image_url": {"url": uri}},
        Media("image", IMAGE, "bin"),
    ):
        content = [part, {"type": "text", "text": "w1"}]
        assert conversation([{"role": "user", "content": content}]) == expected
    assert conversation("w1") == [Message("user", (Text("w1"),))]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ([{"type": "image", "path": "nowhere.jpg"}], FileNotFoundError),
        ([{"type": "image_url", "image_url": {"url": "http://example.com/a.jpg"}}], ValueError),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}}], ValueError),
        ([{"type": "image"}], ValueError),
        ([3], ValueError),
        (None, ValueError),
        (7, ValueError),
        ([{"type": "text", "text": 7}], ValueError),
        ([{"type": "image_url", "image_url": "x"}], ValueError),
        ([{"type": "input_audio"}], ValueError),
        ([{"type": "input_audio", "input_audio": {"data": "AAAA"}}], ValueError),
        ([{"type": "input_audio", "input_audio": {"data": 7, "format": "wav"}}], ValueError),
        ([{"type": "input_audio", "input_audio": "AAAA"}], ValueError),
        ([{"type": "image", "path": None}], ValueError),
        ([{"type": ["image"], "path": "a.jpg"}], ValueError),
        ([{"type": "image", "image": Image.new("CMYK", (4, 3))}], ValueError),
        ([{"type": "image", "image": Image.new("F", (4, 3))}], ValueError),
    ],
)
def test_bad_content_is_named(content: list, error: type[Exception]) -> None:
    with pytest.raises(error):
        conversation([{"role": "user", "content": content}])


def test_a_picture_may_be_one_of_pil() -> None:
    picture = Image.new("RGB", (4, 3), "red")
    part = {"type": "image", "image": picture}
    (message,) = conversation([{"role": "user", "content": [part]}])
    (media,) = message.content
    assert (media.modality, media.format) == ("image", "png")
    assert Image.open(io.BytesIO(media.data)).getpixel((0, 0)) == (255, 0, 0)

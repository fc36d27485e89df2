"""Messages from what users write: texts, :class:`mmfusion.types.Message`, or dicts as OpenAI's and
Hugging Face's.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from PIL import Image

from mmfusion.types import Media, Message, Role, Text

Conversation = str | Sequence[Message | Mapping[str, Any]]


def conversation(messages: Conversation) -> list[Message]:
    """Messages from what users write: a text, messages, or OpenAI-style dicts.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(messages, str):
        return [Message("user", (Text(messages),))]
    if isinstance(messages, bytes) or not isinstance(cast(Any, messages), Sequence):
        alone = isinstance(messages, (Mapping, Message))
        raise ValueError(
            f"a conversation is {_short(messages)}; expected a text or a list of messages"
            + (": put the message into a list." if alone else ".")
        )
    return [_message(message) for message in messages]


def read_media(path: str | Path, modality: str) -> Media:
    """A media file from disk.

    Raises:
        FileNotFoundError: where it is not there.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no {modality} file {path}; give the path of a file.")
    return Media(modality, path.read_bytes(), path.suffix.lstrip(".").lower())


def _message(message: Message | Mapping[str, Any]) -> Message:
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ValueError(
            f"a message is {_short(message)}; expected mmfusion.types.Message or a dict with role "
            "and content."
        )
    role, content = message["role"], message["content"]
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"a message has the role {role!r}; expected system, user or assistant.")
    if not isinstance(content, (str, list, tuple)):
        raise ValueError(f"a message's content is {_short(content)}; expected a text or a list.")
    parts = [content] if isinstance(content, str) else content
    return Message(cast(Role, role), tuple(_part(part) for part in parts))


def _part(part: Any) -> Text | Media:
    if isinstance(part, (Text, Media)):
        return part
    if isinstance(part, str):
        return Text(part)
    kind = part.get("type") if isinstance(part, Mapping) else None
    kind = kind if isinstance(kind, str) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Text(part["text"])
    if kind == "image_url":
        url = part.get("image_url")
        return _from_url("image", str(url.get("url") if isinstance(url, Mapping) else url))
    if kind == "image" and isinstance(part.get("image"), Image.Image):
        return _from_picture(part["image"])
    audio = part.get("input_audio") if kind == "input_audio" else None
    if isinstance(audio, Mapping) and {"data", "format"} <= audio.keys():
        return Media("audio", _base64(audio["data"]), str(audio["format"]))
    if kind and isinstance(part.get("path"), (str, Path)):
        return read_media(part["path"], kind)
    if kind and isinstance(part.get("data"), bytes):
        return Media(kind, part["data"], part.get("format", ""))
    raise ValueError(
        f"a piece of a message is {_short(part)}; expected a text, or a dict such as "
        '{"type": "text", "text": ...}, {"type": "image", "path": ...} or '
        '{"type": "audio", "data": bytes, "format": "wav"}.'
    )


def _from_picture(picture: Image.Image) -> Media:
    file = io.BytesIO()
    try:
        picture.save(file, "png")
    except OSError as error:
        raise ValueError(
            f"a picture has the mode {picture.mode}, which PNG files do not ({error}); give "
            'picture.convert("RGB").'
        ) from error
    return Media("image", file.getvalue(), "png")


def _from_url(modality: str, url: str) -> Media:
    """A ``data:`` URL. Such messages come from elsewhere: nothing is fetched, no file is read."""
    head, comma, data = url.partition(",")
    if not (head.startswith(f"data:{modality}/") and head.endswith(";base64") and comma):
        raise ValueError(
            f"{modality}_url is {_short(url)}; expected data:{modality}/...;base64,... "
            '(nothing is fetched). For a file use {"type": "image", "path": ...}.'
        )
    return Media(modality, _base64(data), head.removesuffix(";base64").rpartition("/")[2])


def _base64(data: Any) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (TypeError, ValueError) as error:  # binascii.Error is one of the latter
        raise ValueError(f"media data is not base64 ({error}).") from error


def _short(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."

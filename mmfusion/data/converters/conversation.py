r"""Conversations with media anywhere, in the three usual ways of writing them as JSON.

- OpenAI: ``{"messages": [{"role": "user", "content": [{"type": "image", "image": "0.jpg"},
  {"type": "text", "text": "What is it?"}]}, ...]}``
- LLaVA: ``{"conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, ...]}``
- plain: ``{"messages": [{"role": "user", "content": "<image> What is it?"}, ...]}``

In an assistant turn ``{"type": "speech", "text": "Hello."}`` are words to be said aloud.

Media are members of the same record. A name in the JSON picks a member; it is never opened as a
path or an address. A name that no member has (a path from before the shard was made, such as
``pictures/a.jpg``) stands for the member ``jpg`` where that is the only medium of its modality.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmfusion.data.converters.base import Converter
from mmfusion.data.converters.members import (
    MODALITY_OF,
    as_text,
    file_format,
    media_members,
    media_of,
    read_json,
    shown,
)
from mmfusion.types import DataError, Media, Message, Role, Sample, Text

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
PART_MODALITIES = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
}
"""Modality of an OpenAI-style content part by its type."""

_MARKER = re.compile(r"<(image|video|audio)>")


class Conversation(Converter):
    """Single- and multi-turn instructions and questions about media.

    Args:
        text: the JSON member.
        system: system message for conversations that have none.
        media: modality of each media extension (``jpg`` also covers ``0.jpg``). The usual ones are
            known. Media without a name in the JSON are taken in the order of their names.
    """

    def __init__(
        self, text: str = "json", system: str | None = None, media: dict[str, str] | None = None
    ) -> None:
        self.text = text
        self.system = system
        self.media = dict(MODALITY_OF if media is None else media)

    def __call__(self, record: Mapping[str, bytes], shard: str, key: str) -> Sample:
        """Make the sample; see the base class.

        Raises:
            DataError: ``missing_member``, ``bad_text``, ``bad_json``, ``missing_key``,
                ``unknown_role``, ``wrong_order``, ``unknown_part``, ``media_count``.
        """
        shelf = _Shelf(record, key, media_members(record, self.media))
        turns = _turns(read_json(record, self.text), self.text)
        messages = [_message(turn, shelf) for turn in turns]
        shelf.check_all_taken()
        _check_order([message.role for message in messages])
        if self.system is not None and messages[0].role != "system":
            messages.insert(0, Message("system", (Text(self.system),)))
        return Sample(tuple(messages), shard=shard, key=key)


class _Shelf:
    """The media of one record, handed out by name or in order."""

    def __init__(
        self, record: Mapping[str, bytes], key: str, members: Sequence[tuple[str, str]]
    ) -> None:
        self._record = record
        self._key = key.rsplit("/", 1)[-1]
        self._members = members
        self._taken: set[str] = set()
        self._foreign: dict[str, str] = {}

    def next(self, modality: str, start: float | None = None, end: float | None = None) -> Media:
        """The first item of this modality that was not taken yet."""
        names = [name for name, kind in self._members if kind == modality]
        left = [name for name in names if name not in self._taken]
        if not left:
            raise DataError(
                "media_count",
                f"the conversation asks for more {modality} items than the record holds: {names}.",
            )
        return self.named(left[0], modality, start, end)

    def named(
        self, name: str, modality: str, start: float | None = None, end: float | None = None
    ) -> Media:
        """The member of this extension (``0.jpg``), or of this file name (``<key>.0.jpg``), or the
        only medium, of this format and no number, where no other such name stands for it.
        """
        member = name if name in self._record else name.rsplit("/", 1)[-1]
        member = member.removeprefix(f"{self._key}.")
        only = [other for other, kind in self._members if kind == modality]
        if member not in self._record and only == [file_format(name)]:
            member = only[0] if self._foreign.setdefault(modality, name) == name else name
        if member not in self._record:
            raise DataError(
                "media_count",
                f"the conversation names {name[:80]!r}, but the record has the members "
                f"{sorted(self._record)}. Put the file into the record; nothing else is opened.",
            )
        self._taken.add(member)
        return media_of(self._record, member, modality, start, end)

    def check_all_taken(self) -> None:
        """Refuse a record with media that the conversation never shows."""
        if left := [name for name, _ in self._members if name not in self._taken]:
            raise DataError(
                "media_count",
                f"the conversation never shows the media {left}; add a marker such as <image> for "
                "each, or leave them out of the record.",
            )


def _turns(document: Any, member: str) -> list[Any]:
    turns = document
    if isinstance(document, dict):
        turns = document.get("messages", document.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise DataError(
            "missing_key",
            f"member {member!r} has no list of turns; expected 'messages' or 'conversations'.",
        )
    return turns


def _message(turn: Any, shelf: _Shelf) -> Message:
    if not isinstance(turn, dict):
        raise DataError("missing_key", f"a turn is a {type(turn).__name__}; expected an object.")
    name, content = (_either(turn, "role", "from"), _either(turn, "content", "value"))
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(
            "unknown_role", f"a turn has the role {shown(name)}; expected one of {[*ROLES]}."
        )
    if isinstance(content, list):
        return Message(role, tuple(_part(part, role, shelf) for part in content))
    return Message(role, _split_markers(as_text(content, f"the text of a {role} turn"), shelf))


def _either(turn: Mapping[str, Any], name: str, other: str) -> Any:
    if name not in turn and other not in turn:
        raise DataError(
            "missing_key", f"a turn has the keys {sorted(turn)}; expected {name!r} or {other!r}."
        )
    return turn.get(name, turn.get(other))


def _part(part: Any, role: Role, shelf: _Shelf) -> Text | Media:
    """One entry of an OpenAI-style content list."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return Text(as_text(part.get("text"), "a text part"))
    if kind == "speech" and role == "assistant":
        return Text(as_text(part.get("text"), "a speech part"), spoken=True)
    if not isinstance(kind, str) or kind not in PART_MODALITIES:
        raise DataError(
            "unknown_part",
            f"a content part has the type {shown(kind)}; expected 'text', one of "
            f"{[*PART_MODALITIES]}, or in an assistant turn 'speech'.",
        )
    modality, span = PART_MODALITIES[kind], (_seconds(part, "start"), _seconds(part, "end"))
    place = name_place(part)
    if place is None:
        media = shelf.next(modality, *span)
    else:
        holder, field = place
        name = as_text(holder[field], f"the name of a {kind} part")
        media = shelf.named(name, modality, *span)
    if part.get("caption") is None:
        return media
    return replace(media, caption=as_text(part["caption"], f"the caption of a {kind} part"))


def name_place(part: Any) -> tuple[dict[str, Any], str] | None:
    """Where a content part names its medium: the object and its field. ``{"image": "0.jpg"}``,
    ``{"path": "0.jpg"}``, ``{"image_url": {"url": "0.jpg"}}``, ``{"input_audio": {"data":
    "wav"}}``; None where it names none, or is no part of media.
    """
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in PART_MODALITIES:
        return None
    modality = PART_MODALITIES[kind]
    for field in (kind, modality, f"{modality}_url", "path", "url"):
        value = part.get(field)
        if isinstance(value, dict):
            inner = [x for x in ("url", "path", "data") if value.get(x) is not None]
            return (value, inner[0]) if inner else None
        if value is not None:
            return part, field
    return None


def _seconds(part: Mapping[str, Any], name: str) -> float | None:
    value = part.get(name)
    if value is None:
        return None
    seconds = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            seconds = float(value)
        except OverflowError:  # JSON has integers of any size
            seconds = math.inf
    if not math.isfinite(seconds):
        raise DataError(
            "bad_span", f"{name!r} of a media part is {shown(value)}; expected seconds."
        )
    return seconds


def _split_markers(text: str, shelf: _Shelf) -> tuple[Text | Media, ...]:
    """Text with ``<image>``, ``<video>``, ``<audio>`` in place of media."""
    pieces = _MARKER.split(text)  # text, modality, text, modality, ..., text
    content: list[Text | Media] = []
    for i, piece in enumerate(pieces):
        if i % 2:
            content.append(shelf.next(piece))
        elif piece:
            content.append(Text(piece))
    return tuple(content)


def _check_order(roles: Sequence[Role]) -> None:
    turns = list(roles[1:] if roles[0] == "system" else roles)
    if not turns or len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        raise DataError(
            "wrong_order",
            f"the conversation has the roles {list(roles)}; expected an optional system turn, then "
            "user and assistant in turn, ending with the assistant.",
        )

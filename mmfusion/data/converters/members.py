"""Reads the members of a record: text, JSON, and which of them are media."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from mmfusion.types import DataError, Media

MODALITY_OF: dict[str, str] = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"), "image"),
    **dict.fromkeys(("ppm",), "image"),
    **dict.fromkeys(("mp4", "mkv", "webm", "mov", "avi", "m4v", "mpg", "mpeg"), "video"),
    **dict.fromkeys(("wav", "flac", "ogg", "oga", "opus", "mp3", "m4a", "aac"), "audio"),
    **dict.fromkeys(("aiff", "au", "wma"), "audio"),
}
"""Modality of a member by the last part of its extension."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def read_text(record: Mapping[str, bytes], name: str) -> str:
    """A member as text.

    Raises:
        DataError: ``missing_member``, ``bad_text``.
    """
    if name not in record:
        raise DataError(
            "missing_member", f"the record has the members {sorted(record)}; expected {name!r}."
        )
    try:
        return record[name].decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError("bad_text", f"member {name!r} is not UTF-8: {error}.") from error


def read_json(record: Mapping[str, bytes], name: str) -> Any:
    """A member as JSON; NaN and infinities are no JSON.

    Raises:
        DataError: ``missing_member``, ``bad_text``, ``bad_json``.
    """
    text = read_text(record, name)
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError("bad_json", f"member {name!r} is not JSON: {error}.") from error


def as_text(value: Any, what: str) -> str:
    """A string that a tokenizer can take.

    Raises:
        DataError: ``bad_text`` for another type or half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise DataError("bad_text", f"{what} is {shown(value)}; expected a string.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError("bad_text", f"{what} is not valid Unicode: {error}.") from error
    return value


def media_members(
    record: Mapping[str, bytes], modality_of: Mapping[str, str]
) -> list[tuple[str, str]]:
    """(name, modality) of the media members in the order of their names, numbers inside them in
    numeric order (``2.jpg`` before ``10.jpg``).
    """
    found = []
    for name in sorted(record, key=_natural):
        modality = modality_of.get(name) or modality_of.get(file_format(name))
        if modality is not None:
            found.append((name, modality))
    return found


def file_format(name: str) -> str:
    """``jpg`` of ``0.jpg``."""
    return name.rsplit(".", 1)[-1].lower()


def media_of(
    record: Mapping[str, bytes],
    name: str,
    modality: str,
    start: float | None = None,
    end: float | None = None,
) -> Media:
    """A member as a media item."""
    return Media(modality, record[name], file_format(name), start, end)


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers compare by how many digits they have, then digit by digit: they may be long."""
    return [
        (len(digits := part.lstrip("0")), digits) if i % 2 else (-1, part)
        for i, part in enumerate(re.split(r"([0-9]+)", name))
    ]


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"it holds {constant}")


def shown(value: Any) -> str:
    """A stranger's value for a message: short, whatever its size and depth."""
    return _SHORT.repr(value)

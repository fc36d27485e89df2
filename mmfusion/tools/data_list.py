"""A list of samples in a JSON, JSONL or CSV file: entries, each with its line, for `data build`."""

from __future__ import annotations

import copy
import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from mmfusion.data.converters.conversation import name_place
from mmfusion.data.converters.members import shown

MEDIA_FIELDS = ("image", "images", "video", "videos", "audio", "audios")
PATH_FIELDS = (*MEDIA_FIELDS, "path", "file", "file_name")
CAPTION_FIELDS = ("caption", "text")
CONVERSATION_FIELDS = ("messages", "conversations")


class BadEntry(ValueError):  # noqa: N818  (an entry, not an error of the program)
    """An entry of a list that makes no sample."""


@dataclass(frozen=True)
class Entry:
    """One sample as a list has it.

    Attributes:
        media: paths as they are written: those of the entry's own fields, then those that content
            parts add, each once.
        caption: the text of a captioned medium; None for a conversation.
        json: the entry itself where it holds more than a path and a caption.
    """

    media: tuple[str, ...]
    caption: str | None
    json: dict[str, Any] | None

    def naming(self, members: Sequence[str]) -> dict[str, Any] | None:
        """``json`` with the content parts naming these members, one for each medium."""
        if self.caption is not None or self.json is None:
            return self.json
        member_of = dict(reversed(list(zip(self.media, members, strict=True))))
        entry = copy.deepcopy(self.json)
        for holder, field in _named_parts(_turns(entry)):
            holder[field] = member_of[holder[field]]
        return entry


def read_list(path: str) -> Iterator[tuple[str, Entry | BadEntry]]:
    """Each entry, or what is wrong with it, with its place (``list.jsonl:3``).

    Raises:
        ValueError: where the list as a whole cannot be read.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is no regular file; the list is read twice, so it must be one")
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv}
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in readers:
        raise ValueError(f"{path}: expected a list that ends in {', '.join(readers)}")
    for place, value in readers[suffix](path):
        try:
            yield place, value if isinstance(value, BadEntry) else parse_entry(value)
        except BadEntry as error:
            yield place, error


def parse_entry(value: Any) -> Entry:
    """A conversation (kept whole, with all media it names) or a captioned medium.

    Raises:
        BadEntry: for anything else.
    """
    if not isinstance(value, dict):
        raise BadEntry(f"expected an object with named fields, got {type(value).__name__}")
    if any(name in value for name in CONVERSATION_FIELDS):
        media = [path for name in MEDIA_FIELDS for path in _paths(name, value.get(name))]
        for holder, field in _named_parts(_turns(value)):
            path = holder[field]
            if not isinstance(path, str) or not path.strip():
                raise BadEntry(f"expected the path of one file in {field!r}, got {shown(path)}")
            if path.startswith("data:") or (field == "data" and not os.path.splitext(path)[1]):
                raise BadEntry("a medium embedded in the text; write it to a file and name that")
            if path not in media:
                media.append(path)
        return Entry(tuple(media), None, value)
    path = value[_one_of(PATH_FIELDS, value)]
    caption = value[_one_of(CAPTION_FIELDS, value)]
    if not isinstance(path, str) or not path.strip():
        raise BadEntry(f"expected the path of one file, got {shown(path)}")
    if not isinstance(caption, str) or not caption.strip():
        raise BadEntry(f"expected a caption, got {shown(caption)}")
    return Entry((path,), caption, value if len(value) > 2 else None)


def _one_of(names: tuple[str, ...], value: dict[str, Any]) -> str:
    present = [name for name in names if name in value]
    if len(present) != 1:
        raise BadEntry(f"expected exactly one of the fields {names}, got {sorted(value)}")
    return present[0]


def _paths(name: str, value: Any) -> list[str]:
    """A path or a list of them; null stands for none."""
    paths = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(path, str) and path.strip() for path in paths):
        raise BadEntry(f"{name!r} must be a path or a list of paths, got {shown(value)}")
    return paths


def _turns(value: dict[str, Any]) -> list[Any]:
    name = next(name for name in CONVERSATION_FIELDS if name in value)
    if not isinstance(value[name], list) or not value[name]:
        raise BadEntry(f"{name!r} must be a list of turns, not empty")
    return value[name]


def _named_parts(turns: list[Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the parts of OpenAI-style content lists name their media."""
    for turn in turns:
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else ():
            if (place := name_place(part)) is not None:
                yield place


def _read_jsonl(path: str) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(
                    line.decode("utf-8-sig" if number == 1 else "utf-8"),
                    parse_constant=_refuse_constant,
                )
            except (ValueError, RecursionError) as error:
                value = BadEntry(f"not a line of JSON: {error}")
            yield f"{path}:{number}", value


def _read_json(path: str) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8-sig") as file:
        try:
            values = json.load(file, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, list):
        raise ValueError(
            f"{path}: expected a list of samples, got {type(values).__name__}; one object a line "
            "is .jsonl"
        )
    for number, value in enumerate(values):
        yield f"{path}[{number}]", value


def _read_csv(path: str) -> Iterator[tuple[str, Any]]:
    delimiter = "\t" if path.lower().endswith(".tsv") else ","
    with open(path, "rb") as file:
        rows = csv.DictReader(_decode_lines(path, file), delimiter=delimiter, strict=True)
        try:
            _check_columns(path, rows.fieldnames or [])
            for row in rows:
                whole = None not in row and None not in row.values()
                wrong = f"expected {len(rows.fieldnames or [])} values, as in the first line"
                yield f"{path}:{rows.line_num}", row if whole else BadEntry(wrong)
        except csv.Error as error:
            raise ValueError(f"{path}:{rows.reader.line_num} cannot be read: {error}") from None


def _decode_lines(path: str, file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number} cannot be read: {error}") from None


def _check_columns(path: str, names: Any) -> None:
    try:
        _one_of(PATH_FIELDS, dict.fromkeys(names))
        _one_of(CAPTION_FIELDS, dict.fromkeys(names))
    except BadEntry as error:
        raise ValueError(
            f"{path}: the first line must name the columns, e.g. path,caption: {error}"
        ) from None
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: a column name comes twice in {names}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")

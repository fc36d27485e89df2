"""A strict reader of plain tar files, and WebDataset's rule for naming samples in them.

Python's ``tarfile`` takes a damaged header for the end of the archive, and everything after it is
lost without a word. Here whatever is not understood is an error that says where. Used on whole
files by :mod:`mmfusion.data.index` and on the bytes of one sample by :mod:`mmfusion.data.shards`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)
MAX_EXTENDED_HEADER = 1 << 20
"""Bytes of a GNU long name or pax header; more is taken for damage."""

Read = Callable[[int, int], bytes]
"""``read(offset, length)``: at most ``length`` bytes, fewer only at the end of the file."""

_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=\n]+)=")
_OCTAL = re.compile(rb"[ \0]*([0-7]+)[ \0]*$")
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")
_REGULAR = frozenset([b"0", b"\0", b"7"])
_DIRECTORY, _PAX_GLOBAL, _GNU_LONG_NAME, _GNU_LONG_LINK = b"5", b"g", b"L", b"K"
_EXTENDED = frozenset([b"x", b"X", _PAX_GLOBAL, _GNU_LONG_NAME, _GNU_LONG_LINK])
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}


class TarError(ValueError):
    """Something in a tar that is damaged or not supported.

    Args:
        problem: what was found, and what was expected.
        offset: bytes from the start of what was read.
    """

    def __init__(self, problem: str, offset: int) -> None:
        super().__init__(f"{problem} (at byte {offset})")
        self.offset = offset


class Member(NamedTuple):
    """A regular file in a tar.

    Attributes:
        name: its whole name.
        start: offset of its first header (that of its long name, where it has one).
        data, size: offset and length of its content.
    """

    name: str
    start: int
    data: int
    size: int


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member, as webdataset has them: split at the first dot of the last
    path component, extension in lower case. None for a name without both.
    """
    match = _NAME.match(name)
    return (match[1], match[2].lower()) if match else None


def is_meta(name: str) -> bool:
    """Whether readers of WebDataset skip the member: ``__x__`` or below a folder ``__x__/``."""
    return _META.match(name) is not None


class Members:
    """The regular files between two offsets of a tar, in order. Directories are passed over; links,
    sparse files and whatever else is refused.

    Args:
        read: gives bytes of the tar.
        stop: end of the tar.

    Attributes:
        offset: of the next header; after iteration that of the first zero block, or ``stop``.
    """

    def __init__(self, read: Read, stop: int) -> None:
        self.offset = 0
        self._read, self._stop = read, stop

    def __iter__(self) -> Iterator[Member]:
        start: int | None = None
        extended: dict[str, str] = {}
        while self.offset < self._stop:
            at = self.offset
            header = self._read(at, BLOCK)
            if header == ZERO_BLOCK:
                break
            kind, short_name, size = parse_header(header, at)
            if kind in _EXTENDED:
                self._read_extended(kind, size, extended)
                # tarfile, and so Energon's index, counts a global header to no member
                if start is None and kind != _PAX_GLOBAL:
                    start = at
                continue
            name = extended.get("path") or _text(short_name, at)
            if kind == _DIRECTORY or (kind == b"\0" and name.endswith("/")):
                _check(size == 0, f"directory {name!r} with content", at)
                self.offset = at + BLOCK
            elif kind in _REGULAR:
                if "size" in extended:
                    size = _decimal(extended["size"], at)
                self._skip(at, size, name)
                yield Member(name, at if start is None else start, at + BLOCK, size)
            else:
                raise TarError(f"{name!r} is {_describe(kind)}: not supported", at)
            if start is not None or extended:
                start, extended = None, {}
        _check(start is None, "long name or pax header without a member after it", self.offset)

    def _read_extended(self, kind: bytes, size: int, extended: dict[str, str]) -> None:
        at = self.offset
        _check(size <= MAX_EXTENDED_HEADER, f"extended header of {size} bytes", at)
        self._skip(at, size, "extended header")
        body = self._read(at + BLOCK, size)
        if kind == _GNU_LONG_NAME:
            extended.setdefault("path", _text(body.split(b"\0", 1)[0], at))
        elif kind != _GNU_LONG_LINK:
            records = _parse_pax(body, at)
            _check(
                not any(key.startswith("GNU.sparse") for key in records), "sparse file (pax)", at
            )
            _check(
                kind != _PAX_GLOBAL or not records.keys() & {"path", "size"},
                "global pax header that names or sizes every member",
                at,
            )
            for key in records.keys() & {"path", "size"}:
                extended.setdefault(key, records[key])

    def _skip(self, at: int, size: int, name: str) -> None:
        padded = at + BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK
        if padded > self._stop:
            left = self._stop - at - BLOCK
            raise TarError(
                f"truncated in the padding after {name!r}"
                if size <= left
                else f"truncated: {name!r} has {size} bytes, the file ends after {left}",
                at,
            )
        self.offset = padded


def parse_header(header: bytes, at: int) -> tuple[bytes, bytes, int]:
    """(type, name, size) of one header block; a name may be cut where a longer one came before.

    Raises:
        TarError: where it is none.
    """
    if len(header) != BLOCK:
        raise TarError(f"truncated in a header ({len(header)} of {BLOCK} bytes)", at)
    # the checksum field itself counts as eight spaces: 256
    stated = header[148:156]
    difference = sum(header) - sum(stated) + 256 - _number(stated, at, "checksum")
    if difference and difference != 256 * _high_bytes(header):
        raise TarError("header checksum does not fit: damaged, or not a tar header", at)
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    kind = header[156:157]
    return kind, name, _number(header[124:136], at, "size")


def _number(field: bytes, at: int, what: str) -> int:
    """An octal number, or GNU's base 256 where the top bit is set."""
    if field[0] & 0x80:
        _check(field[0] == 0x80, f"{what} negative or beyond all bounds", at)
        return int.from_bytes(field[1:], "big")
    match = _OCTAL.match(field)
    if match is not None:
        return int(match[1], 8)
    _check(not field.strip(b" \0"), f"{what} {field!r} is not an octal number", at)
    return 0


def _high_bytes(header: bytes) -> int:
    """How many bytes outside the checksum old writers counted as negative."""
    return sum(byte > 127 for byte in header[:148] + header[156:])


def _decimal(text: str, at: int) -> int:
    _check(text.isascii() and text.isdecimal(), f"pax size {text!r} is not a number", at)
    return int(text)


def _text(name: bytes, at: int) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        raise TarError(f"name {name!r} is not UTF-8", at) from None


def _parse_pax(body: bytes, at: int) -> dict[str, str]:
    """Records of length, key and value; other values than path and size may be binary."""
    records, position = {}, 0
    while position < len(body):
        match = _PAX_RECORD.match(body, position)
        length = int(match[1]) if match else 0
        end = position + length
        _check(
            match is not None and match.end() < end <= len(body) and body[end - 1 : end] == b"\n",
            "damaged pax header",
            at,
        )
        assert match is not None
        value = body[match.end() : end - 1]
        key = match[2].decode("utf-8", "replace")
        records[key] = _text(value, at) if key in ("path", "size") else ""
        position = end
    return records


def _describe(kind: bytes) -> str:
    return _REFUSED.get(kind, f"a member of type {kind!r}")


def _check(good: bool, problem: str, at: int) -> None:
    if not good:
        raise TarError(problem, at)

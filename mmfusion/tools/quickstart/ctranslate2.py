"""Reads the variables of a CTranslate2 model file (format version 6) without that library.

Layout, little-endian: u32 version, string specification, u32 revision, u32 count, then for each
variable: string name, u8 rank, u32 dimensions, u8 type, u32 bytes, data; then u32 aliases (two
strings each). A string is a u16 length with its final zero byte counted, then the bytes.
Source: the library's ``Model::load`` (github.com/OpenNMT/CTranslate2, src/models/model.cc).
"""

from __future__ import annotations

import struct

import numpy as np

VERSION = 6
_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


class _Cursor:
    """Walks over a buffer; every read past its end is an error."""

    def __init__(self, buffer: bytes) -> None:
        self.buffer = memoryview(buffer)
        self.offset = 0

    def take(self, size: int) -> memoryview:
        piece = self.buffer[self.offset : self.offset + size]
        if len(piece) < size:
            raise ValueError(
                f"CTranslate2 file ends early: {size} bytes wanted at offset {self.offset}, the "
                f"file has {len(self.buffer)}. Remove the downloaded parts and fetch them again."
            )
        self.offset += size
        return piece

    def number(self, code: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return bytes(self.take(self.number("H"))[:-1]).decode()


def read_variables(buffer: bytes) -> tuple[str, dict[str, np.ndarray]]:
    """All variables of a model file.

    Args:
        buffer: the whole file; the arrays are views into it.

    Returns:
        The specification's name (``WhisperSpec``) and name -> array, aliases resolved.

    Raises:
        ValueError: another format version, an unknown type, a size that does not match, an early
            or a late end.
    """
    cursor = _Cursor(buffer)
    if (version := cursor.number("I")) != VERSION:
        raise ValueError(f"CTranslate2 file has format version {version}, expected {VERSION}.")
    specification = cursor.string()
    cursor.number("I")
    variables = dict(_variable(cursor) for _ in range(cursor.number("I")))
    for _ in range(cursor.number("I")):
        alias, name = cursor.string(), cursor.string()
        variables[alias] = variables[name]
    if cursor.offset != len(buffer):
        raise ValueError(
            f"CTranslate2 file has {len(buffer) - cursor.offset} bytes after its end; expected none"
        )
    return specification, variables


def _variable(cursor: _Cursor) -> tuple[str, np.ndarray]:
    name = cursor.string()
    shape = [cursor.number("I") for _ in range(cursor.number("B"))]
    code, size = cursor.number("B"), cursor.number("I")
    if code not in _TYPES:
        raise ValueError(f"CTranslate2 variable {name!r} has type {code}, expected 0 to 4.")
    dtype = np.dtype(_TYPES[code]).newbyteorder("<")
    if size != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
        raise ValueError(
            f"CTranslate2 variable {name!r} of shape {shape} and type {dtype} says {size} bytes, "
            f"which does not fit."
        )
    return name, np.frombuffer(cursor.take(size), dtype).reshape(shape)

"""Files that appear whole or not at all: written aside in the same folder, fsynced, renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import BinaryIO


def temporary_path(path: str) -> str:
    """A name beside ``path`` that no shard pattern matches."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def publish(temporary: str, path: str) -> None:
    """Give a finished, fsynced file its name."""
    os.replace(temporary, path)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Give an OSError of a write, such as a full disk's, the name of the file."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = path
        raise


@contextlib.contextmanager
def write_whole(path: str) -> Iterator[BinaryIO]:
    """Open a new file that gets the name ``path`` when the block ends without an exception."""
    temporary = temporary_path(path)
    try:
        with naming(path):
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)

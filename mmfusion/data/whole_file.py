"""Files that appear whole or not at all: written aside in the same folder, fsynced, renamed; and
the lock of what takes several.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
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
    """Open a new file, to write and read, that gets the name ``path`` when the block ends without
    an exception.
    """
    temporary = temporary_path(path)
    try:
        with naming(path):
            with open(temporary, "x+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@contextlib.contextmanager
def alone(path: str, work: str) -> Iterator[None]:
    """Hold a lock file as long as the block runs; where the process is killed it is free at once.

    Args:
        path: of the lock file; its folder is made, and it is removed in the end.
        work: what is done in the block, for the error.

    Raises:
        ValueError: where another process holds it.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN, errno.ENOENT):
                raise
            held = False
        if not held:  # or it was removed, and made anew, after it was opened here
            raise ValueError(
                f"another process is {work} (it holds {path}); wait for it, stop it, or choose "
                "another folder."
            )
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)

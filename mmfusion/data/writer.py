"""Records -> WebDataset shards, each with its index; read back by :mod:`mmfusion.data.shards`."""

from __future__ import annotations

import contextlib
import io
import os
import re
import tarfile
from collections.abc import Mapping
from types import TracebackType

from mmfusion.data.index import Offsets, scan, write_index
from mmfusion.data.whole_file import publish, temporary_path

_NUMBER = re.compile(r"%0?\d*d")


class ShardWriter:
    """Writes numbered tars, each with its index. They appear together when all are complete, or not
    at all: a part of a data set would be read as if it were whole. The same records give the same
    bytes.

    Use it as a context manager: where the block ends with an exception, nothing is made.

    Args:
        pattern: path with a number, e.g. ``data/train-%06d.tar``.
        max_samples: samples in a shard.
        max_bytes: bytes of records in a shard; a larger record gets a shard of its own.
        overwrite: remove all earlier shards of this pattern once the new ones are complete. Without
            it their presence is an error, so that no old shard stays among new ones.

    Attributes:
        paths: the shards, once they are there.
        num_samples: records written so far.
    """

    def __init__(
        self,
        pattern: str,
        max_samples: int = 10_000,
        max_bytes: int = 1 << 30,
        overwrite: bool = False,
    ) -> None:
        folder, name = os.path.split(pattern)
        if len(_NUMBER.findall(name)) != 1 or not name.endswith(".tar"):
            raise ValueError(
                f"shard pattern {pattern!r} must end in .tar and hold one number such as %06d"
            )
        if max_samples < 1 or max_bytes < 1:
            raise ValueError(f"max_samples={max_samples} and max_bytes={max_bytes} must be >= 1")
        os.makedirs(folder or ".", exist_ok=True)
        self._pattern, self._max_samples, self._max_bytes = pattern, max_samples, max_bytes
        self._folder = folder or "."
        start, end = map(re.escape, _NUMBER.split(name))
        self._names = re.compile(rf"{start}\d+{end}(\.idx)?")
        left_behind = re.compile(rf"\.{self._names.pattern}\.\d+-[0-9a-f]+\.tmp")  # by a kill
        for found in os.listdir(self._folder):
            if left_behind.fullmatch(found):
                os.unlink(os.path.join(self._folder, found))
        if (present := self._present()) and not overwrite:
            raise FileExistsError(
                f"{self._folder} already holds {present[0]} and {len(present) - 1} more files of "
                f"{pattern}; choose another name, or overwrite them (overwrite=True)"
            )
        self.paths: list[str] = []
        self.num_samples = 0
        self._shard: _OpenTar | None = None
        self._complete: list[tuple[str, Offsets]] = []

    def write(self, key: str, record: Mapping[str, bytes]) -> None:
        """Append a record.

        Args:
            key: the sample's name; unique in the shard, without dots and slashes.
            record: extension without its leading dot (``jpg``, ``json``, ``0.jpg``) to content; the
                files are written in this order.

        Raises:
            ValueError: for a key or an extension that readers would not give back as it is.
        """
        _check_key(key)
        _check_record(key, record)
        size = sum(len(content) for content in record.values())
        full = self._shard is not None and (
            len(self._shard.keys) >= self._max_samples
            or self._shard.num_bytes + size > self._max_bytes
        )
        if full:
            self._finish()
        if self._shard is None:
            self._shard = _OpenTar(temporary_path(self._pattern % len(self._complete)))
        if key in self._shard.keys:
            raise ValueError(f"key {key!r} was already written; keys must be unique")
        self._shard.add(key, record)
        self.num_samples += 1

    def close(self) -> None:
        """Finish the last shard and give all of them their names."""
        if self._shard is not None:
            self._finish()
        for name in self._present():  # only where they may be overwritten
            os.unlink(os.path.join(self._folder, name))
        self.paths = [self._pattern % number for number in range(len(self._complete))]
        for path, (temporary, offsets) in zip(self.paths, self._complete, strict=True):
            write_index(path, offsets)  # first: no tar is ever seen without its index
            publish(temporary, path)
        self._complete = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._abort()

    def _finish(self) -> None:
        assert self._shard is not None
        self._shard.close()
        self._complete.append((self._shard.path, scan(self._shard.path)))
        self._shard = None

    def _abort(self) -> None:
        temporary = [path for path, _ in self._complete]
        if self._shard is not None:
            self._shard.file.close()
            temporary.append(self._shard.path)
        for path in temporary:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self._shard, self._complete = None, []

    def _present(self) -> list[str]:
        return sorted(name for name in os.listdir(self._folder) if self._names.fullmatch(name))


class _OpenTar:
    """A tar under way, under a temporary name."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.keys: set[str] = set()
        self.num_bytes = 0
        self.file = open(path, "xb")  # noqa: SIM115  (open from write to write)
        self._tar = tarfile.TarFile(fileobj=self.file, mode="w", format=tarfile.PAX_FORMAT)

    def add(self, key: str, record: Mapping[str, bytes]) -> None:
        for extension, content in record.items():
            # a TarInfo's own defaults are fixed: time 0, user 0, mode 644
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(content)
            self._tar.addfile(info, io.BytesIO(content))
            self.num_bytes += len(content)
        self.keys.add(key)

    def close(self) -> None:
        self._tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def _check_key(key: str) -> None:
    if not key or "." in key or "/" in key or "\0" in key or key.startswith("__"):
        raise ValueError(
            f"key {key!r}: expected a name without dots (the first one starts the extension) and "
            "slashes, not empty and not starting with __; replace them, e.g. by -"
        )
    _check_encodable(key)


def _check_record(key: str, record: Mapping[str, bytes]) -> None:
    if not record:
        raise ValueError(f"record {key!r} holds no files; expected at least one extension")
    for extension, content in record.items():
        odd = extension != extension.lower() or "/" in extension or "\0" in extension
        if not extension or odd or extension.startswith((".", "__")):
            raise ValueError(
                f"extension {extension!r} of {key!r}: expected lower case without a leading dot, "
                "slashes or a leading __, such as jpg or 0.jpg"
            )
        _check_encodable(extension)
        if not isinstance(content, bytes):
            raise TypeError(f"{key}.{extension} is {type(content).__name__}, expected bytes")


def _check_encodable(name: str) -> None:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"name {name!r} cannot be written as UTF-8") from None

"""Records -> WebDataset shards, each with its index; read back by :mod:`mmfusion.data.shards`."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import tarfile
from collections.abc import Mapping
from types import TracebackType

from mmfusion.data.index import CONTROL, index_path, scan, write_index
from mmfusion.data.whole_file import naming, publish, temporary_path

logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"%0?\d*d")


class ShardWriter:
    """Writes numbered tars, each with its index. They get their names together when all are
    complete, and none where anything fails: a part of a data set would be read as if it were whole.
    The same records give the same bytes.

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
        rest = _NUMBER.sub("", name)
        if len(_NUMBER.findall(name)) != 1 or "%" in rest or not name.endswith(".tar"):
            raise ValueError(
                f"shard pattern {pattern!r} must end in .tar and hold one number such as %06d"
            )
        if max_samples < 1 or max_bytes < 1:
            raise ValueError(f"max_samples={max_samples} and max_bytes={max_bytes} must be >= 1")
        os.makedirs(folder or ".", exist_ok=True)
        self._pattern, self._max_samples, self._max_bytes = pattern, max_samples, max_bytes
        self._folder, self._name = folder, name
        self._overwrite = overwrite
        start, end = map(re.escape, _NUMBER.split(name))
        self._names = re.compile(rf"{start}\d+{end}(\.idx)?")
        self._refuse_present()
        aside = r"\.\d+-[0-9a-f]+\.tmp"
        left = rf"\.\.?{start}\d+{end}(\.idx)?{aside}(\.idx({aside})?)?"
        self._clear_left_behind(re.compile(left))
        self.paths: list[str] = []
        self.num_samples = 0
        self._shard: _OpenTar | None = None
        self._complete: list[str] = []
        """Complete shards under temporary names, each with its index beside it."""

    def write(self, key: str, record: Mapping[str, bytes]) -> None:
        """Append a record.

        Args:
            key: the sample's name; unique in the shard, without dots; it may have folders.
            record: extension without its leading dot (``jpg``, ``json``, ``0.jpg``) to content; the
                files are written in this order.

        Raises:
            ValueError: for a key or an extension that readers would not give back as it is.
            OSError: naming the file, where it cannot be written (a full disk).
        """
        assert not self.paths, "the writer was closed"
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
            self._shard = _OpenTar(temporary_path(self._path(len(self._complete))))
        if key in self._shard.keys:
            raise ValueError(f"key {key!r} was already written; keys must be unique")
        self._shard.add(key, record)
        self.num_samples += 1

    def close(self) -> None:
        """Finish the last shard and give all of them their names.

        Raises:
            FileExistsError: shards of this pattern came there meanwhile.
        """
        try:
            if self._shard is not None:
                self._finish()
            self._publish()
        except BaseException:
            self._abort()
            raise

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
        path = self._shard.path
        self._shard.close()
        self._shard = None
        self._complete.append(path)
        write_index(path, scan(path))

    def _publish(self) -> None:
        """Only renames are left to do. Where one fails, the earlier shards get their names back."""
        if not self._complete:
            return
        self._refuse_present()
        earlier = [os.path.join(self._folder, name) for name in self._present()]
        aside = {path: temporary_path(path) for path in earlier}
        try:
            for path in earlier:
                os.rename(path, aside[path])
            for number, temporary in enumerate(self._complete):
                path = self._path(number)
                self.paths.append(path)
                publish(index_path(temporary), index_path(path))  # no tar is seen without its index
                publish(temporary, path)
        except BaseException:
            self._abort()
            for path in earlier:
                if os.path.lexists(aside[path]):
                    os.rename(aside[path], path)
            raise
        self._complete = []
        for path in aside.values():
            os.unlink(path)

    def _path(self, number: int) -> str:
        return os.path.join(self._folder, self._name % number)

    def _abort(self) -> None:
        """Leave nothing behind."""
        unfinished = [] if self._shard is None else [self._shard.path]
        for path in [*unfinished, *self._complete, *self.paths]:
            for file in (path, index_path(path)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file)
        if self._shard is not None:
            with contextlib.suppress(OSError):  # what was not yet written does not fit either
                self._shard.file.close()
        self._shard, self._complete, self.paths = None, [], []

    def _present(self) -> list[str]:
        return sorted(
            name for name in os.listdir(self._folder or ".") if self._names.fullmatch(name)
        )

    def _refuse_present(self) -> None:
        if (present := self._present()) and not self._overwrite:
            raise FileExistsError(
                f"{self._folder or '.'} already holds {present[0]} and {len(present) - 1} more "
                f"files of {self._pattern}; choose another name, or overwrite them "
                "(--overwrite of `mmfusion data build`, overwrite=True in Python)"
            )

    def _clear_left_behind(self, temporary: re.Pattern[str]) -> None:
        """What a killed writer left. Without ``overwrite`` it may be of one that still writes."""
        found = [name for name in os.listdir(self._folder or ".") if temporary.fullmatch(name)]
        if found and not self._overwrite:
            logger.warning(
                "%s holds %d unfinished files of a build that was killed or still runs (%s ...); "
                "remove them if it was killed",
                self._folder,
                len(found),
                sorted(found)[0],
            )
            return
        for name in found:
            os.unlink(os.path.join(self._folder, name))


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
            with naming(self.path):
                self._tar.addfile(info, io.BytesIO(content))
            self.num_bytes += len(content)
        self.keys.add(key)

    def close(self) -> None:
        with naming(self.path):
            self._tar.close()
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()


def _check_key(key: str) -> None:
    names = key.split("/")  # folders, where there are any: a path that stays below where it is
    odd = any(not name or name.startswith("__") for name in names)
    if odd or "." in key or CONTROL.search(key):
        raise ValueError(
            f"key {key!r}: expected a name, or folders and a name with / between them, none of "
            "them empty or starting with __, without dots (the first one starts the extension) and "
            "control characters; replace them, e.g. by -"
        )
    _check_encodable(key)


def _check_record(key: str, record: Mapping[str, bytes]) -> None:
    if not record:
        raise ValueError(f"record {key!r} holds no files; expected at least one extension")
    for extension, content in record.items():
        odd = extension != extension.lower() or "/" in extension or CONTROL.search(extension)
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

"""The ordered shards of one source: sample number -> (record, shard, key), by one read.

Shards are plain tars with an index beside each (:mod:`mmfusion.data.index`). What they hold was
checked when they were indexed; here only what can change since is looked at. A failing read is
tried again and then stops the run: a sample that is skipped for it would make two runs differ.
"""

from __future__ import annotations

import bisect
import errno
import hashlib
import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mmfusion.data.index import (
    MAX_RECORD_BYTES,
    Offsets,
    ShardError,
    check_index,
    index_command,
    load_index,
    shard_digest,
)
from mmfusion.data.shard_list import find_shards
from mmfusion.data.tar import Members, TarError, is_meta, split_name
from mmfusion.types import DataError

logger = logging.getLogger(__name__)

_OPEN_SHARDS = 128
_CHECKING_THREADS = 16


class ShardReadError(OSError):
    """Bytes of a shard could not be had, or are not those that were indexed."""


class Shards:
    """The samples of one source, in the order of its shards.

    Picklable; safe in forked and spawned processes and in threads.

    Args:
        patterns: files, folders, globs and brace lists, see :mod:`mmfusion.data.shard_list`.
        max_record_bytes: a larger sample is a DataError (``record_too_large``).
        retries: how often a failing read is tried again.
        backoff: seconds before the first retry; doubles with each.

    Attributes:
        paths: the shards.
        counts: samples in each.
        dataset_id: hash of the shards in order: names (below their common folder), counts and
            digests. Other data, or the same in another order, has another; a copy has the same.
    """

    def __init__(
        self,
        patterns: str | Sequence[str],
        max_record_bytes: int = MAX_RECORD_BYTES,
        retries: int = 4,
        backoff: float = 0.25,
    ) -> None:
        self.paths = find_shards(patterns)
        with ThreadPoolExecutor(min(_CHECKING_THREADS, len(self.paths))) as pool:
            checked = list(pool.map(_check, self.paths))
        self.counts = [count for count, _, _ in checked]
        self._sizes = [size for _, size, _ in checked]
        digests = [digest for _, _, digest in checked]
        self.dataset_id = _dataset_id(self.paths, self.counts, digests)
        self._starts = [0]
        for count in self.counts:
            self._starts.append(self._starts[-1] + count)
        self._max_record_bytes, self._retries, self._backoff = max_record_bytes, retries, backoff
        self._open = _OpenShards()

    def __len__(self) -> int:
        return self._starts[-1]

    def locate(self, i: int) -> tuple[str, int]:
        """Shard of sample ``i``, and the sample's number in it."""
        shard, number = self._locate(i)
        return self.paths[shard], number

    def read(self, i: int) -> tuple[dict[str, bytes], str, str]:
        """Sample ``i``: its files by extension, the path of its shard, its key.

        Raises:
            DataError: where it is larger than ``max_record_bytes``.
            ShardReadError: where it cannot be read after all retries, or the shard has changed.
        """
        shard, number = self._locate(i)
        for attempt in range(self._retries + 1):
            try:
                record, key = self._read(shard, number)
                return record, self.paths[shard], key
            except OSError as error:
                self._open.forget(shard)
                failure = error
            if attempt < self._retries:
                pause = self._backoff * 2**attempt
                logger.warning("%s; trying again in %.3g s", failure, pause)
                time.sleep(pause)
        raise ShardReadError(
            f"sample {number} of {self.paths[shard]} could not be read in {self._retries + 1} "
            f"attempts: {failure}. Nothing is skipped for this; the run can go on from its last "
            "checkpoint once the file can be read as it was."
        ) from failure

    def where(self, i: int) -> tuple[str, str]:
        """Path of the shard of sample ``i`` and its key, for messages; where the record itself is
        unusable, its number in the shard.
        """
        try:
            return self.read(i)[1:]
        except DataError:
            shard, number = self.locate(i)
            return shard, f"#{number}"

    def _locate(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of a source with {len(self)} samples")
        shard = bisect.bisect_right(self._starts, i) - 1
        return shard, i - self._starts[shard]

    def _read(self, shard: int, number: int) -> tuple[dict[str, bytes], str]:
        file = self._open.get(shard) or self._open_shard(shard)
        start, end = file.offsets[number].item(), file.offsets[number + 1].item()
        if end - start > self._max_record_bytes:
            raise DataError(
                "record_too_large",
                f"sample {number} of {self.paths[shard]} has {end - start} bytes, at most "
                f"{self._max_record_bytes} are read; make it smaller or raise max_record_bytes.",
            )
        content = os.pread(file.descriptor, end - start, start)
        if len(content) != end - start:
            raise ShardReadError(
                f"{self.paths[shard]}: got {len(content)} of {end - start} bytes at {start}"
            )
        try:
            return _parse_record(content)
        except TarError as error:
            raise ShardReadError(
                f"{self.paths[shard]}: sample {number} at byte {start} is not what was indexed: "
                f"{error}. If the shard was replaced, run: "
                f"{index_command(self.paths[shard], force=True)}"
            ) from None

    def _open_shard(self, shard: int) -> _OpenShard:
        path = self.paths[shard]
        try:
            offsets = self._open.make_room(lambda: load_index(path))
        except ShardError as error:
            raise ShardReadError(str(error)) from None
        flags = os.O_RDONLY | os.O_CLOEXEC
        file = _OpenShard(self._open.make_room(lambda: os.open(path, flags)), offsets)
        size = os.fstat(file.descriptor).st_size
        if (size, len(offsets) - 1) != (self._sizes[shard], self.counts[shard]):
            raise ShardReadError(
                f"{path} or its index changed since the run started: {size} bytes and "
                f"{len(offsets) - 1} samples, expected {self._sizes[shard]} and "
                f"{self.counts[shard]}"
            )
        self._open.add(shard, file)
        return file


class _OpenShard:
    """A descriptor, closed when nobody uses it any more (another thread may still read), and the
    shard's offsets.
    """

    def __init__(self, descriptor: int, offsets: Offsets) -> None:
        self.descriptor, self.offsets = descriptor, offsets

    def __del__(self) -> None:
        os.close(self.descriptor)


class _OpenShards:
    """The shards that were used last. Empty after pickling and in a forked child."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._files: OrderedDict[int, _OpenShard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reset()

    def get(self, shard: int) -> _OpenShard | None:
        if self._process != os.getpid():
            self._reset()
        with self._lock:
            file = self._files.get(shard)
            if file is not None:
                self._files.move_to_end(shard)
            return file

    def add(self, shard: int, file: _OpenShard) -> None:
        with self._lock:
            self._files[shard] = file
            while len(self._files) > _OPEN_SHARDS:
                self._files.popitem(last=False)

    def forget(self, shard: int) -> None:
        with self._lock:
            self._files.pop(shard, None)

    def make_room(self, function: Any) -> Any:
        """Call a function that opens a file; where the process has too many, close half of ours."""
        while True:
            try:
                return function()
            except OSError as error:
                with self._lock:
                    if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._files:
                        raise
                    for _ in range((len(self._files) + 1) // 2):
                        self._files.popitem(last=False)


def _parse_record(content: bytes) -> tuple[dict[str, bytes], str]:
    """Files by extension, and the key, of the bytes between two sample offsets."""
    record: dict[str, bytes] = {}
    key = None
    members = Members(lambda offset, length: content[offset : offset + length], len(content))
    for name, start, data, size in members:
        if is_meta(name):
            continue
        parts = split_name(name)
        if parts is None or parts[1] in record or key not in (None, parts[0]):
            raise TarError(f"{name!r} is not part of sample {key!r}", start)
        key, extension = parts
        record[extension] = content[data : data + size]
    if key is None or members.offset != len(content):
        raise TarError("the sample ends early", members.offset)
    return record, key


def _check(path: str) -> tuple[int, int, str]:
    """(samples, bytes, digest) of a shard, where its index fits."""
    offsets = load_index(path)
    check_index(path, offsets)
    return len(offsets) - 1, os.stat(path).st_size, shard_digest(path, offsets)


def _dataset_id(paths: list[str], counts: list[int], digests: list[str]) -> str:
    whole = [os.path.abspath(path) for path in paths]
    folder = os.path.commonpath([os.path.dirname(path) for path in whole])
    names = [os.path.relpath(path, folder) for path in whole]
    shards = list(zip(names, counts, digests, strict=True))
    return hashlib.blake2b(json.dumps(shards).encode(), digest_size=16).hexdigest()

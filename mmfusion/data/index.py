"""Where each sample of a shard starts: the side file ``<shard>.tar.idx``.

Little-endian u64 offsets, one a sample and a last one for the end of the samples; the same bytes
as Megatron-Energon's. :func:`scan` makes them from the headers of a tar and refuses, with the
place and the cause, every shard of which a sample could get lost.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex

import numpy as np
from numpy.typing import NDArray

from mmfusion.data.tar import (
    BLOCK,
    ZERO_BLOCK,
    Members,
    Read,
    TarError,
    is_meta,
    parse_header,
    split_name,
)
from mmfusion.data.whole_file import write_whole

Offsets = NDArray[np.uint64]
MAX_RECORD_BYTES = 1 << 30
"""Bytes of a sample in its shard above which it is not read."""

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PK\x03\x04": "zip",
}
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_MOST_LISTED = 5
_BORDERS = 8


class ShardError(ValueError):
    """A shard or an index that cannot be trusted."""


def index_path(shard: str) -> str:
    """The index beside a shard."""
    return f"{shard}.idx"


def index_command(shard: str, force: bool = False) -> str:
    """The command that makes (or makes again) the index of a shard."""
    return f"mmfusion data index {shlex.quote(shard)}" + (" --force true" if force else "")


def scan(path: str) -> Offsets:
    """Sample offsets of a tar, from its headers: (N + 1,), the last is the end of the samples.

    Raises:
        ShardError: where the tar is damaged, truncated, compressed or concatenated, or holds names
            that WebDataset readers would drop, split or overwrite.
    """
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size

        def read(offset: int, length: int) -> bytes:
            return os.pread(file.fileno(), length, offset)

        _refuse_foreign(path, size, read(0, 8))
        members = Members(read, size)
        samples = _Samples()
        try:
            for member in members:
                samples.add(member.name, member.start)
        except TarError as error:
            raise ShardError(
                f"{path}: {error}. {len(samples.starts)} samples were read before it; none is used."
                " Make or fetch the shard again."
            ) from None
        problem = _problem_at_end(read, members.offset, size)
    if problem:
        raise ShardError(f"{path}: {problem}")
    if samples.problems:
        listed = "\n  ".join(samples.problems[:_MOST_LISTED])
        more = len(samples.problems) - _MOST_LISTED
        raise ShardError(
            f"{path}: {len(samples.problems)} names that do not make samples:\n  {listed}"
            + (f"\n  and {more} more" if more > 0 else "")
            + "\nA sample is a run of adjacent files KEY.EXTENSION with the same KEY (up to the "
            "first dot of the file name) and different extensions. Write the shard again."
        )
    return np.array([*samples.starts, members.offset], dtype="<u8")


def write_index(path: str, offsets: Offsets) -> None:
    """Write the index of shard ``path``, whole or not at all."""
    with write_whole(index_path(path)) as file:
        file.write(offsets.astype("<u8").tobytes())


def load_index(path: str) -> Offsets:
    """The index of shard ``path``.

    Raises:
        ShardError: where it is missing or is no index.
    """
    side = index_path(path)
    try:
        with open(side, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        raise ShardError(
            f"{path}: its index {side} is missing. Make it with: {index_command(path)}"
        ) from None
    offsets = np.frombuffer(content[: len(content) // 8 * 8], dtype="<u8")
    whole = len(content) % 8 == 0 and len(offsets) > 0
    if not whole or np.any(offsets % BLOCK) or np.any(offsets[1:] <= offsets[:-1]):
        raise ShardError(
            f"{side} ({len(content)} bytes) is no index: expected rising 8-byte offsets that are "
            f"multiples of {BLOCK}. Make it again with: {index_command(path, force=True)}"
        )
    return offsets


def check_index(path: str, offsets: Offsets) -> None:
    """Refuse an index that was made for another state of its shard.

    Looks at the end of the samples and at the first and last sample's headers; where the shard was
    written after its index, scans it wholly.

    Raises:
        ShardError: where they do not fit, with the command that mends it.
    """
    with open(path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        end = int(offsets[-1])
        headers = [os.pread(file.fileno(), BLOCK, int(o)) for o in (offsets[0], offsets[-2:][0])]
        tail = os.pread(file.fileno(), 2 * BLOCK, end)
    problem = None
    if status.st_size < end + 2 * BLOCK:
        problem = f"ends at byte {status.st_size}, the index says that samples end at {end}"
    elif tail != 2 * ZERO_BLOCK:
        problem = f"goes on at byte {end}, where by the index the samples end"
    elif len(offsets) > 1 and not all(_is_header(header) for header in headers):
        problem = "has no tar header where by the index a sample starts"
    elif offsets[0] > 0 and int(scan(path)[0]) != offsets[0]:
        problem = f"holds samples before byte {offsets[0]}, where its index starts"
    elif status.st_mtime_ns > os.stat(index_path(path)).st_mtime_ns:
        scanned = scan(path)
        if not np.array_equal(scanned, offsets):
            problem = f"holds {len(scanned) - 1} samples, its index {len(offsets) - 1} or others"
    if problem:
        raise ShardError(
            f"{path} {problem}: the shard was changed or cut after it was indexed. If the shard "
            f"is as it should be, make the index again with: {index_command(path, force=True)}"
        )


def shard_digest(path: str, offsets: Offsets) -> str:
    """Hash of the size and the index of a shard, and of what stands around a few sample borders
    (small texts and headers): tells shards apart without reading them.
    """
    digest = hashlib.blake2b(offsets.tobytes(), digest_size=16)
    with open(path, "rb", buffering=0) as file:
        digest.update(os.fstat(file.fileno()).st_size.to_bytes(8, "little"))
        for number in np.linspace(0, len(offsets) - 1, _BORDERS).astype(int):
            border = int(offsets[number])
            digest.update(os.pread(file.fileno(), 3 * BLOCK, max(0, border - 2 * BLOCK)))
    return digest.hexdigest()


class _Samples:
    """Groups member names into samples and notes every name that would not survive."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.problems: list[str] = []
        self._key: str | None = None
        self._seen: dict[str, set[str]] = {}

    def add(self, name: str, start: int) -> None:
        if is_meta(name):
            return
        parts = split_name(name)
        if parts is None or not parts[1] or parts[0].endswith("/"):
            self.problems.append(f"{name!r}: no key or no extension; readers would drop it")
            return
        key, extension = parts
        if CONTROL.search(name):
            self.problems.append(f"{name!r}: control characters would act on terminals and logs")
            return
        if key.startswith("__") or extension.startswith("__"):
            self.problems.append(f"{name!r}: names with __ are reserved; it would become a sample")
            return
        if key != self._key:
            self.starts.append(start)
            if key in self._seen:
                again = extension in self._seen[key]
                self.problems.append(
                    f"{name!r}: key {key!r} comes again"
                    + ("" if again else ", not beside the sample's other files")
                )
            self._key = key
        elif extension in self._seen[key]:
            self.problems.append(f"{name!r}: extension {extension!r} twice in sample {key!r}")
        self._seen.setdefault(key, set()).add(extension)


def _refuse_foreign(path: str, size: int, magic: bytes) -> None:
    if size == 0:
        raise ShardError(
            f"{path}: the file is empty (0 bytes). Even a tar without samples has an "
            "end-of-archive marker. Make or fetch the shard again."
        )
    for start, name in _COMPRESSED.items():
        if magic.startswith(start):
            raise ShardError(
                f"{path}: this is a {name} file, samples in it cannot be reached one by one. "
                "Decompress it into a plain .tar (media hardly shrink by it)."
            )


def _problem_at_end(read: Read, offset: int, size: int) -> str | None:
    """What is wrong after the last member, where two or more blocks of zeros must be."""
    again = "Make or fetch the shard again."
    if offset >= size:
        return f"no end-of-archive marker: cut off at byte {size}, at the end of a member. {again}"
    if size - offset < 2 * BLOCK:
        return f"cut off in the end-of-archive marker at byte {size}. {again}"
    position = offset
    while position < size:
        chunk = read(position, 1 << 20)
        if not chunk:
            return f"cut off while it was read, at byte {position}. {again}"
        if chunk.strip(b"\0"):
            where = position + len(chunk) - len(chunk.lstrip(b"\0"))
            if where < offset + 2 * BLOCK:
                return f"a single block of zeros at byte {offset} with data after it. {again}"
            return (
                f"data at byte {where}, after the end of the archive at {offset}: several tars put "
                "together with cat? Readers see only the first; keep them as shards of their own."
            )
        position += len(chunk)
    return None


def _is_header(block: bytes) -> bool:
    try:
        parse_header(block, 0)
    except TarError:
        return False
    return True

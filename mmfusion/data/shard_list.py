"""Which tars a recipe means by a folder, a glob or a brace list, and in which order."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence

import braceexpand

from mmfusion.data.index import ShardError
from mmfusion.paths import expand

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")


def find_shards(patterns: str | Sequence[str]) -> list[str]:
    """Paths of shards: in the order of the patterns and brace lists, sorted within each.

    Args:
        patterns: files, folders (searched for ``*.tar``, with their subfolders), globs, brace lists
            (``train-{000000..000009}.tar``). ``~`` and environment variables are filled in.

    Raises:
        ShardError: where a pattern matches nothing, or a shard comes twice.
    """
    written = [patterns] if isinstance(patterns, str) else list(patterns)
    if not written:
        raise ShardError("no shards are named: expected a folder, a glob or a list of .tar files")
    paths = [path for pattern in written for path in _expand_pattern(expand(pattern))]
    doubled = (
        sorted({path for path in paths if paths.count(path) > 1})
        if len(set(paths)) < len(paths)
        else []
    )
    if doubled:
        raise ShardError(
            f"{doubled[0]} is named {paths.count(doubled[0])} times by {written}; its samples "
            "would be seen more often than the others. Give the source a higher weight instead."
        )
    return paths


def _expand_pattern(pattern: str) -> list[str]:
    if "://" in pattern or pattern.startswith("pipe:"):
        raise ShardError(f"{pattern!r}: shards are local files or folders, not addresses or pipes")
    if os.path.isdir(pattern):
        found = [
            os.path.join(folder, name) for folder, _, names in os.walk(pattern) for name in names
        ]
        return _only_tars(pattern, found)
    if os.path.exists(pattern):
        return _only_tars(pattern, [pattern])
    return [
        path for plain in braceexpand.braceexpand(pattern) for path in _expand_glob(plain, pattern)
    ]


def _expand_glob(plain: str, pattern: str) -> list[str]:
    if glob.has_magic(plain):
        found = glob.glob(plain, recursive=True)
    elif os.path.isdir(plain):
        return _expand_pattern(plain)
    else:
        found = [plain] if os.path.exists(plain) else []
    if not found:
        of = f" (from {pattern!r})" if plain != pattern else ""
        raise ShardError(f"no shard {plain!r}{of}: expected tars there, or a folder of them")
    return _only_tars(plain, found)


def _only_tars(pattern: str, found: list[str]) -> list[str]:
    """The tars among found files; what is beside them (indexes, lists) is not a shard."""
    for path in found:
        if path.endswith(_COMPRESSED):
            raise ShardError(f"{path} is compressed; decompress it into a plain .tar")
    tars = sorted(path for path in found if path.endswith(".tar"))
    if not tars:
        raise ShardError(f"{pattern!r} holds no .tar file ({len(found)} other files)")
    odd = [path for path in tars if os.path.exists(path) and not os.path.isfile(path)]
    if odd:
        raise ShardError(f"{odd[0]} is no regular file (but a folder, a pipe, ...); expected a tar")
    return tars

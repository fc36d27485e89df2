"""`mmfusion data index PATHS`: check shards wholly and write the index beside each."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from jsonargparse.typing import PositiveInt
from tqdm import tqdm

from mmfusion.data.index import (
    ShardError,
    index_command,
    index_path,
    load_index,
    scan,
    write_index,
)
from mmfusion.data.shard_list import find_shards

_SHARDS_PER_PROCESS = 16
_MOST_LISTED = 20


def index(paths: str | list[str], force: bool = False, workers: PositiveInt | None = None) -> None:
    """Check shards from the first byte to the last header, and write the missing indexes.

    An index that does not fit its shard is reported and left alone, unless --force is given.

    Args:
        paths: a tar, a folder of tars, a glob or a brace list (in quotes), or a list [a.tar,b.tar].
        force: replace every index that does not fit its shard.
        workers: processes; by default one for every 16 shards, at most one a core.

    Raises:
        ShardError: where a shard or an index is not in order; all others are done before.
    """
    shards = find_shards(paths)
    wanted = workers or min(os.cpu_count() or 1, 1 + len(shards) // _SHARDS_PER_PROCESS)
    outcomes = list(tqdm(_index_all(shards, force, wanted), total=len(shards), unit="shard"))
    good = [outcome for outcome in outcomes if not outcome.problem]
    states = [f"{_count(good, state)} {state}" for state in ("written", "replaced", "verified")]
    print(
        f"{sum(outcome.samples for outcome in good):,} samples, "
        f"{sum(outcome.size for outcome in good):,} bytes in {len(good)} shards; indexes: "
        + ", ".join(states)
    )
    problems = [outcome.problem for outcome in outcomes if outcome.problem]
    if problems:
        listed = "\n".join(problems[:_MOST_LISTED])
        more = f"\nand {len(problems) - _MOST_LISTED} more" if len(problems) > _MOST_LISTED else ""
        raise ShardError(
            f"{len(problems)} of {len(shards)} shards are not in order:\n{listed}{more}"
        )


@dataclass(frozen=True)
class _Outcome:
    state: str
    samples: int = 0
    size: int = 0
    problem: str = ""


def _index_all(shards: list[str], force: bool, workers: int) -> Iterator[_Outcome]:
    if workers <= 1:
        yield from (_index_one(shard, force) for shard in shards)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(shards)), context) as pool:
        yield from pool.map(_index_one, shards, [force] * len(shards), chunksize=4)


def _index_one(shard: str, force: bool) -> _Outcome:
    try:
        offsets = scan(shard)
    except (ShardError, OSError) as error:
        return _Outcome("refused", problem=str(error))
    state = "written"
    if os.path.exists(index_path(shard)):
        problem = _mismatch(shard, offsets)
        if problem and not force:
            return _Outcome("refused", problem=problem)
        state = "replaced" if problem else "verified"
    try:
        if state == "verified":
            _date_after_shard(shard)
        else:
            write_index(shard, offsets)
    except OSError as error:
        return _Outcome("refused", problem=f"{shard}: its index cannot be written: {error}")
    return _Outcome(state, len(offsets) - 1, os.path.getsize(shard))


def _mismatch(shard: str, offsets: np.ndarray) -> str:
    try:
        present = load_index(shard)
    except ShardError as error:
        return str(error)
    if np.array_equal(present, offsets):
        return ""
    return (
        f"{shard} holds {len(offsets) - 1} samples up to byte {offsets[-1]}, its index "
        f"{index_path(shard)} says {len(present) - 1} up to byte {present[-1]}. If the shard is as "
        f"it should be, replace the index with: {index_command(shard, force=True)}"
    )


def _date_after_shard(shard: str) -> None:
    """A verified index that is older than its shard gets a new date: opening it is quick then."""
    if os.stat(shard).st_mtime_ns > os.stat(index_path(shard)).st_mtime_ns:
        os.utime(index_path(shard))


def _count(outcomes: list[_Outcome], state: str) -> int:
    return sum(outcome.state == state for outcome in outcomes)

"""A checkpoint that all ranks write, each its file: rank 0 finishes the folder where all have.

Files may be written while training goes on. Then ranks tell one another once a step whether they
are still at it (``flags`` of the module), and finish at the end of the same step.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from mmfusion.training.agreement import gather, rank
from mmfusion.training.checkpoint import AtomicCheckpointIO
from mmfusion.training.manifest import Entry


class ShardSaves:
    """At most one at a time. Every rank calls its methods in the same order."""

    def __init__(self) -> None:
        self._folder = Path()
        self._mine: Future[dict[str, Entry]] | None = None

    @property
    def unfinished(self) -> bool:
        """Whether a checkpoint was begun and not finished; the same on every rank."""
        return self._mine is not None

    def writing(self) -> int:
        """Whether this rank still writes its file."""
        return int(self._mine is not None and not self._mine.done())

    def begin(
        self, files: AtomicCheckpointIO, checkpoint: Mapping[str, Any], folder: Path, world: int
    ) -> None:
        """Write what this rank holds.

        Raises:
            ValueError: as :meth:`AtomicCheckpointIO.save_shards`.
        """
        self._folder, self._mine = folder, files.save_shards(checkpoint, folder, rank(), world)

    def finish(self, files: AtomicCheckpointIO) -> None:
        """Where a checkpoint was begun, wait for all ranks' files and begin to write its manifest.

        Raises:
            OSError: on every rank, where one could not write its file or the manifest before.
        """
        if self._mine is None:
            return
        mine, self._mine = self._mine, None
        written: dict[str, Entry] | str
        try:
            written = mine.result()
            files.wait()
        except OSError as error:
            written = f"rank {rank()}: {error}"
        entries, failed = {}, []
        for each in gather([written]):
            if isinstance(each, str):
                failed.append(each)
            else:
                entries.update(each)
        if failed:
            raise OSError("; ".join(failed))
        if rank() == 0:
            files.finish_shards(self._folder, entries)

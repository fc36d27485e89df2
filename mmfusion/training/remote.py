"""Checkpoints in another place as well: an object store, another disk."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec

from mmfusion.data.whole_file import publish, temporary_path
from mmfusion.training.resume import STEP_NAME

log = logging.getLogger(__name__)


class RemoteCopy:
    """A folder of checkpoints, as fsspec names it.

    Args:
        url: of the folder; made where it is not there.

    Raises:
        ValueError: for a kind of place that fsspec does not know, or whose package is not there.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._files, self._folder = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ValueError(f"checkpoint.remote is {url}: {error}") from error

    def take(self, paths: Sequence[Path]) -> None:
        """Copy those that are not there, the newest first, and remove those that are no more among
        them. What fails is told.
        """
        try:
            self._files.makedirs(self._folder, exist_ok=True)
            there = self._names()
            for path in reversed(paths):
                if path.name not in there:
                    self._copy(path)
            for name in there - {path.name for path in paths}:
                self._files.rm_file(posixpath.join(self._folder, name))
        except Exception as error:  # of any package behind fsspec
            log.warning("not copied to %s: %s: %s", self.url, type(error).__name__, error)

    def _copy(self, path: Path) -> None:
        aside = posixpath.join(self._folder, f".{path.name}.part")
        self._files.put_file(str(path), aside)
        if (size := self._files.size(aside)) != path.stat().st_size:
            raise OSError(f"{aside} has {size} bytes, {path} {path.stat().st_size}")
        self._files.mv(aside, posixpath.join(self._folder, path.name))

    def fetch_newest(self, folder: Path) -> Path | None:
        """Copy the newest checkpoint into a folder; None where there is none.

        Raises:
            OSError: where the place cannot be read.
        """
        names = sorted(self._names(), key=_step)
        if not names:
            return None
        path = folder / names[-1]
        folder.mkdir(parents=True, exist_ok=True)
        aside = temporary_path(str(path))
        self._files.get_file(posixpath.join(self._folder, names[-1]), aside)
        publish(aside, str(path))
        return path

    def _names(self) -> set[str]:
        if not self._files.exists(self._folder):
            return set()
        entries: list[Any] = self._files.ls(self._folder, detail=False)
        names = {posixpath.basename(str(entry).rstrip("/")) for entry in entries}
        return {name for name in names if STEP_NAME.fullmatch(name)}


def _step(name: str) -> int:
    match = STEP_NAME.fullmatch(name)
    assert match is not None
    return int(match[1])

"""Checkpoints in another place as well: an object store, another disk.

``run.json`` there names the run they are of, and the start of it that writes: two runs, or two
starts of one, never overwrite each other.
"""

from __future__ import annotations

import json
import logging
import posixpath
import re
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec

from mmfusion.data.whole_file import publish, temporary_path
from mmfusion.training.manifest import MANIFEST, ManifestError, parse, read
from mmfusion.training.resume import STEP_NAME, by_step, remove, step_of, why_incomplete

PART_NAME = re.compile(r"\.step-\d+\.ckpt\.part")
"""Of a copy that is being made."""
TAIL = 1 << 16
"""So many bytes at the end of a file tell it from others."""
OWNER = "run.json"
log = logging.getLogger(__name__)


class AnotherRunsError(ValueError):
    """A place that holds another run's checkpoints."""


class RemoteCopy:
    """A folder of checkpoints, as fsspec names it.

    Args:
        url: of the folder; made where it is not there.

    Attributes:
        copying: the checkpoint that is copied just now.

    Raises:
        ValueError: for a kind of place that fsspec does not know, or whose package is not there.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._known: set[str] = set()
        """Names of those that are there as they are here."""
        self._own: dict[str, str] = {}
        self.copying: Path | None = None
        self._thread = ThreadPoolExecutor(1, "remote")
        try:
            self._files, self._folder = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ValueError(f"checkpoint.remote is {url}: {error}") from error

    def run_id(self) -> str | None:
        """Of the run whose checkpoints are there; None where none has been."""
        return self._owner().get("id")

    def claim(self, run_id: str) -> None:
        """Take the place for a start of a run, from the one before. Where it cannot be reached,
        that is told, and tried again with the first copy.

        Raises:
            AnotherRunsError: where the checkpoints there are another run's.
        """
        self._own = {"id": run_id, "start": secrets.token_hex(4)}
        try:
            self._take_place()
        except AnotherRunsError:
            raise
        except Exception as error:  # of any package behind fsspec
            log.warning(
                "%s cannot be written so far: %s: %s", self.url, type(error).__name__, error
            )

    def _take_place(self) -> None:
        there = self.run_id()
        if there not in (None, self._own["id"]):
            raise AnotherRunsError(
                f"checkpoint.remote {self.url} holds checkpoints of run {there}, and this is run "
                f"{self._own['id']}. Give each run a place of its own, or empty that one."
            )
        self._files.makedirs(self._folder, exist_ok=True)
        self._files.pipe_file(self._at(OWNER), json.dumps(self._own).encode())

    def _owner(self) -> dict[str, str]:
        if not self._files.exists(self._at(OWNER)):
            return {}
        try:
            return dict(json.loads(self._files.cat_file(self._at(OWNER))))
        except (ValueError, TypeError):  # torn: as if it was not there
            return {}

    def _hold_place(self) -> None:
        there = self._owner()
        if not there:
            self._take_place()
        elif there != self._own:
            raise RuntimeError(f"run {there.get('id')} writes there since, from another start")

    def take_behind(self, folder: Path) -> None:
        """:meth:`take` what a folder holds, while training goes on."""
        self._thread.submit(lambda: self.take(by_step(folder)))

    def wait(self) -> None:
        """Until all that is to be taken so far has been."""
        self._thread.submit(lambda: None).result()

    def take(self, paths: Sequence[Path]) -> None:
        """Copy those that are not there, the newest first, and remove those that are no more among
        them, and what copies that were cut short have left. What fails is told. :meth:`claim` comes
        first.
        """
        try:
            self._hold_place()
            before, there = self._entries(), self._names()
            for path in reversed(paths):
                self.copying = path
                if path.name not in there or not self._is_copied(path):
                    self._copy(path)
                self._known.add(path.name)
            stay = {path.name for path in paths}
            for name in before - stay:
                if STEP_NAME.fullmatch(name) or PART_NAME.fullmatch(name):
                    self._remove(name)
        except Exception as error:  # of any package behind fsspec
            log.warning("not copied to %s: %s: %s", self.url, type(error).__name__, error)
        finally:
            self.copying = None

    def _is_copied(self, path: Path) -> bool:
        """Whether what is there under a checkpoint's name is this one: not the same step of a run
        before, which went on from further back or started over.
        """
        if path.name in self._known:
            return True
        own, names = (path / MANIFEST, (MANIFEST,)) if path.is_dir() else (path, ())
        there, size = self._at(path.name, *names), own.stat().st_size
        if self._files.size(there) != size:
            return False
        # Of an archive: its list of members with their checksums.
        start = max(0, size - TAIL)
        with own.open("rb") as file:
            file.seek(start)
            return bool(self._files.cat_file(there, start=start, end=size) == file.read())

    def _copy(self, path: Path) -> None:
        """A file under another name first; of a folder the manifest last."""
        if not path.is_dir():
            aside = self._at(f".{path.name}.part")
            self._put(path, aside)
            self._files.mv(aside, self._at(path.name))
            return
        self._remove(path.name)
        for name in [*self._listed(path), MANIFEST]:
            self._files.makedirs(posixpath.dirname(self._at(path.name, name)), exist_ok=True)
            self._put(path / name, self._at(path.name, name))

    def _put(self, path: Path, there: str) -> None:
        self._files.put_file(str(path), there)
        if (size := self._files.size(there)) != path.stat().st_size:
            raise OSError(f"{there} has {size} bytes, {path} {path.stat().st_size}")

    def _remove(self, name: str) -> None:
        if self._files.exists(self._at(name, MANIFEST)):
            self._files.rm_file(self._at(name, MANIFEST))  # cut short here, it was not finished
        if self._files.exists(self._at(name)):
            self._files.rm(self._at(name), recursive=True)

    def fetch_newest(self, folder: Path) -> Path | None:
        """Copy the newest checkpoint that is whole into a folder; None where there is none at all.

        Raises:
            OSError: where the place cannot be read.
            ValueError: where none is whole.
        """
        reasons = []
        for name in sorted(self._names(), key=lambda one: (step_of(Path(one)), one), reverse=True):
            try:
                path = self._fetch(folder, name)
                defect = why_incomplete(path)
            except ManifestError as error:
                defect = str(error)
            if defect is None:
                return path
            log.warning("not resuming from %s in %s: %s", name, self.url, defect)
            reasons.append(f"{name}: {defect}")
            if (folder / name).exists():
                remove(folder / name)
        if reasons:
            raise ValueError(
                f"none of the {len(reasons)} checkpoints in {self.url} is complete "
                f"({'; '.join(reasons)}). Restore one, or start over with --resume none."
            )
        return None

    def _fetch(self, folder: Path, name: str) -> Path:
        path = folder / name
        folder.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".ckpt":
            self._get(self._at(path.name), path)
        else:
            path.mkdir(exist_ok=True)
            self._get(self._at(path.name, MANIFEST), aside := path / f".{MANIFEST}")
            for name in parse(aside.read_bytes()).files:
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                self._get(self._at(path.name, name), path / name)
            publish(str(aside), str(path / MANIFEST))
        return path

    def _get(self, there: str, path: Path) -> None:
        aside = temporary_path(str(path))
        self._files.get_file(there, aside)
        publish(aside, str(path))

    def _listed(self, path: Path) -> list[str]:
        made = read(path)
        assert made is not None
        return list(made.files)

    def _at(self, *names: str) -> str:
        return posixpath.join(self._folder, *names)

    def _entries(self) -> set[str]:
        """Names of all that is there."""
        if not self._files.exists(self._folder):
            return set()
        entries: list[Any] = self._files.ls(self._folder, detail=False)
        return {posixpath.basename(str(entry).rstrip("/")) for entry in entries}

    def _names(self) -> set[str]:
        """Those that are finished."""
        return {
            name
            for name in self._entries()
            if STEP_NAME.fullmatch(name)
            and (name.endswith(".ckpt") or self._files.exists(self._at(name, MANIFEST)))
        }

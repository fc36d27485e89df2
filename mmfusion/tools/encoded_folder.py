"""Where `mmfusion data encode` puts its work: a folder of unfinished shards, then the set's place.

What no encode made is never replaced: a set is known by its manifest, or by the mark of one that
was broken off while it got its place, and its folders by the names of their shards.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from mmfusion.data.features import MANIFEST, Features, shards_of
from mmfusion.data.shards import Shards
from mmfusion.data.source import Source
from mmfusion.data.whole_file import write_whole
from mmfusion.training.stored_parts import SECTIONS

UNFINISHED, PLAN = ".unfinished", "plan.json"
LOCK = ".lock"
"""Held by the encode that is at work."""
MOVING = ".moving"
"""There while a set gets its place: without a manifest, but what is there is an encode's."""
_SHARD = re.compile(r"\d{6,}-\d+\.tar(\.idx)?")
"""Names of :class:`mmfusion.tools.data_rewriter.Rewriter`."""


def refuse_to_replace(folder: Path, overwrite: bool) -> None:
    """Before a set is made in a folder.

    Raises:
        FileExistsError: where something is there that is not to be replaced, or, whether that is
            asked for or not, that no encode made.
    """
    there = [name for name in (MANIFEST, *SECTIONS) if os.path.lexists(folder / name)]
    if there and not overwrite:
        raise FileExistsError(
            f"{folder} already holds {', '.join(there)}; choose another folder, or replace what an "
            "earlier `mmfusion data encode` made there by --overwrite."
        )
    of_ours = (folder / MANIFEST).is_file() or (folder / MOVING).is_file()
    foreign = _foreign(folder) if of_ours else there
    if foreign:
        reason = "" if of_ours else f", and no {MANIFEST}"
        raise FileExistsError(
            f"{folder} holds {foreign[0]}{reason}: no `mmfusion data encode` made that, so it is "
            "not replaced; choose another folder, or move it away."
        )


def _foreign(folder: Path) -> list[str]:
    """What is in the place of shards and is none."""
    found = [path for name in SECTIONS for path in (folder / name, *(folder / name).rglob("*"))]
    return sorted(
        str(path.relative_to(folder))
        for path in found
        if os.path.lexists(path)
        and (path.is_symlink() or not (path.is_dir() or _SHARD.fullmatch(path.name)))
    )


def refuse_sources_inside(folder: Path, sources: Iterable[Source]) -> None:
    """Before features are made: a recipe's own data are not where they go.

    Raises:
        ValueError: with the first shard that is.
    """
    place = folder.resolve()
    for source in sources:
        for path in source.shards.paths:
            if Path(path).resolve().is_relative_to(place):
                raise ValueError(
                    f"{path} is data of the recipe, in the folder that is to hold the features "
                    f"({folder}); choose another folder."
                )


def unfinished(folder: Path, planned: Features, media: str) -> Path:
    """Where shards are made: what an interrupted start left there, if it was making the same."""
    work = folder / UNFINISHED
    text = json.dumps({"media": media, **asdict(planned)}, indent=1)
    plan = work / PLAN
    if not plan.is_file() or plan.read_text() != text:
        if work.exists():
            shutil.rmtree(work)
        work.mkdir(parents=True)
        with write_whole(str(plan)) as file:
            file.write(text.encode())
    return work


def finish(work: Path, folder: Path, planned: Features, overwrite: bool) -> None:
    """Give everything its place, the manifest last."""
    refuse_to_replace(folder, overwrite)  # hours have passed
    sets = {
        name: replace(one, dataset_id=Shards(str(shards_of(work, name))).dataset_id)
        for name, one in planned.sources.items()
    }
    with write_whole(str(folder / MOVING)):
        pass
    (folder / MANIFEST).unlink(missing_ok=True)
    (work / PLAN).unlink()  # what is moved is not gone on with
    for path in sorted(work.iterdir()):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    replace(planned, sources=sets).write(folder)
    (folder / MOVING).unlink()
    work.rmdir()

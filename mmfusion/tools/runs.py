"""``mmfusion runs``: the runs of a folder and how they stand."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmfusion.paths import expand
from mmfusion.training.loggers import read_metrics
from mmfusion.training.resume import by_step
from mmfusion.training.run import RunDirectory
from mmfusion.training.wandb_segment import where

FOUND, SUBMITTED = "run.json", "launch/job.json"
LONG = 200
"""Characters of a reason; ``status.json`` has all of it."""
FAILURES = "failures.jsonl"
_FLOCK = "@hhlli"
"""``struct flock`` of Linux: type, whence, start, length, process."""


@dataclass(frozen=True)
class Standing:
    """How a run stands.

    Attributes:
        path: of its directory.
        state: as in ``status.json``; ``lost`` where that says ``running`` and no process holds it,
            ``not begun`` where it was launched and has written nothing.
        step: optimizer steps done.
        steps: in all.
        loss: of the last step that was logged.
        attempts: starts so far.
        updated: when ``status.json`` was written.
        reason: of what ended it.
    """

    path: Path
    state: str
    step: int
    steps: int | None
    loss: float | None
    attempts: int
    updated: str
    reason: str


def runs(folder: str = "runs", failed: PositiveInt | None = None) -> None:
    """List the runs of a folder, or one of them.

    Args:
        folder: in which the directories of runs are, or one of these.
        failed: for scripts that start a run again: note that this run has failed, and say by the
            exit code whether to: 0; or 1 where it failed so many times in a row without a new
            checkpoint.
    """
    path = Path(expand(folder))
    if failed is not None:
        raise SystemExit(0 if worth_another(RunDirectory(path), failed) else 1)
    found = [standing(run) for run in directories(path)]
    if not found:
        raise FileNotFoundError(
            f"no run is in {path}; give the folder that holds their directories."
        )
    Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120).print(
        table(found)
    )
    if len(found) == 1 and (wandb := where(found[0].path)):
        print(f"W&B: {wandb}")


def worth_another(run: RunDirectory, most: int) -> bool:
    """Note a failure, and whether to start the run again. Failures before the run could open its
    directory count too.
    """
    saved = by_step(run.checkpoints)
    file, newest = run.path / FAILURES, saved[-1].name if saved else None
    file.parent.mkdir(parents=True, exist_ok=True)
    note = {"newest": newest, "at": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    before = file.read_bytes() if file.is_file() else b""
    with file.open("a") as notes:
        torn = before and not before.endswith(b"\n")  # by a kill, or a full disk
        notes.write(("\n" if torn else "") + json.dumps(note) + "\n")
    noted = _noted(file)
    fruitless = len([*takewhile(lambda other: other == newest, reversed(noted))])
    if fruitless >= most:
        print(f"{run.path} failed {fruitless} times without a new checkpoint; given up.")
    return fruitless < most


def _noted(file: Path) -> list[str | None]:
    """The newest checkpoint of each failure; a note that cannot be read is left out."""
    found = []
    for line in file.read_text(errors="replace").splitlines():
        with suppress(ValueError, LookupError, TypeError):
            found.append(json.loads(line)["newest"])
    return found


def directories(folder: Path) -> Iterator[RunDirectory]:
    """Runs in a folder and in the folders of it, a run's stages among them."""
    for depth in ("", "*/", "*/*/"):
        begun = {file.parent for file in folder.glob(depth + FOUND)}
        submitted = {file.parent.parent for file in folder.glob(depth + SUBMITTED)}
        for path in sorted(begun | submitted):
            yield RunDirectory(path)


def standing(run: RunDirectory) -> Standing:
    """Of a run that may be going on meanwhile."""
    status = run.status()
    begun = (run.path / FOUND).exists()
    state = str(status.get("state", "unknown" if begun else "not begun"))
    if state == "running" and not _held(run):
        state = "lost"
    return Standing(
        run.path,
        state,
        _whole(status.get("step")),
        _steps(run),
        _loss(run),
        len(run.attempts()),
        str(status.get("updated", "")),
        str(status.get("reason", "")),
    )


def table(found: list[Standing]) -> Table:
    """One line a run."""
    made = Table("run", "state", "step", "loss", "starts")
    made.add_column("updated", min_width=len("2026-01-01T00:00"), no_wrap=True)
    made.add_column("reason", min_width=12)
    for one in found:
        of = f"{one.step:,} of {one.steps:,}" if one.steps else f"{one.step:,}"
        loss = "" if one.loss is None else f"{one.loss:.4g}"
        reason = one.reason if len(one.reason) <= LONG else f"{one.reason[:LONG]} ..."
        row = (str(one.path), one.state, of, loss, str(one.attempts), one.updated[:16], reason)
        made.add_row(*map(escape, row))  # a reason may hold what rich takes for a style
    return made


def _held(run: RunDirectory) -> bool:
    """Whether a process is writing it; of other machines too, where the file system has locks."""
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        with (run.path / ".lock").open("rb") as lock:  # asked, not taken: a start would be refused
            answer = fcntl.fcntl(lock, fcntl.F_GETLK, asked)
    except FileNotFoundError:
        return False
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


def _steps(run: RunDirectory) -> int | None:
    try:
        recipe: Any = yaml.safe_load(run.config.read_text())
        return int(recipe["trainer"]["max_steps"])
    except (FileNotFoundError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None


def _whole(value: Any) -> int:
    """A number of ``status.json``, which is the word of who wrote it; else 0."""
    return value if isinstance(value, int) else 0


def _loss(run: RunDirectory) -> float | None:
    file = run.path / "metrics.csv"
    try:
        rows = read_metrics(file) if file.is_file() else []
    except (ValueError, LookupError, TypeError):  # one damaged run hides no other
        return None
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    return float(losses[-1]) if losses else None

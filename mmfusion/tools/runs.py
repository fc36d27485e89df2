"""``mmfusion runs``: the runs of a folder and how they stand."""

from __future__ import annotations

import fcntl
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.table import Table

from mmfusion.paths import expand
from mmfusion.training.loggers import read_metrics
from mmfusion.training.resume import by_step
from mmfusion.training.run import RunDirectory

FOUND = "run.json"
FAILURES = "failures.jsonl"
_FLOCK = "@hhlli"
"""``struct flock`` of Linux: type, whence, start, length, process."""


@dataclass(frozen=True)
class Standing:
    """How a run stands.

    Attributes:
        path: of its directory.
        state: as in ``status.json``; ``lost`` where that says ``running`` and no process holds it.
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
    Console().print(table(found))


def worth_another(run: RunDirectory, most: int) -> bool:
    """Note a failure, and whether to start the run again. Failures before the run could open its
    directory count too.
    """
    saved = by_step(run.checkpoints)
    file, newest = run.path / FAILURES, saved[-1].name if saved else None
    file.parent.mkdir(parents=True, exist_ok=True)
    note = {"newest": newest, "at": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    with file.open("a") as notes:
        notes.write(json.dumps(note) + "\n")
    noted = [json.loads(line)["newest"] for line in file.read_text().splitlines()]
    fruitless = len([*takewhile(lambda other: other == newest, reversed(noted))])
    if fruitless >= most:
        print(f"{run.path} failed {fruitless} times without a new checkpoint; given up.")
    return fruitless < most


def directories(folder: Path) -> Iterator[RunDirectory]:
    """Runs in a folder and in the folders of it, a run's stages among them."""
    for depth in ("", "*/", "*/*/"):
        for file in sorted(folder.glob(depth + FOUND)):
            yield RunDirectory(file.parent)


def standing(run: RunDirectory) -> Standing:
    """Of a run that may be going on meanwhile."""
    status = run.status()
    state = str(status.get("state", "unknown"))
    if state == "running" and not _held(run):
        state = "lost"
    return Standing(
        run.path,
        state,
        int(status.get("step", 0)),
        _steps(run),
        _loss(run),
        len(run.attempts()),
        str(status.get("updated", "")),
        str(status.get("reason", "")),
    )


def table(found: list[Standing]) -> Table:
    """One line a run."""
    made = Table("run", "state", "step", "loss", "starts", "updated", "reason")
    for one in found:
        of = f"{one.step:,} of {one.steps:,}" if one.steps else f"{one.step:,}"
        loss = "" if one.loss is None else f"{one.loss:.4g}"
        made.add_row(str(one.path), one.state, of, loss, str(one.attempts), one.updated, one.reason)
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


def _loss(run: RunDirectory) -> float | None:
    file = run.path / "metrics.csv"
    rows = read_metrics(file) if file.is_file() else []
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    return float(losses[-1]) if losses else None

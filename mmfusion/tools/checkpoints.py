"""``mmfusion checkpoints RUN``: what checkpoints a run has, how they came about, which are whole,
which may go.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmfusion.paths import expand
from mmfusion.training import manifest
from mmfusion.training.checkpoint import LATEST, read_checkpoint, replace_text
from mmfusion.training.resume import by_step, remove, why_incomplete
from mmfusion.training.run import RunDirectory

MIB = 1 << 20
SHARED = {
    "run": "run",
    "recipe": "recipe",
    "versions": "versions",
    "data": "data sets",
    "frozen": "frozen weights",
}
"""What checkpoints of a run mostly have in common, as it is shown."""


def checkpoints(run: str, verify: bool = False, keep: NonNegativeInt | None = None) -> None:
    """List the checkpoints of a run, and what their manifests say.

    Args:
        run: its directory, or a folder of copies (``checkpoint.remote``).
        verify: compare each with its manifest to the last byte, and say which would be gone on
            from.
        keep: remove all but so many of the newest that are whole; one of these stays in any case.

    Raises:
        SystemExit: with code 1 where ``verify`` finds one that is not whole.
    """
    directory = RunDirectory(expand(run))
    if by_step(directory.path):  # copies have no run around them
        directory.checkpoints = directory.path
    found = by_step(directory.checkpoints)
    if not found:
        raise FileNotFoundError(f"{directory.checkpoints} has no checkpoint (step-*).")
    defects = {path: why_incomplete(path) for path in found} if verify or keep is not None else {}
    if keep is not None:
        found = prune(directory, found, defects, keep)
    about = {path: _about(path) for path in found}
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)
    console.print(table(directory, about, defects))
    for line in in_common([given for given in about.values() if given is not None]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if verify and any(defects[path] for path in found):
        raise SystemExit(1)


def prune(
    directory: RunDirectory, found: list[Path], defects: dict[Path, str | None], keep: int
) -> list[Path]:
    """Remove all but the newest that are whole; what stays.

    Raises:
        ValueError: where none is whole.
    """
    whole = [path for path in found if defects[path] is None]
    if not whole:
        raise ValueError(f"none of the {len(found)} checkpoints is whole; nothing was removed.")
    with directory.held():
        stay = whole[-max(keep, 1) :]
        replace_text(directory.checkpoints / LATEST, stay[-1].name + "\n")
        for path in found:
            if path not in stay:
                remove(path)
    print(f"{len(found) - len(stay)} removed")
    return stay


def table(
    directory: RunDirectory,
    about: Mapping[Path, Mapping[str, Any] | None],
    defects: Mapping[Path, str | None],
) -> Table:
    """One line a checkpoint."""
    latest = directory.checkpoints / LATEST
    newest = latest.read_text().strip() if latest.is_file() else ""
    made = Table()
    made.add_column("checkpoint", min_width=len("step-00000000"), no_wrap=True)
    for name in ("MiB", "trained weights", "ranks", "strategy"):
        made.add_column(name)
    made.add_column("written", min_width=len("2026-01-01T00:00"), no_wrap=True)
    made.add_column("", min_width=len("manifest"))
    for path, told in about.items():
        given = told or {}
        said = ["latest"] if path.name == newest else []
        said += ["without a manifest"] if told == {} else []
        if path in defects:
            said.append(defects[path] or "whole")
        written = given.get("written") or datetime.fromtimestamp(path.stat().st_mtime).isoformat(
            " ", "seconds"
        )
        row = (
            path.name,
            f"{_size(path) / MIB:,.1f}",
            "?" if told is None else _weights(path, given),
            str(given.get("world_size", "")),
            str(given.get("strategy", "")),
            str(written)[:16],
            ", ".join(said),
        )
        made.add_row(*map(escape, row))  # a manifest may hold what rich takes for a style
    return made


def in_common(about: list[Mapping[str, Any]]) -> list[str]:
    """A line for each thing that manifests say; where they differ, the newest's, and that it is."""
    lines = []
    for key, title in SHARED.items():
        values = [given[key] for given in about if key in given]
        if values and values[-1]:
            differ = ", the newest's: they differ" if any(x != values[-1] for x in values) else ""
            lines.append(f"{title}{differ}: {_line(values[-1])}")
    return lines


def _line(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return str(value)


def _about(path: Path) -> dict[str, Any] | None:
    """What the manifest says; nothing where there is none, None where it cannot be read."""
    try:
        made = manifest.read(path)
    except Exception:  # a damaged file can raise anything; --verify says what
        return None
    return made.about if made else {}


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _weights(path: Path, about: Mapping[str, Any]) -> str:
    if "weights" in about:
        count = about.get("weights", "")
        return f"{count:,}" if isinstance(count, int) else str(count)
    try:
        kept = read_checkpoint(path, "meta")["state_dict"]
    except Exception:  # as above
        return "?"
    return f"{sum(tensor.numel() for tensor in kept.values()):,}"

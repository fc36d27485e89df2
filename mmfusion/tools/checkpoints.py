"""``mmfusion checkpoints RUN``: what checkpoints a run has, which are whole, which may go."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from jsonargparse.typing import NonNegativeInt
from rich.console import Console
from rich.table import Table

from mmfusion.paths import expand
from mmfusion.training.checkpoint import LATEST, read_checkpoint, replace_text
from mmfusion.training.resume import by_step, why_incomplete
from mmfusion.training.run import RunDirectory

MIB = 1 << 20


def checkpoints(run: str, verify: bool = False, keep: NonNegativeInt | None = None) -> None:
    """List the checkpoints of a run.

    Args:
        run: its directory.
        verify: read each to its last byte, and say which would be gone on from.
        keep: remove all but so many of the newest (and, of those that are whole, never the last).
    """
    directory = RunDirectory(expand(run))
    found = by_step(directory.checkpoints)
    if not found:
        raise FileNotFoundError(f"{directory.checkpoints} has no checkpoint (step-*.ckpt).")
    defects = {path: why_incomplete(path) for path in found} if verify or keep is not None else {}
    if keep is not None:
        found = prune(directory, found, defects, keep)
    Console().print(table(directory, found, defects))


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
                path.unlink()
    print(f"{len(found) - len(stay)} removed")
    return stay


def table(directory: RunDirectory, found: list[Path], defects: dict[Path, str | None]) -> Table:
    """One line a checkpoint."""
    latest = directory.checkpoints / LATEST
    newest = latest.read_text().strip() if latest.is_file() else ""
    made = Table("checkpoint", "MiB", "trained weights", "written", "")
    for path in found:
        about = path.stat()
        said = ["latest"] if path.name == newest else []
        if path in defects:
            said.append(defects[path] or "whole")
        made.add_row(
            path.name,
            f"{about.st_size / MIB:,.1f}",
            _weights(path) if defects.get(path) is None else "",
            datetime.fromtimestamp(about.st_mtime).isoformat(" ", "seconds"),
            ", ".join(said),
        )
    return made


def _weights(path: Path) -> str:
    try:
        kept = read_checkpoint(path, "meta")["state_dict"]
    except Exception:  # a damaged file can raise anything; --verify says what
        return "?"
    return f"{sum(tensor.numel() for tensor in kept.values()):,}"

"""Which checkpoint a run goes on from.

Ours, not Lightning's: ``ckpt_path="last"`` takes the newest modification time, starts at 0 with a
warning where there is none, and crashes on a torn file.
"""

from __future__ import annotations

import logging
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from mmfusion.paths import expand
from mmfusion.training import manifest, sharded
from mmfusion.training.checkpoint import FOLDER, REQUIRED_KEYS, UNFINISHED

log = logging.getLogger(__name__)

STEP_NAME = re.compile(r"step-(\d+)(?:\.ckpt)?")
"""Of a checkpoint: a file, ``step-00000100.ckpt``, or a folder, ``step-00000100``."""


def find(
    run_dir: str | Path,
    mode: Literal["auto", "must", "none"] | str = "auto",
    passed_over: list[str] | None = None,
) -> Path | None:
    """The checkpoint to go on from: the newest by step that is complete.

    Args:
        run_dir: the run directory.
        mode: ``auto`` starts at step 0 where there is none, ``must`` fails, ``none`` always starts
            at step 0; anything else is the path of a checkpoint.
        passed_over: takes names of newer ones that are not complete, and why.

    Raises:
        FileNotFoundError: ``must`` without a checkpoint, or the given path is not there.
        ValueError: no checkpoint is complete, or the given one is not.
    """
    if mode == "none":
        return None
    if mode not in ("auto", "must"):
        return complete_checkpoint(mode, "--resume")
    folder = Path(run_dir) / FOLDER
    candidates = by_step(folder)
    reasons: list[str] = []
    for path in reversed(candidates):
        defect = why_incomplete(path)
        if defect is None:
            for reason in reasons:
                log.warning("not resuming from %s", reason)
            if passed_over is not None:
                passed_over += reasons
            return path
        reasons.append(f"{path.name}: {defect}")
    if reasons:
        raise ValueError(
            f"none of the {len(reasons)} checkpoints in {folder} is complete "
            f"({'; '.join(reasons)}). Restore one, or start over with --resume none."
        )
    if mode == "must":
        raise FileNotFoundError(
            f"--resume must, but {folder} has no checkpoint (step-*). Check --run_dir, or "
            "start with --resume auto."
        )
    return None


def by_step(folder: str | Path) -> list[Path]:
    """Checkpoints of a folder, by step, oldest first; not those that were not finished."""
    found = [path for path in Path(folder).glob("step-*") if STEP_NAME.fullmatch(path.name)]
    return sorted(filter(_is_finished, found), key=lambda path: (step_of(path), path.name))


def step_of(path: Path) -> int:
    """That a checkpoint's name says."""
    match = STEP_NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def unfinished(folder: str | Path) -> Iterator[Path]:
    """What killed saves and removals left behind."""
    yield from Path(folder).glob(UNFINISHED)
    for path in Path(folder).glob("step-*/"):
        if STEP_NAME.fullmatch(path.name) and not _is_finished(path):
            yield path


def remove(path: Path) -> None:
    """Delete a checkpoint; where that is cut short, it is one that was not finished."""
    if path.is_dir():
        (path / manifest.MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink()


def _is_finished(path: Path) -> bool:
    """A folder without a manifest is not; a file has its name since it was."""
    return (path / manifest.MANIFEST).is_file() if path.is_dir() else path.suffix == ".ckpt"


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint rather than a run directory."""
    return bool(STEP_NAME.fullmatch(path.name)) or (path / manifest.MANIFEST).is_file()


def why_incomplete(path: str | Path) -> str | None:
    """What is wrong with a checkpoint, or None: as its manifest says to the last byte, made by us,
    and of the step its name says.
    """
    path = Path(path)
    if defect := manifest.verify(path):
        return defect
    if path.is_dir():
        made = manifest.read(path)
        assert made is not None
        if defect := _other_step(path, made.about.get("step")):
            return defect
    file = path / sharded.REST if path.is_dir() else path
    try:
        content = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        return "holds objects that only their code could read"
    except Exception as error:  # a damaged file can raise anything: zlib's errors, KeyError, ...
        return f"cannot be read ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    if not isinstance(content, dict):
        return f"holds a {type(content).__name__}, not a run's state"
    if missing := [key for key in REQUIRED_KEYS if key not in content]:
        return f"has no {', '.join(missing)}"
    for key in ("state_dict", "callbacks"):
        if not isinstance(content[key], dict):
            return f"has a {type(content[key]).__name__} as its {key}, not a dict"
    defect = _other_step(path, content["global_step"])
    return sharded.why_not_whole(path, content) if path.is_dir() and not defect else defect


def _other_step(path: Path, step: object) -> str | None:
    match = STEP_NAME.fullmatch(path.name)
    return f"holds step {step}" if match and int(match[1]) != step else None


def complete_checkpoint(path: str | Path, asked_by: str) -> Path:
    """The checkpoint a path names: itself, or a run directory's newest complete one.

    Args:
        path: a checkpoint or a run directory.
        asked_by: the option that gave the path, named in errors.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not complete.
    """
    path = Path(expand(path))
    if path.is_dir() and not is_checkpoint(path):
        if (found := find(path, "auto")) is None:
            raise FileNotFoundError(
                f"{asked_by} {path}: the run has no checkpoint ({path / FOLDER}/step-*). "
                "Train it until its first checkpoint, or name another run."
            )
        return found
    if not path.exists():
        raise FileNotFoundError(
            f"{asked_by} {path}: no such file or folder; expected a checkpoint or a run directory."
        )
    if defect := why_incomplete(path):
        raise ValueError(f"{asked_by} {path}: the checkpoint {defect}. Use another one.")
    return path

"""Which checkpoint a run goes on from.

Ours, not Lightning's: ``ckpt_path="last"`` takes the newest modification time, starts at 0 with a
warning where there is none, and crashes on a torn file.
"""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from pathlib import Path
from typing import Literal

import torch

from mmfusion.paths import expand
from mmfusion.training.checkpoint import FOLDER, REQUIRED_KEYS

log = logging.getLogger(__name__)

STEP_NAME = re.compile(r"step-(\d+)\.ckpt")


def find(run_dir: str | Path, mode: Literal["auto", "must", "none"] | str = "auto") -> Path | None:
    """The checkpoint to go on from: the newest by step that is complete.

    Args:
        run_dir: the run directory.
        mode: ``auto`` starts at step 0 where there is none, ``must`` fails, ``none`` always starts
            at step 0; anything else is the path of a checkpoint.

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
            return path
        reasons.append(f"{path.name}: {defect}")
    if reasons:
        raise ValueError(
            f"none of the {len(reasons)} checkpoints in {folder} is complete "
            f"({'; '.join(reasons)}). Restore one, or start over with --resume none."
        )
    if mode == "must":
        raise FileNotFoundError(
            f"--resume must, but {folder} has no checkpoint (step-*.ckpt). Check --run_dir, or "
            "start with --resume auto."
        )
    return None


def by_step(folder: str | Path) -> list[Path]:
    """Checkpoints of a folder, by step, oldest first."""
    found = {
        int(match[1]): path
        for path in Path(folder).glob("step-*.ckpt")
        if (match := STEP_NAME.fullmatch(path.name))
    }
    return [found[step] for step in sorted(found)]


def step_of(checkpoint: Path) -> int:
    """The step that a name of :func:`by_step` says."""
    return int(checkpoint.stem.removeprefix("step-"))


def why_incomplete(path: str | Path) -> str | None:
    """What is wrong with a checkpoint file, or None: readable to the last byte (checksums), made by
    us, and of the step its name says.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                return f"checksum of {damaged} differs"
        content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
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
    match = STEP_NAME.fullmatch(path.name)
    if match and int(match[1]) != content["global_step"]:
        return f"holds step {content['global_step']}"
    return None


def complete_checkpoint(path: str | Path, asked_by: str) -> Path:
    """The checkpoint a path names: the file itself, or a run directory's newest complete one.

    Args:
        path: a checkpoint or a run directory.
        asked_by: the option that gave the path, named in errors.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not complete.
    """
    path = Path(expand(path))
    if path.is_dir():
        if (found := find(path, "auto")) is None:
            raise FileNotFoundError(
                f"{asked_by} {path}: the run has no checkpoint ({path / FOLDER}/step-*.ckpt). "
                "Train it until its first checkpoint, or name another run."
            )
        return found
    if not path.is_file():
        raise FileNotFoundError(
            f"{asked_by} {path}: no such file or folder; expected a checkpoint or a run directory."
        )
    if defect := why_incomplete(path):
        raise ValueError(f"{asked_by} {path}: the checkpoint {defect}. Use another one.")
    return path

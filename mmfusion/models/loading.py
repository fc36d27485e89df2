"""Where pretrained weights come from, and the refusal of incomplete ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmfusion.paths import expand


def checked_path(path: str, needed_file: str) -> str:
    """A recipe's ``path`` as a folder or a hub id.

    Raises:
        FileNotFoundError: where it is a folder without ``needed_file``, or looks like one that is
            not there.
    """
    text = expand(path)
    if Path(text).is_dir():
        if not (Path(text) / needed_file).exists():
            found = sorted(file.name for file in Path(text).iterdir())[:8]
            raise FileNotFoundError(f"{text} has no {needed_file}; it holds {found}.")
        return text
    if text.startswith(("/", ".", "~")) or text != path or text.count("/") > 1:
        raise FileNotFoundError(
            f"no folder {text} (from path: {path}); give a folder or a hub id such as org/name."
        )
    return text


def refuse_missing(info: dict[str, Any], path: str, model: str) -> None:
    """Fail where ``from_pretrained`` left weights at random (it only logs them)."""
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} weights of {model}, which would stay random: "
            f"{missing[:8]}{' ...' if len(missing) > 8 else ''}. Is it a checkpoint of this model?"
        )

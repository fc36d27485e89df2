"""Folders that are there whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def make_folder(folder: Path, origin: Any, fill: Callable[[Path], None]) -> Path:
    """Let ``fill`` write into an empty folder aside, then put it in place under ``folder``.

    Args:
        folder: left as it is where its ``origin.json`` holds the same origin.
        origin: what the contents depend on; plain JSON values.
        fill: writes the contents.
    """
    marker = folder / "origin.json"
    if marker.is_file() and json.loads(marker.read_text()) == origin:
        return folder
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    fill(aside)
    (aside / "origin.json").write_text(json.dumps(origin, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return folder

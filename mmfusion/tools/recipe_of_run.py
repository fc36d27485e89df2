"""Tools that look at a recipe also take a run, whose recipe is its ``config.yaml``."""

from __future__ import annotations

from pathlib import Path

from mmfusion.paths import expand
from mmfusion.training.run import RunDirectory


def recipe_of(given: str) -> str:
    """The recipe's file: as given, or that of a run directory.

    Raises:
        FileNotFoundError: a directory that is no run.
    """
    if not Path(expand(given)).is_dir():
        return given
    config = RunDirectory(expand(given)).config
    if not config.is_file():
        raise FileNotFoundError(
            f"{given} is not a run directory: it has no {config.name}. Give a recipe's file, or "
            "the directory that `mmfusion fit` wrote."
        )
    return str(config)

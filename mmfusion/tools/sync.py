"""``mmfusion sync``: what a run left on the disk, to W&B."""

from __future__ import annotations

import sys
from dataclasses import replace

from mmfusion.paths import expand
from mmfusion.training.run import RunDirectory
from mmfusion.training.wandb_gap import fill, send_offline
from mmfusion.training.wandb_segment import Segment, begin, server, why_not_online

LONGEST = 24 * 3600.0
"""Seconds to send segments."""


def sync(run: str, project: str = "mmfusion") -> None:
    """Send to W&B what it lacks of a run: starts that were offline, points that were cut off.

    A start of the run that is online does the same for those before it.

    Args:
        run: the run directory.
        project: of W&B.
    """
    directory = RunDirectory(expand(run))
    if not directory.identity.is_file():
        raise FileNotFoundError(
            f"{run} is not a run directory: it has no {directory.identity.name}. Give the "
            "directory that `mmfusion fit` wrote."
        )
    segment = Segment(directory.path.absolute(), directory.id, directory.path.name, project)
    segment = replace(segment, choice="online", timeout=30.0, measures=False)
    if reason := why_not_online(segment.choice, host := server(), segment.timeout):
        raise ValueError(f"W&B cannot be reached: {reason}.")
    with directory.held():
        whole = send_offline(segment.run_dir, host, LONGEST)
        made, where = begin(segment)
        points = (
            fill(made, segment.run_dir, before=sys.maxsize)
            if made.settings.mode != "offline"
            else 0
        )
        made.finish()
    if not whole or where.startswith("offline"):
        raise ValueError(f"{run} was not sent whole; W&B is {where}.")
    print(f"{run}: W&B has all of it, {points} points of them now; {where}")

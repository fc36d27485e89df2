"""What earlier starts of a run left on the disk, sent to W&B's server before a later one goes on.

A start that was offline left whole segments, which `wandb sync` sends. One that was online and was
killed, or whose server went away, has sent all but its last seconds: these are read from
``metrics.csv``, where `wandb sync` would send the whole segment once more.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mmfusion.training.loggers import ATTEMPT, STEP, read_metrics
from mmfusion.training.secrets import hide_secrets
from mmfusion.training.wandb_segment import FOLDER

log = logging.getLogger(__name__)
SECONDS = 60.0
"""That a start waits for segments of earlier ones to be sent."""


def offline_segments(run_dir: Path) -> list[Path]:
    """Those that were never sent, of all nodes, oldest first."""
    found = [
        path
        for where in ("", f"node-*/{FOLDER}/")
        for path in (run_dir / FOLDER).glob(f"{where}offline-run-*")
        if not list(path.glob("*.wandb.synced")) and list(path.glob("*.wandb"))
    ]
    return sorted(found, key=lambda path: path.name)


def send_offline(run_dir: Path, host: str, seconds: float = SECONDS) -> bool:
    """Send the segments of offline starts, one after another.

    Args:
        run_dir: the run directory, which no other process writes.
        host: the server.
        seconds: to wait at most; what was not sent then is told.

    Returns:
        whether nothing is left.
    """
    segments = offline_segments(run_dir)
    if not segments:
        return True
    said = ""
    deadline = time.monotonic() + seconds
    # Those of other nodes first: the last one's summary stays.
    of_nodes = [path for path in segments if path.parent.parent.name != run_dir.name]
    for paths in (of_nodes, [path for path in segments if path not in of_nodes]):
        if paths and not said:
            said = _synced(paths, host, deadline - time.monotonic())
    if left := offline_segments(run_dir):
        log.warning(
            "%d of %d offline segments were not sent to W&B (%s); mmfusion sync %s does it",
            len(left), len(segments), said or "it said nothing", run_dir,
        )  # fmt: skip
    else:
        log.info("%d offline segments of earlier starts were sent to W&B", len(segments))
    return not left


def _synced(segments: list[Path], host: str, seconds: float) -> str:
    """Send segments; what was said where that failed."""
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "sync", *map(str, segments)],
            env={**environment, "WANDB_BASE_URL": host},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=max(seconds, 0.0),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "it takes longer than a start waits"
    text = (done.stderr or done.stdout).strip().rpartition("\n")[2]
    return str(hide_secrets(text)) if done.returncode else ""


def fill(run: Any, run_dir: Path, before: int) -> int:
    """Log what the server lacks of earlier starts.

    Args:
        run: of W&B, online and just resumed.
        run_dir: the run directory.
        before: the number of this start.

    Returns:
        how many rows.
    """
    file = run_dir / "metrics.csv"
    rows = read_metrics(file, all_attempts=True) if file.exists() else []
    earlier = [row for row in rows if row[ATTEMPT] < before]
    lacking = missing(earlier, dict(run.summary))
    for row in lacking:
        run.log(row)
    if lacking:
        log.info("%d points of earlier starts were sent to W&B", len(lacking))
    return len(lacking)


def missing(rows: list[dict[str, float]], summary: dict[str, Any]) -> list[dict[str, float]]:
    """Rows behind the last that a server has seen; of that one what it has not.

    Args:
        rows: of ``metrics.csv``, in the order they were logged.
        summary: the server's: the last value of each metric.
    """
    at = {ATTEMPT: summary.get(ATTEMPT), STEP: summary.get(STEP)}
    if None in at.values():
        return rows
    place = tuple(at.values())
    behind = [row for row in rows if (row[ATTEMPT], row[STEP]) > place]
    last = [row for row in rows if (row[ATTEMPT], row[STEP]) == place]
    rest = {k: v for row in last for k, v in row.items() if k in at or summary.get(k) != v}
    return [rest, *behind] if rest.keys() > at.keys() else behind

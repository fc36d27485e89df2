"""What becomes of a job: its scheduler's word, the run's ``status.json``, W&B and its log."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmfusion.training.run import RunDirectory
from mmfusion.training.wandb_segment import where

ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
)
"""States of jobs that Slurm does not start again."""
EVERY_SECONDS = 1.0


def follow_job(run_dir: Path) -> None:
    """Show the log of a run's job, what its scheduler and its run say of it, and where W&B has
    it, until it has ended.

    Raises:
        SystemExit: with code 1 where it has not finished.
    """
    job = json.loads((run_dir / "launch" / "job.json").read_text())
    run, log = RunDirectory(run_dir), Log(Path(job["log"]))
    told, wandb = "", None
    try:
        while True:
            state = state_of(job["on"], job["id"])
            for text in log.new():
                print(text, end="", flush=True)
            now = state + _of_run(run.status())
            if now != told:
                print(f"[{job['on']} {job['id']}: {now}]", flush=True)
                told = now
            if (address := where(run_dir)) not in (None, wandb):
                print(f"[W&B: {address}]", flush=True)
                wandb = address
            if state.split()[0] in ENDED:
                break
            time.sleep(EVERY_SECONDS)
    except KeyboardInterrupt:
        print(f"\n{run_dir} goes on; see mmfusion runs {run_dir}")
        return
    status = run.status()
    print(f"{run_dir}: {status.get('state', 'never begun')} at step {status.get('step', 0)}")
    if status.get("state") != "finished":
        raise SystemExit(1)


def _of_run(status: Mapping[str, Any]) -> str:
    """Steps are in the log."""
    return f"; run {status.get('state')}, start {status['attempt']}" if "attempt" in status else ""


class Log:
    """A file that grows."""

    def __init__(self, path: Path) -> None:
        self.path, self._read = path, 0

    def new(self) -> Iterator[str]:
        """What has come since it was asked last."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read)
                while chunk := file.read(1 << 20):
                    self._read += len(chunk)
                    yield chunk.decode(errors="replace")
        except FileNotFoundError:
            return


def state_of(on: str, number: str) -> str:
    """In Slurm's words, of every scheduler: ``PENDING (Resources)``, ``RUNNING``, ``COMPLETED``."""
    return _slurm(number) if on == "slurm" else _process(int(number))


def _slurm(number: str) -> str:
    done = subprocess.run(
        ["scontrol", "show", "job", "-o", number], capture_output=True, text=True, check=False
    )
    found = dict(re.findall(r"(\w+)=(\S*)", done.stdout))
    if "JobState" not in found:  # forgotten, some minutes after it ended
        return (
            "COMPLETED" if "Invalid job id" in done.stderr else f"UNKNOWN ({done.stderr.strip()})"
        )
    reason = found.get("Reason", "None")
    return found["JobState"] + (f" ({reason})" if reason not in ("None", "") else "")


def _process(number: int) -> str:
    try:
        pid, status = os.waitpid(number, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return f"FAILED (code {code})" if code else "COMPLETED"
    except ChildProcessError:  # of another process
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return "COMPLETED"
    return "RUNNING"

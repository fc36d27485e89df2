"""What becomes of a job: its scheduler's word, the run's ``status.json``, W&B and its log. Where
the run directory is not to be seen from here, the scheduler and the log have to do.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mmfusion.tools.launch.kubectl import Pods
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
IN_LOG = re.compile(r"W&B is (o(?:n|ff)line \(.*\)); files in ")
"""Where the run directory is not to be seen: the log says it too."""


class Followed(Protocol):
    """A job as its scheduler tells of it."""

    def state(self) -> str:
        """In Slurm's words, of every scheduler: ``PENDING (Resources)``, ``RUNNING``."""

    def log(self) -> Iterator[str]:
        """What has come since it was asked last."""


def follow_job(run_dir: Path, job: Mapping[str, str]) -> None:
    """Show the log of a run's job, what its scheduler and its run say of it, and where W&B has
    it, until it has ended.

    Args:
        run_dir: of the run.
        job: as in ``launch/job.json``.

    Raises:
        SystemExit: with code 1 where it has not finished.
    """
    run, followed = RunDirectory(run_dir), followed_job(job)
    told, wandb = "", None
    try:
        while True:
            state = followed.state()
            address = where(run_dir)
            for text in followed.log():
                print(text, end="", flush=True)
                if in_log := IN_LOG.search(text):
                    address = address or in_log[1]
            now = state + _of_run(_status(run))
            if now != told:
                print(f"[{job['on']} {job['id']}: {now}]", flush=True)
                told = now
            if address not in (None, wandb):
                print(f"[W&B: {address}]", flush=True)
                wandb = address
            if state.split()[0] in ENDED:
                break
            time.sleep(EVERY_SECONDS)
    except KeyboardInterrupt:
        print(f"\n{run_dir} goes on; see {_to_see(run_dir, job)}")
        return
    status, of_pods = _status(run), job["on"] == "k8s"
    if of_pods and not status:
        print(f"{run_dir}: {state}; it is not to be seen from here")
    else:
        print(f"{run_dir}: {status.get('state', 'never begun')} at step {status.get('step', 0)}")
    # What a machine sees of shared storage may be behind; pods that complete have finished.
    if not (state == "COMPLETED" if of_pods else status.get("state") == "finished"):
        raise SystemExit(1)


def followed_job(job: Mapping[str, str]) -> Followed:
    """Of what was submitted."""
    if job["on"] == "k8s":
        return Pods(job["id"], job["namespace"])
    return OfThisMachine(job["on"], job["id"], Log(Path(job["log"])))


def _to_see(run_dir: Path, job: Mapping[str, str]) -> str:
    seen = f"mmfusion runs {run_dir}"
    return f"{seen}, kubectl -n {job['namespace']} get {job['id']}" if "namespace" in job else seen


def _status(run: RunDirectory) -> dict[str, Any]:
    """Empty where it is not to be seen."""
    try:
        return run.status()
    except OSError:
        return {}


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


@dataclass
class OfThisMachine:
    """A process, or a job of Slurm, whose log is a file that is to be seen from here."""

    on: str
    number: str
    file: Log

    def state(self) -> str:
        """In Slurm's words."""
        return _slurm(self.number) if self.on == "slurm" else _process(int(self.number))

    def log(self) -> Iterator[str]:
        """What has come since it was asked last."""
        return self.file.new()


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

"""The trials of a sweep as an array of jobs of Slurm: one script, a task a trial."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from mmfusion.data.whole_file import write_whole
from mmfusion.tools.launch.client import said
from mmfusion.tools.launch.job import Job
from mmfusion.tools.launch.main import FOLDER, SUBMITTED
from mmfusion.tools.launch.scripts import slurm_array
from mmfusion.tools.sweep.trials import Trial

EVERY_SECONDS = 2.0


def render(job: Job, trials: Sequence[Trial], at_once: int | None) -> str:
    """The batch script."""
    tasks = {trial.number: (str(trial.run.path), job.of_trial(trial.overrides)) for trial in trials}
    return slurm_array(job, tasks, at_once)


def submit(job: Job, trials: Sequence[Trial], at_once: int | None, follow: bool) -> None:
    """Hand it to Slurm, and wait for its end where that is asked for.

    Raises:
        ValueError: where tasks of an array before are still queued or running.
    """
    folder = Path(job.run_dir) / FOLDER
    about = folder / SUBMITTED
    if about.is_file() and (left := _tasks_left(number := json.loads(about.read_text())["id"])):
        if not follow:
            raise ValueError(f"{left} tasks of job {number} of this sweep are queued or running.")
        print(f"following job {number}, of which {left} tasks are queued or running")
        return _wait_for(number)
    if not trials:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "array.sbatch"
    with write_whole(str(script)) as file:
        file.write(render(job, trials, at_once).encode())
    number = said(["sbatch", "--parsable", str(script)]).strip().partition(";")[0]
    with write_whole(str(about)) as file:
        file.write(json.dumps({"on": "slurm", "id": number}, indent=1).encode())
    print(f"{job.run_dir}: {len(trials)} trials submitted as array {number}", flush=True)
    return _wait_for(number) if follow else None


def _wait_for(number: str) -> None:
    while _tasks_left(number):
        time.sleep(EVERY_SECONDS)


def _tasks_left(number: str) -> int:
    """Of an array; those that Slurm queues again among them."""
    command = ["squeue", "--noheader", "--array", "--jobs", number, "--format", "%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ValueError(
            "there is no squeue on this machine; sweep from one that has it."
        ) from None
    if done.returncode and "Invalid job id" not in done.stderr:
        raise ValueError(f"squeue failed with code {done.returncode}: {done.stderr.strip()}")
    return len(done.stdout.split())

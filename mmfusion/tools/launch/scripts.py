"""The files of ``launch/`` with a job in them. Pure: text from a job, nothing is written or run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmfusion.paths import shipped
from mmfusion.tools.launch.job import Job

_PART = re.compile(r"^\. launch/(\S+)\n", re.MULTILINE)
"""The line of a script that takes in another file of ``launch/``, such as the settings."""
END_OF_OPTIONS = "# ---- "
"""Begins the line behind the options of Slurm."""


def slurm(job: Job) -> str:
    """The batch script of a job."""
    return _slurm(job, {"output": _log(job, "%j")}, [_arguments(job)], RUN_DIR=job.run_dir)


def slurm_array(
    job: Job, tasks: Mapping[int, tuple[str, Sequence[str]]], at_once: int | None
) -> str:
    """The batch script of an array.

    Args:
        job: what is common to its tasks.
        tasks: of each number the run directory, and the arguments of `mmfusion fit -c`.
        at_once: tasks that may run at a time.
    """
    numbers = ",".join(map(str, tasks)) + (f"%{at_once}" if at_once else "")
    cases = [
        f"{number}) export RUN_DIR={shlex.quote(run)}; set -- {shlex.join(arguments)} ;;"
        for number, (run, arguments) in tasks.items()
    ]
    chosen = ["case $SLURM_ARRAY_TASK_ID in", *cases, "esac"]
    return _slurm(job, {"output": _log(job, "%A_%a"), "array": numbers}, chosen)


def _log(job: Job, name: str) -> str:
    return _quoted(f"{Path(job.run_dir).absolute()}/launch/slurm-{name}.log")


def _slurm(job: Job, more: Mapping[str, str], last: Sequence[str], **variables: str) -> str:
    head, end, body = _shipped("slurm.sbatch").partition(END_OF_OPTIONS)
    comment, body = body.split("\n", 1)
    options: dict[str, str | int | None] = {
        name: value
        for line in head.splitlines()
        if line.startswith("#SBATCH --")
        for name, _, value in [line.removeprefix("#SBATCH --").partition("=")]
    }
    options |= {
        "job-name": _quoted(job.name),
        "nodes": job.nodes[1],
        "ntasks-per-node": job.processes,
        "gpus-per-node": job.gpus or None,
        "time": job.time,
        **more,
    }
    options |= job.site.slurm.options
    written = [
        f"#SBATCH --{name}" + (f"={value}" if value != "" else "")
        for name, value in options.items()
        if value is not None
    ]
    given = job.exports(
        **variables,
        MAX_FAILURES=str(job.failures),
        CONTAINER_IMAGE=job.site.slurm.container,
        CONTAINER_MOUNTS=",".join(job.site.slurm.mounts),
    )
    lines = ["#!/bin/bash", *written, end + comment, *given, *last]
    return "\n".join(lines) + "\n" + _alone(body)


def _quoted(value: str) -> str:
    """For a line of options, which Slurm takes apart at blanks and ends at #."""
    if not re.search(r"[\s\"'\\#]", value):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def torchrun(job: Job) -> str:
    """The script of a job under torchrun, the same on each machine."""
    shebang, body = _shipped("torchrun.sh").split("\n", 1)
    least, most = job.nodes
    given = job.exports(
        RUN_DIR=job.run_dir,
        NODES=str(most) if least == most else f"{least}:{most}",
        GPUS=str(job.processes),
        MAX_FAILURES=str(job.failures),
        RENDEZVOUS=job.rendezvous,
    )
    return "\n".join([shebang, *given, _arguments(job)]) + "\n" + _alone(_uncommented(body))


def _arguments(job: Job) -> str:
    return f"set -- {shlex.join(job.arguments)}"


def _alone(body: str) -> str:
    """With the files in it that it takes in."""
    return _PART.sub(lambda line: _shipped(line[1]), body)


def _uncommented(body: str) -> str:
    """Without how to call it, which is settled."""
    lines = body.splitlines(keepends=True)
    while lines[0].startswith("#"):
        lines.pop(0)
    return "".join(lines)


def _shipped(name: str) -> str:
    return (shipped("launch") / name).read_text()

"""The files of ``launch/`` with a job in them. Pure: text from a job, nothing is written or run."""

from __future__ import annotations

import shlex
from pathlib import Path

from mmfusion.paths import shipped
from mmfusion.tools.launch.job import Job

SETTINGS = ". launch/env.sh\n"
"""The line of a script that is replaced by the settings, for it is to stand alone."""
END_OF_OPTIONS = "# ---- "
"""Begins the line behind the options of Slurm."""


def slurm(job: Job) -> str:
    """The batch script of a job."""
    head, end, body = _shipped("slurm.sbatch").partition(END_OF_OPTIONS)
    comment, body = body.split("\n", 1)
    options: dict[str, str | int | None] = {
        name: value
        for line in head.splitlines()
        if line.startswith("#SBATCH --")
        for name, _, value in [line.removeprefix("#SBATCH --").partition("=")]
    }
    options |= {
        "job-name": job.name,
        "nodes": job.nodes[1],
        "ntasks-per-node": job.processes,
        "gpus-per-node": job.gpus or None,
        "time": job.time,
        "output": f"{Path(job.run_dir).absolute()}/launch/slurm-%j.log",
    }
    options |= job.site.slurm.options
    written = [
        f"#SBATCH --{name}" + (f"={value}" if value != "" else "")
        for name, value in options.items()
        if value is not None
    ]
    given = job.exports(
        RUN_DIR=job.run_dir,
        MAX_FAILURES=str(job.failures),
        CONTAINER_IMAGE=job.site.slurm.container,
        CONTAINER_MOUNTS=",".join(job.site.slurm.mounts),
    )
    lines = ["#!/bin/bash", *written, end + comment, *given, _arguments(job)]
    return "\n".join(lines) + "\n" + _alone(body)


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
    """With the settings in it."""
    assert SETTINGS in body
    return body.replace(SETTINGS, _shipped("env.sh"))


def _uncommented(body: str) -> str:
    """Without how to call it, which is settled."""
    lines = body.splitlines(keepends=True)
    while lines[0].startswith("#"):
        lines.pop(0)
    return "".join(lines)


def _shipped(name: str) -> str:
    return (shipped("launch") / name).read_text()

"""``mmfusion sweep``: one recipe over many values, each a run of its own; no server is needed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console

from mmfusion.paths import expand
from mmfusion.tools.launch.job import Job
from mmfusion.tools.launch.site import read_site
from mmfusion.tools.sweep.array import render, submit
from mmfusion.tools.sweep.local import run_one
from mmfusion.tools.sweep.space import Space, read_space
from mmfusion.tools.sweep.trials import Trial, remember, table, trials_of


def sweep(
    recipe: str,
    space: str,
    on: Literal["local", "slurm"] = "local",
    run_dir: str | None = None,
    trials: PositiveInt | None = None,
    seed: int = 0,
    at_once: PositiveInt | None = None,
    nodes: PositiveInt = 1,
    gpus: NonNegativeInt = 0,
    time: str = "24:00:00",
    failures: PositiveInt = 3,
    site: str | None = None,
    dry_run: bool = False,
    follow: bool = True,
    overrides: list[str] | None = None,
) -> None:
    """Train a recipe with the values of a sweep file, and show which did best.

    The same line goes on: what has finished stays, what was cut off goes on from its checkpoint,
    what failed is tried again.

    Args:
        recipe: YAML file. More of them by ``-c FILE``, later ones change earlier ones.
        space: sweep file, as those of W&B: method (grid, random), metric, parameters.
        on: ``local``: one after another here; ``slurm``: an array of jobs.
        run_dir: of the sweep, a folder with a run for each trial (default: runs/<name of the sweep
            file>).
        trials: at most so many; random sweeps need it, or run_cap in the file.
        seed: of random values.
        at_once: jobs of the array that may run at a time (slurm).
        nodes: machines of each trial (slurm).
        gpus: of each machine, a process each; 0: one process without (slurm).
        time: that a job of Slurm may take at once, ``HOURS:MINUTES:SECONDS``.
        failures: starts in a row that come no step further, after which a trial is given up
            (slurm).
        site: file of the site's settings (slurm; default: $MMFUSION_SITE, else
            ~/.config/mmfusion/site.yaml).
        dry_run: show what would be started, and do not.
        follow: wait for the array, and show the table (slurm).
        overrides: recipe values of all trials, as ``--trainer.max_steps=100``.
    """
    read = read_space(space)
    if read.unused:
        print(f"{space}: {', '.join(read.unused)} are for W&B's agents; here they do nothing.")
    others = [x.removeprefix("--config=") for x in overrides or () if x.startswith("--config=")]
    recipes = [recipe, *others]
    for path in recipes:
        if not Path(expand(path)).is_file():
            raise FileNotFoundError(f"there is no recipe {path}.")
    fixed = [x for x in overrides or () if not x.startswith("--config=")]
    _refuse_overlap(read, fixed)
    folder = Path(expand(run_dir or Path("runs") / Path(space).stem))
    found = trials_of(folder, read.trials(trials, seed))
    about = {"recipes": recipes, "overrides": fixed, "method": read.method, "seed": seed}
    job = Job(
        recipes, fixed, str(folder), (nodes, nodes), gpus, time, failures,
        site=read_site(site, os.environ),
    )  # fmt: skip
    left = [trial for trial in found if trial.state not in ("finished", "running")]
    if dry_run:
        print(render(job, left, at_once) if on == "slurm" else _commands(job, left), end="")
        return
    remember(folder, about, found)
    if on == "slurm":
        submit(job, left, at_once, follow)
    else:
        for trial in left:
            run_one(job, trial, len(found), read.metric)
    Console(width=None).print(table(found, read))
    waiting = [trial for trial in found if trial.state != "finished"]
    if waiting and (on == "local" or follow):
        names = ", ".join(f"{trial.run.path.name} ({trial.state})" for trial in waiting)
        raise ValueError(f"{len(waiting)} of {len(found)} trials have not finished: {names}.")


def _refuse_overlap(space: Space, fixed: Sequence[str]) -> None:
    given = {x.removeprefix("--").partition("=")[0] for x in fixed}
    if both := sorted(given & {*space.parameters, "run_dir", "resume"}):
        raise ValueError(f"--{both[0]} is given, and each trial has its own.")
    if own := {"run_dir", "resume"} & space.parameters.keys():
        raise ValueError(f"parameters.{own.pop()}: each trial has its own.")


def _commands(job: Job, trials: Sequence[Trial]) -> str:
    lines = [
        f"mmfusion fit -c {' '.join(job.of_trial(trial.overrides, str(trial.run.path)))}\n"
        for trial in trials
    ]
    return "".join(lines)

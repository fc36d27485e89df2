"""``mmfusion launch``: start a recipe here, under torchrun, on Slurm or on Kubernetes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import yaml
from jsonargparse.typing import NonNegativeInt, PositiveInt

from mmfusion.data.whole_file import write_whole
from mmfusion.paths import expand
from mmfusion.tools.launch import scripts
from mmfusion.tools.launch.client import said
from mmfusion.tools.launch.job import Job
from mmfusion.tools.launch.kubectl import RESOURCES, Pods
from mmfusion.tools.launch.kubernetes import kubernetes, name_of
from mmfusion.tools.launch.site import read_site

Target = Literal["local", "torchrun", "slurm", "k8s"]
FOLDER = "launch"
"""In the run directory: what was submitted, and its logs."""
SUBMITTED = "job.json"
RENDER = {
    "local": scripts.torchrun,
    "torchrun": scripts.torchrun,
    "slurm": scripts.slurm,
    "k8s": kubernetes,
}
NAMES = {"slurm": "job.sbatch", "k8s": "job.yaml"}
"""Of what is submitted; job.sh otherwise."""
_NODES = re.compile(r"(\d+)(?::(\d+))?")


def launch(
    recipe: str,
    on: Target = "local",
    run_dir: str | None = None,
    nodes: str = "1",
    gpus: NonNegativeInt = 0,
    time: str = "24:00:00",
    failures: PositiveInt = 3,
    rendezvous: str | None = None,
    site: str | None = None,
    check: bool = True,
    dry_run: bool = False,
    follow: bool = True,
    overrides: list[str] | None = None,
) -> None:
    """Launch a recipe, and follow it. It goes on by itself after failures and preemption.

    Args:
        recipe: YAML file. More of them by ``-c FILE``, later ones change earlier ones.
        on: where: ``local`` in the background of this machine, ``torchrun`` (the same line on each
            machine), ``slurm`` or ``k8s``.
        run_dir: of the run (default: the recipe's, else runs/<its name>); all machines must see it.
        nodes: machines. ``1:2`` goes on with one where the other is lost (torchrun).
        gpus: of each machine, a process each; 0: one process without.
        time: that a job of Slurm may take at once, ``HOURS:MINUTES:SECONDS``.
        failures: starts in a row that come no step further, after which it is given up.
        rendezvous: ``HOST:PORT`` of torchrun on several machines.
        site: file of the site's settings (default: $MMFUSION_SITE, else
            ~/.config/mmfusion/site.yaml); launch/site.yaml is an example.
        check: read the recipe as ``mmfusion fit`` will, and submit none that it would refuse; not
            where the recipe names classes that this machine does not have.
        dry_run: show what would be submitted, unread, and do not.
        follow: show how it goes until it ends; leaving (Ctrl-C) does not stop it.
        overrides: recipe values, as ``--trainer.max_steps=100``.
    """
    others = [x.removeprefix("--config=") for x in overrides or () if x.startswith("--config=")]
    job = Job(
        recipes=[recipe, *others],
        overrides=[x for x in overrides or () if not x.startswith("--config=")],
        run_dir=expand(run_dir or run_dir_of([recipe, *others])),
        nodes=parse_nodes(nodes, on),
        gpus=int(gpus),  # the parser's own kind of number cannot be written as YAML
        time=time,
        failures=int(failures),
        rendezvous=rendezvous,
        site=read_site(site, os.environ),
    )
    for path in job.recipes:
        if not Path(expand(path)).is_file():
            raise FileNotFoundError(f"there is no recipe {path}.")
    if on == "torchrun" and job.nodes[1] > 1 and not rendezvous:
        raise ValueError(
            "torchrun on several machines needs --rendezvous HOST:PORT, of one of them."
        )
    text = RENDER[on](job)
    if dry_run:
        print(text, end="")
        return
    # torch and Lightning come with what follows: seconds that only to look should not cost.
    if check:
        from mmfusion.training.command import ReadRecipe

        ReadRecipe(["-c", *job.arguments, f"--run_dir={job.run_dir}"])
    submitted = submit(job, on, text)
    if follow:
        from mmfusion.tools.launch.follow import follow_job

        follow_job(Path(job.run_dir), submitted)


def run_dir_of(recipes: Sequence[str]) -> str:
    """As ``mmfusion fit`` would take it: what the last recipe that has one says, else the name of
    the first.
    """
    found = str(Path("runs") / Path(recipes[0]).stem)
    for path in recipes:
        if Path(expand(path)).is_file():
            content = yaml.safe_load(Path(expand(path)).read_text())
            given = content.get("run_dir") if isinstance(content, dict) else None
            found = str(given) if given else found
    return found


def parse_nodes(given: str, on: Target) -> tuple[int, int]:
    """``2`` or ``1:2``.

    Raises:
        ValueError: for anything else, or a range that the target cannot do.
    """
    match = _NODES.fullmatch(given)
    least = int(match[1]) if match else 0
    most = int(match[2] or match[1]) if match else 0
    if not 1 <= least <= most:
        raise ValueError(f"--nodes is {given!r}; expected a number, or MIN:MAX for torchrun.")
    if on == "local" and most > 1:
        raise ValueError(f"--nodes is {given}, but local is this machine; use torchrun or slurm.")
    if on in ("slurm", "k8s") and least != most:
        raise ValueError(f"--nodes is {given}; {on} gives a job as many machines as it asks for.")
    return least, most


def submit(job: Job, on: Target, text: str) -> dict[str, str]:
    """Write the script into the run directory, and start it.

    Returns:
        job: what is noted of it in ``launch/job.json``.
    """
    if on == "k8s":
        return _submit_pods(job, text)
    folder = Path(job.run_dir) / FOLDER
    script = _keep(folder, NAMES.get(on, "job.sh"), text)
    if on == "torchrun":  # each machine's agent is a job of its own
        sys.stdout.flush()
        os.execvp("bash", ["bash", str(script)])
    if on == "slurm":
        number = said(["sbatch", "--parsable", str(script)]).strip().partition(";")[0]
        log = folder / f"slurm-{number}.log"
    else:
        log = folder / "log.txt"
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["bash", str(script)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        number = str(process.pid)
    content = {"on": on, "id": number, "log": str(log)}
    _keep(folder, SUBMITTED, json.dumps(content, indent=1))
    print(f"{job.run_dir}: submitted on {on} as {number}, log {log}", flush=True)
    return content


def _submit_pods(job: Job, text: str) -> dict[str, str]:
    """The run directory is the pods': where this machine does not see it, nothing is kept."""
    site, folder = job.site.kubernetes, Path(job.run_dir) / FOLDER
    name = f"{RESOURCES[site.kind]}/{name_of(job)}"
    content = {"on": "k8s", "id": name, "namespace": site.namespace}
    print(Pods(name, site.namespace).submit(text), end="")
    try:
        _keep(folder, NAMES["k8s"], text)
        _keep(folder, SUBMITTED, json.dumps(content, indent=1))
    except OSError as error:
        print(f"{folder}: not kept, for it cannot be written from here ({error.strerror})")
    print(f"{job.run_dir}: submitted on k8s as {name}", flush=True)
    return content


def _keep(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with write_whole(str(folder / name)) as file:
        file.write(text.encode())
    return folder / name

"""The files of ``launch/`` that are used as they are: what they name is there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
FILES = ROOT / "launch"
SKYPILOT = {"name", "num_nodes", "resources", "workdir", "file_mounts", "setup", "run"}
"""Of the fields of a task of SkyPilot 0.14 (``sky/utils/schemas.py``), which takes no others."""


def extras(command: str) -> list[str]:
    """Of ``pip install -e ".[a,b]"``."""
    found = re.search(r"pip install .*-e \"?\.\[([\w,]+)\]", command)
    assert found, command
    return found[1].split(",")


def optional_dependencies() -> str:
    text = (ROOT / "pyproject.toml").read_text()
    return text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]


@pytest.mark.parametrize(
    "name", ["torchrun.sh", "watch.sh", "run_dir.sh", "slurm.sbatch", "env.sh"]
)
def test_scripts_are_bash(name: str) -> None:
    subprocess.run(["bash", "-n", FILES / name], check=True)


def task() -> dict[str, Any]:
    return dict(yaml.safe_load((FILES / "skypilot.yaml").read_text()))


def test_the_task_of_skypilot_has_its_fields() -> None:
    given = task()
    assert given.keys() <= SKYPILOT
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", given["name"])
    assert isinstance(given["num_nodes"], int)
    assert re.fullmatch(r"[\w-]+:\d+", given["resources"]["accelerators"])
    assert (ROOT / given["workdir"]).samefile(ROOT)
    assert given["file_mounts"] == {"/shared": {"name": "mmfusion-shared", "mode": "MOUNT"}}
    for extra in extras(given["setup"]):
        assert f"\n{extra} = [" in optional_dependencies()


def test_the_task_of_skypilot_ends_in_the_script(tmp_path: Path) -> None:
    """Run with the variables that SkyPilot sets, and a script that says what it is given."""
    run = task()["run"]
    _, script, recipe = shlex.split(run.strip().splitlines()[-1])
    assert (ROOT / script).samefile(FILES / "torchrun.sh")
    assert (ROOT / recipe).is_file()
    (tmp_path / "launch").mkdir()
    told = 'echo "$NODES $GPUS $RENDEZVOUS $RUN_DIR $@"\n'
    (tmp_path / script).write_text(told)
    env = {
        **os.environ,
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    done = subprocess.run(
        ["bash", "-c", run], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"2 8 10.0.0.1:29400 /shared/runs/mmfusion {recipe}\n"


def test_what_the_image_copies_and_installs_is_there() -> None:
    """And files of Kubernetes find the script in the folder that it begins in."""
    lines = [
        line.split(maxsplit=1)
        for line in (FILES / "Dockerfile").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert [word for word, _ in lines] == ["FROM", "RUN", "WORKDIR", "COPY", "RUN"]
    (copied,) = [rest.split() for word, rest in lines if word == "COPY"]
    assert copied[-1] == ".", "into its folder"
    for path in copied[:-1]:
        assert (ROOT / path).exists()
    for extra in extras(lines[-1][1]):
        assert f"\n{extra} = [" in optional_dependencies()
    python = re.fullmatch(r"python:3\.(\d+)-slim", lines[0][1])
    assert python
    required = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert required
    assert int(python[1]) >= int(required[1])


def commands() -> list[list[str]]:
    """Of the files of Kubernetes."""
    *_, job = yaml.safe_load_all((FILES / "kubernetes-job.yaml").read_text())
    (train_job,) = yaml.safe_load_all((FILES / "kubernetes-trainjob.yaml").read_text())
    nodes = [job["spec"]["template"]["spec"]["containers"][0], train_job["spec"]["trainer"]]
    return [[*node["command"], *node["args"]] for node in nodes]


@pytest.mark.parametrize("command", commands(), ids=["Job", "TrainJob"])
def test_files_of_kubernetes_name_what_is_in_the_image(command: list[str]) -> None:
    bash, script, recipe = command
    assert bash == "bash"
    assert (ROOT / script).samefile(FILES / "torchrun.sh")
    assert (ROOT / recipe).is_file()


def test_what_would_fail_again_fails_a_job_of_kubernetes_at_once() -> None:
    """Of the codes of the script, as tests/distributed/test_torchrun_script.py finds them. An
    eviction is no failure, whatever the code.
    """
    *_, job = yaml.safe_load_all((FILES / "kubernetes-job.yaml").read_text())
    (runtime,) = yaml.safe_load_all((FILES / "kubernetes-runtime.yaml").read_text())
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    for spec in (job["spec"], node["template"]["spec"]):
        evicted, *rules = spec["podFailurePolicy"]["rules"]
        conditions = [{"type": "DisruptionTarget", "status": "True"}]
        assert evicted == {"action": "Ignore", "onPodConditions": conditions}
        codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in rules}
        assert codes == {"Ignore": [75], "FailJob": [2, 3]}

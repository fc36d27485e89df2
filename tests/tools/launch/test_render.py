"""What a job becomes: the files of ``golden/``, which bash, Slurm and Kubernetes understand."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.trainer_v1alpha1_cluster_training_runtime import (
    TrainerV1alpha1ClusterTrainingRuntime,
)
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

from mmfusion.cli import main
from mmfusion.tools.launch.job import Job
from mmfusion.tools.launch.kubernetes import kubernetes, name_of
from mmfusion.tools.launch.main import RENDER
from mmfusion.tools.launch.scripts import slurm, slurm_array
from mmfusion.tools.launch.site import Kubernetes, Site, Slurm, read_site

ROOT = Path(__file__).parents[3]
GOLDEN = Path(__file__).parent / "golden"


def job(kind: str = "TrainJob", **changes: Any) -> Job:
    site = read_site(ROOT / "launch/site.yaml", {})
    site.kubernetes.kind = kind
    given: dict[str, Any] = {
        "recipes": ["recipes/a b.yaml", "more.yaml"],
        "overrides": ["--trainer.max_steps=100", "--data.seed=1; rm -rf $HOME"],
        "run_dir": "/shared/runs/My_run",
        "nodes": (2, 2),
        "gpus": 8,
        "rendezvous": "host1:29400",
        "site": site,
    }
    return Job(**{**given, **changes})


@pytest.mark.parametrize(
    ("on", "kind", "file"),
    [
        ("slurm", "", "job.sbatch"),
        ("torchrun", "", "job.sh"),
        ("k8s", "TrainJob", "trainjob.yaml"),
        ("k8s", "Job", "job.yaml"),
    ],
)
def test_a_job_is_the_same_file_as_ever(on: str, kind: str, file: str) -> None:
    """After a change that is wanted: MMFUSION_WRITE_GOLDEN=1."""
    text = RENDER[on](job(kind))
    if os.environ.get("MMFUSION_WRITE_GOLDEN"):
        (GOLDEN / file).write_text(text)
    assert text == (GOLDEN / file).read_text()


@pytest.mark.parametrize("on", ["slurm", "torchrun", "local"])
def test_scripts_are_bash_and_quote_what_they_are_given(on: str, tmp_path: Path) -> None:
    """Up to where the recipe is taken, with a program of our own in mmfusion's place."""
    text = RENDER[on](job(site=Site(environment={"NOTE": "it's $HOME"})))
    subprocess.run(["bash", "-n"], input=text.encode(), check=True)
    head = text[: text.index("recipe=${1")] + 'printf "%s\\n" "$NOTE" "$RUN_DIR" "$@"\n'
    done = subprocess.run(["bash", "-c", head], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "it's $HOME", "/shared/runs/My_run", "recipes/a b.yaml", "-c", "more.yaml",
        "--trainer.max_steps=100", "--data.seed=1; rm -rf $HOME",
    ]  # fmt: skip


def test_a_task_of_an_array_is_one_trial_of_a_sweep() -> None:
    """Up to where the recipe is taken, as task 7."""
    tasks = {
        3: ("/shared/sweep/trial-0003", ["recipe.yaml", "--a=3"]),
        7: ("/shared/sweep/it's 7", ["recipe.yaml", '--b={"c": "$HOME"}']),
    }
    text = slurm_array(job(run_dir="/shared/sweep", site=Site()), tasks, 4)
    options = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --array=3,7%4" in options
    assert "#SBATCH --output=/shared/sweep/launch/slurm-%A_%a.log" in options
    assert text.splitlines()[1 : len(options) + 1] == options
    assert "#SBATCH --array=3,7" in slurm_array(job(), tasks, None).splitlines()
    head = text[: text.index("recipe=${1")] + 'printf "%s\\n" "$RUN_DIR" "$MAX_FAILURES" "$@"\n'
    done = subprocess.run(
        ["bash", "-c", head], capture_output=True, text=True, check=True,
        env={**os.environ, "SLURM_ARRAY_TASK_ID": "7"},
    )  # fmt: skip
    said = done.stdout.splitlines()
    assert said == ["/shared/sweep/it's 7", "3", "recipe.yaml", '--b={"c": "$HOME"}']


def test_options_of_a_site_replace_ours_and_null_takes_them_away() -> None:
    site = Site(slurm=Slurm(options={"gpus-per-node": None, "gres": "gpu:8", "time": "01:00:00"}))
    lines = slurm(job(site=site)).splitlines()
    assert "#SBATCH --gres=gpu:8" in lines
    assert "#SBATCH --time=01:00:00" in lines
    assert not [line for line in lines if "gpus-per-node" in line]
    assert [line for line in lines if line.startswith("#SBATCH")] == lines[1:][: len(lines) - 1][
        : sum(line.startswith("#SBATCH") for line in lines)
    ], "sbatch reads options up to the first command"


def test_a_container_of_slurm_gets_its_image_and_mounts(tmp_path: Path) -> None:
    """The script itself, with srun that says what it is given; Pyxis is not at hand."""
    for name, text in {"srun": 'printf "%s\\n" "$@"', "scontrol": "echo n1", "squeue": ""}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def given(slurm_site: Slurm) -> list[str]:
        text = slurm(job(run_dir=str(tmp_path / "run"), site=Site(slurm=slurm_site)))
        subprocess.run(["bash", "-n"], input=text.encode(), check=True)
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "1"}
        done = subprocess.run(
            ["bash", "-c", text], env=env, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    plain = given(Slurm())
    assert plain[:4] == ["--kill-on-bad-exit=0", "--wait=120", "bash", "-c"]
    mounts = ["/shared:/shared", "/my data:/data:ro"]
    inside = given(Slurm(container="registry/a b:1", mounts=mounts))
    assert inside[2:4] == [
        "--container-image=registry/a b:1",
        "--container-mounts=/shared:/shared,/my data:/data:ro",
    ]
    assert [*inside[:2], *inside[4:]] == plain


def test_a_job_without_an_end_known_has_no_deadline(tmp_path: Path) -> None:
    """Where squeue says nothing; of nothing date makes the last midnight."""
    lines = slurm(job()).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("ends="))
    part = "\n".join([*lines[first : first + 4], 'echo "${MMFUSION_DEADLINE:-none}"'])
    for said, found in {"": "none", "N/A": "none", "2030-01-01T00:02:00Z": "1893456000"}.items():
        squeue = f"squeue() {{ echo {said}; }}\n"
        done = subprocess.run(["bash", "-c", squeue + part], capture_output=True, text=True)
        assert done.stdout == f"{found}\n"


@pytest.mark.parametrize("kind", ["TrainJob", "Job"])
def test_pods_get_the_image_and_the_volumes_of_a_site(kind: str) -> None:
    volumes = {"/shared": "shared-data", "/weights": "models"}
    site = Site(kubernetes=Kubernetes(kind=kind, image="registry/a:1", volumes=volumes))
    *_, made = yaml.safe_load_all(kubernetes(job(site=site)))
    if kind == "Job":
        pod = made["spec"]["template"]["spec"]
        (node,) = pod["containers"]
        image, command = node["image"], node["command"]
    else:
        (patch,) = made["spec"]["runtimePatches"]
        (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        pod = replicated["template"]["spec"]["template"]["spec"]
        (node,) = pod["containers"]
        image, command = made["spec"]["trainer"]["image"], made["spec"]["trainer"]["command"]
    assert image == "registry/a:1"
    claims = {one["name"]: one["persistentVolumeClaim"]["claimName"] for one in pod["volumes"]}
    mounted = {one["mountPath"]: claims[one["name"]] for one in node["volumeMounts"]}
    assert mounted == volumes
    assert command[:2] == ["bash", "-c"]
    subprocess.run(["bash", "-n"], input=command[2].encode(), check=True)


def test_train_jobs_are_those_of_kubeflow() -> None:
    """Its models drop what they do not know."""
    for text in (kubernetes(job()), (ROOT / "launch/kubernetes-trainjob.yaml").read_text()):
        (given,) = yaml.safe_load_all(text)
        model = TrainerV1alpha1TrainJob.from_dict(given)
        assert model is not None
        assert model.to_dict() == given


def test_the_runtime_is_one_of_kubeflow_and_its_jobs_are_those_of_kubernetes() -> None:
    (given,) = yaml.safe_load_all((ROOT / "launch/kubernetes-runtime.yaml").read_text())
    model = TrainerV1alpha1ClusterTrainingRuntime.from_dict(given)
    assert model is not None
    assert model.to_dict() == given
    (node,) = given["spec"]["template"]["spec"]["replicatedJobs"]
    of_it = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}}
    kubernetes_validate.validate(of_it | {"spec": node["template"]["spec"]}, "1.34", strict=True)
    # A TrainJob changes it by names.
    (train_job,) = yaml.safe_load_all(kubernetes(job()))
    (patch,) = train_job["spec"]["runtimePatches"]
    (patched,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert patched["name"] == node["name"]
    (container,) = node["template"]["spec"]["template"]["spec"]["containers"]
    patched_pod = patched["template"]["spec"]["template"]["spec"]
    assert [one["name"] for one in patched_pod["containers"]] == [container["name"]]


@pytest.mark.parametrize("gpus", [0, 8])
def test_jobs_are_those_of_kubernetes(gpus: int) -> None:
    plain = (ROOT / "launch/kubernetes-job.yaml").read_text()
    for text in (kubernetes(job("Job", gpus=gpus)), plain):
        for one in yaml.safe_load_all(text):
            kubernetes_validate.validate(one, "1.34", strict=True)


def test_names_are_those_that_kubernetes_takes() -> None:
    assert name_of(job()) == "my-run"
    long = name_of(job(run_dir="runs/" + "x_" * 60))
    assert long == "x-" * 19 + "x"
    assert len(f"{long}-node-0-9999-abcde") <= 63, "of a pod of a TrainJob"
    assert name_of(job(run_dir="runs/2_align_output")) == "run-2-align-output"
    assert name_of(job(run_dir="runs/___")) == "mmfusion"


def test_a_site_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("slurm: {partitions: gpu}")
    with pytest.raises(ValueError, match="partitions"):
        read_site(file, {})
    with pytest.raises(FileNotFoundError, match=r"launch/site\.yaml is an example"):
        read_site(None, {"MMFUSION_SITE": str(tmp_path / "none.yaml")})
    file.write_text("environment: {OMP_NUM_THREADS: 1}")
    assert read_site(None, {"MMFUSION_SITE": str(file)}).environment == {"OMP_NUM_THREADS": 1}
    file.write_text("environment: {WANDB_API_KEY: abcd}")
    with pytest.raises(ValueError, match=r"environment\.WANDB_API_KEY is a key") as refused:
        read_site(str(file), {})
    assert "abcd" not in str(refused.value)
    file.write_text("environment: {GITHUB_TOKEN: abcd}")
    with pytest.raises(ValueError, match=r"environment\.GITHUB_TOKEN is a key"):
        read_site(str(file), {})
    file.write_text(f"setup: [export X=hf_{'a' * 30}]")
    with pytest.raises(ValueError, match=r"setup\.0 is a key"):
        read_site(str(file), {})


def test_keys_are_not_written_into_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "0123456789")
    for override in ("--a.token=abc", f"--a.b=hf_{'a' * 30}", "--x=0123456789"):
        with pytest.raises(ValueError, match="would be written to /shared/runs/My_run") as refused:
            job(overrides=[override])
        assert override.partition("=")[2] not in str(refused.value)


def test_options_of_slurm_hold_a_path_with_blanks() -> None:
    lines = slurm(job(run_dir='/shared/it\'s "my"/a#1')).splitlines()
    assert '#SBATCH --job-name="a#1"' in lines
    assert r'''#SBATCH --output="/shared/it's \"my\"/a#1/launch/slurm-%j.log"''' in lines
    with pytest.raises(ValueError, match="cannot be in a script"):
        job(run_dir="runs/a\nrm -rf x")


@pytest.mark.parametrize("kind", ["TrainJob", "Job"])
def test_numbers_of_the_command_line_are_in_what_is_rendered(tmp_path, capsys, kind):
    """The parser's own kinds of numbers are none that YAML knows."""
    recipe, site = tmp_path / "recipe.yaml", tmp_path / "site.yaml"
    recipe.write_text("trainer: {max_steps: 1}\n")
    site.write_text(f"kubernetes: {{kind: {kind}, image: i, namespace: n}}\n")
    main(["launch", str(recipe), "--on=k8s", "--gpus=8", "--nodes=2", "--failures=5",
          f"--site={site}", "--dry_run"])  # fmt: skip
    assert "8" in str(list(yaml.safe_load_all(capsys.readouterr().out)))


def test_a_run_is_where_its_recipes_say(tmp_path, capsys):
    recipes = [tmp_path / name for name in ("parts.yaml", "stage.yaml", "more.yaml")]
    contents = ("a: 1", "run_dir: '/shared/runs/stage'", "b: 2")
    for recipe, content in zip(recipes, contents, strict=True):
        recipe.write_text(content + "\n")
    first, *others = map(str, recipes)
    main(["launch", first, "-c", others[0], "-c", others[1], "--on=slurm", "--dry_run"])
    assert "export RUN_DIR=/shared/runs/stage\n" in capsys.readouterr().out
    main(["launch", first, "-c", others[1], "--on=slurm", "--dry_run"])
    assert "export RUN_DIR=runs/parts\n" in capsys.readouterr().out


def test_files_by_hand_find_the_run(tmp_path):
    """As given, else that of the recipes; as `mmfusion fit` does, the last one."""
    for name in ("torchrun.sh", "slurm.sbatch"):
        assert "\n. launch/run_dir.sh\n" in (ROOT / "launch" / name).read_text()
    script = f'. {ROOT}/launch/run_dir.sh; echo "$run"'
    (tmp_path / "a.yaml").write_text("trainer: {}\n")
    (tmp_path / "b.yaml").write_text('run_dir: "runs/of b"\n')
    both = ["a.yaml", "-c", "b.yaml"]

    def found(*given: str, **variables: str) -> str:
        done = subprocess.run(
            ["bash", "-c", script, "_", *given, "--trainer.max_steps=3"], cwd=tmp_path,
            capture_output=True, text=True, check=True, env={**os.environ, **variables},
        )  # fmt: skip
        return done.stdout.removesuffix("\n")

    assert found("a.yaml") == "runs/a"
    assert found(*both) == "runs/of b"
    assert found(*both, RUN_DIR="/shared/run") == "/shared/run"
    assert found(*both, "--run_dir=runs/given here", RUN_DIR="/shared/run") == "runs/given here"
    assert found(*both, "--run_dir", "runs/by itself") == "runs/by itself"
    assert found(*both, "--run_dir=runs/1", "--run_dir", "runs/2") == "runs/2"
    assert found("a.yaml", "--run_dir=~/run", HOME="/home/me") == "/home/me/run"
    for line, run in (
        ("runs/mine   # my first", "runs/mine"),
        ('"runs/mine #2" # the second', "runs/mine #2"),
        ("'runs/my own'", "runs/my own"),
        ("null", "runs/a"),
        ("$PLACE/${THERE}/mine", "/shared/a & b/mine"),
    ):
        (tmp_path / "c.yaml").write_text(f"run_dir: {line}\n")
        given = ["a.yaml", "--config=c.yaml"]
        assert found(*given, PLACE="/shared", THERE="a & b") == run
    with pytest.raises(subprocess.CalledProcessError) as failed:
        found(*given)
    assert "but PLACE is not set" in failed.value.stderr

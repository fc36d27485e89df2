"""``mmfusion launch --on slurm`` on a real Slurm of two nodes: what happens to a job there, and
that the run goes on by itself to the same losses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from mmfusion.cli import main
from mmfusion.tools.launch.job import Job
from mmfusion.tools.launch.scripts import slurm_array
from mmfusion.tools.launch.site import Site
from mmfusion.training.run import RunDirectory
from tests.distributed.slurm import Cluster, missing
from tests.training import jobs
from tests.training.tiny import losses, write_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("MMFUSION_CLUSTER"),
        reason="starts a Slurm of its own, as root; asked for by MMFUSION_CLUSTER=1",
    ),
]
STEPS = 40


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    assert not missing(), f"install {missing()}"
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_recipe(
        folder, trainer__max_steps=STEPS, trainer__devices="auto", checkpoint__every_n_steps=4
    )
    site = {
        "setup": [f"export PATH={Path(sys.executable).parent}:$PATH"],
        "environment": {
            "PYTHONPATH": jobs.ROOT,
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": 1,
        },
        "slurm": {"options": {"cpus-per-task": 1}},
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    return folder


def launch(cluster: Cluster, home: Path, name: str, *more: str) -> Launched:
    """A job of two nodes, each a rank."""
    (recipe,) = home.glob("recipe*.yaml")
    args = ["launch", str(recipe), "--on=slurm", "--nodes=2", "--check=false"]
    args += [f"--run_dir={home}/{name}"]
    args += [f"--site={home}/site.yaml", "--follow=false", "--time=01:00:00", *more]
    environment = {**os.environ, **cluster.environment, "PYTHONPATH": jobs.ROOT}
    done = subprocess.run(
        [sys.executable, "-m", "mmfusion", *args], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return Launched(cluster, home / name)


class Launched:
    """A job and its run."""

    def __init__(self, cluster: Cluster, run: Path) -> None:
        self.cluster, self.run = cluster, RunDirectory(run)
        self.about = json.loads((run / "launch" / "job.json").read_text())
        self.number = self.about["id"]

    def until(self, what: Callable[[], bool], seconds: float = 120) -> None:
        """Wait for something."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def at_step(self, step: int) -> None:
        """Wait until this one is done."""
        csv = self.run.path / "metrics.csv"
        self.until(lambda: csv.exists() and max(losses(self.run), default=-1) >= step)

    def to_the_end(self, seconds: float = 120) -> dict[int, str]:
        """Its losses."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        self.until(lambda: self.state() in ends, seconds)
        assert self.state() == "COMPLETED", self.log()
        assert self.run.status()["state"] == "finished"
        return losses(self.run)

    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    def log(self) -> str:
        return Path(self.about["log"]).read_text()


@pytest.fixture(scope="module")
def whole(cluster: Cluster, home: Path) -> dict[int, str]:
    found = launch(cluster, home, "whole").to_the_end()
    assert sorted(found) == [*range(STEPS)]
    return found


def test_a_warning_saves_and_queues_the_job_again(cluster, home, whole):
    job = launch(cluster, home, "warned")
    job.at_step(5)
    cluster.said("scancel", "--signal=USR1", job.number)
    assert job.to_the_end() == whole
    assert "code 75, queued again" in job.log()
    assert int(cluster.job(job.number)["Restarts"]) == 1
    assert len(job.run.attempts()) == 2


def test_a_job_whose_time_is_up_saves_and_is_queued_again(cluster, home, whole):
    """Two minutes before its end, whether or not Slurm's warning comes (here it would be later)."""
    pause = {"class_path": "tests.training.tiny.Pause", "init_args": {"step": 9, "seconds": 65}}
    (site,) = home.glob("site.yaml")
    content = yaml.safe_load(site.read_text())
    content["slurm"]["options"]["signal"] = "USR1@10"
    (home / "late.yaml").write_text(yaml.safe_dump(content))
    options = ["--time=00:03:00", f"--site={home}/late.yaml", f"--trainer.callbacks=[{pause}]"]
    job = launch(cluster, home, "in_time", *options)
    assert job.to_the_end(300) == whole
    assert "code 75, queued again" in job.log()
    assert int(cluster.job(job.number)["Restarts"]) == 1
    starts = [json.loads((a / "attempt.json").read_text())["step"] for a in job.run.attempts()]
    assert starts in ([0, 9], [0, 10])  # the ranks agree within a step


def test_a_killed_rank_is_started_again(cluster, home, whole):
    job = launch(cluster, home, "killed")
    job.at_step(6)
    attempt = json.loads((job.run.attempts()[0] / "attempt.json").read_text())
    os.kill(attempt["pid"], 9)
    assert job.to_the_end() == whole


def test_a_lost_node_is_waited_for(cluster, home, whole):
    job = launch(cluster, home, "lost")
    job.at_step(6)
    cluster.kill_node("n2")
    job.until(lambda: job.state() != "RUNNING")
    cluster.start_node("n2")
    assert job.to_the_end() == whole


def test_a_run_that_comes_no_further_is_given_up(cluster, home):
    """Here before its directory is even made."""
    job = launch(cluster, home, "hopeless", "--failures=2", "--data.sources.train.shards=/no/*.tar")
    job.until(lambda: job.state() == "FAILED")
    assert job.log().count("queued again") == 1
    assert "failed 2 times without a new checkpoint; given up" in job.log()


def test_a_recipe_that_is_none_is_not_tried_again(cluster, home):
    job = launch(cluster, home, "typo", "--data.seed=oops")
    job.until(lambda: job.state() == "FAILED")
    assert job.log().count("Expected a <class 'int'>. Got value: oops") == 2  # by two ranks


def test_a_task_of_an_array_is_queued_again_alone(cluster, tmp_path):
    """The last one too, whose job id is the whole array's. In mmfusion's place is a program that
    notes its starts, and is preempted at the first one of task 3.
    """
    program = tmp_path / "bin" / "mmfusion"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/bash\n"
        'echo $1 >> "$RUN_DIR/starts"\n'
        '[ "$(wc -l < "$RUN_DIR/starts")" = 1 ] && [ $SLURM_ARRAY_TASK_ID = 3 ] && exit 75\n'
        "sleep 3\n"
    )
    program.chmod(0o755)
    runs = {number: tmp_path / f"trial-{number}" for number in (1, 2, 3)}
    for run in (*runs.values(), tmp_path / "launch"):
        run.mkdir()
    site = Site(setup=[f"export PATH={program.parent}:$PATH"])
    site.slurm.options = {"cpus-per-task": 1}
    job = Job(["recipe.yaml"], [], str(tmp_path), site=site)
    tasks = {number: (str(run), ["recipe.yaml"]) for number, run in runs.items()}
    script = tmp_path / "array.sbatch"
    script.write_text(slurm_array(job, tasks, None))
    number = cluster.said("sbatch", "--parsable", str(script)).strip()
    deadline = time.monotonic() + 120
    while cluster.said("squeue", "-h", "-r", "-j", number, "-o", "%T"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    starts = [(run / "starts").read_text().split() for run in runs.values()]
    assert starts == [["fit"], ["fit"], ["fit", "fit"]]


def test_a_sweep_is_an_array_that_goes_on(cluster, home, monkeypatch, capsys):
    """A trial is warned, and queued again; a second call finds all of it done."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    (recipe,) = home.glob("recipe*.yaml")
    space = home / "space.yaml"
    values = {"data.seed": {"values": [1, 2, 3]}}
    space.write_text(yaml.safe_dump({"method": "grid", "parameters": values}))
    args = ["sweep", str(recipe), str(space), "--on=slurm", "--at_once=3"]
    args += [f"--run_dir={home}/sweep", f"--site={home}/site.yaml", "--time=01:00:00"]
    monkeypatch.setenv("PYTHONPATH", jobs.ROOT)
    sweep = [sys.executable, "-m", "mmfusion", *args]
    with subprocess.Popen(sweep, stdout=subprocess.PIPE, text=True) as process:
        csv = home / "sweep" / "trial-0003" / "metrics.csv"
        deadline = time.monotonic() + 200
        while not csv.exists() or len(csv.read_text().splitlines()) < 6:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        number = json.loads((home / "sweep/launch/job.json").read_text())["id"]
        cluster.said("scancel", "--signal=USR1", f"{number}_3")  # its id is the whole array's
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    runs = [RunDirectory(home / "sweep" / f"trial-000{i}") for i in (1, 2, 3)]
    for seed, run in enumerate(runs, 1):
        assert run.status()["state"] == "finished"
        assert sorted(losses(run)) == [*range(STEPS)]
        assert yaml.safe_load(run.config.read_text())["data"]["seed"] == seed
        assert run.path.name in said
    assert [len(run.attempts()) for run in runs] == [1, 1, 2]
    main(args)
    assert "submitted" not in capsys.readouterr().out

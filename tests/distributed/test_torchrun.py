"""``mmfusion launch --on torchrun`` on two hosts: a killed rank, a lost host, a cut cable, and an
eviction; the run goes on by itself to the losses of one that nothing happened to.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from mmfusion.training.run import RunDirectory
from tests.distributed import hosts
from tests.training import jobs
from tests.training.tiny import losses, write_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("MMFUSION_CLUSTER"),
        reason="makes network namespaces, as root; asked for by MMFUSION_CLUSTER=1",
    ),
]
STEPS = 60
A, B = hosts.ADDRESSES


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("runs")
    write_recipe(
        folder,
        trainer__max_steps=STEPS,
        trainer__devices="auto",
        trainer__callbacks=[{"class_path": "tests.training.tiny.SlowSteps"}],
        checkpoint__every_n_steps=4,
    )
    site = {
        "setup": [f"export PATH={Path(sys.executable).parent}:$PATH"],
        "environment": {"PYTHONPATH": jobs.ROOT, "OMP_NUM_THREADS": 1, "ALONE_SECONDS": 60},
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    with hosts.two_hosts():
        yield folder


@pytest.fixture(autouse=True)
def nothing_left(home: Path) -> Iterator[None]:
    """What a failed test leaves running would meet the next one."""
    yield
    for host in (A, B):
        hosts.kill(host)


class Two:
    """The same line on both hosts."""

    def __init__(self, home: Path, name: str, nodes: str, *more: str) -> None:
        (recipe,) = home.glob("recipe*.yaml")
        self.home, self.name, self.run = home, name, RunDirectory(home / name)
        self.args = ["launch", str(recipe), "--on=torchrun", f"--nodes={nodes}", "--failures=5"]
        self.args += ["--check=false"]  # the parser costs each of them seconds
        self.args += [f"--rendezvous={A}:29400", f"--run_dir={home}/{name}"]
        self.args += [f"--site={home}/site.yaml", *more]
        self.hosts = {host: self.start(host) for host in (A, B)}

    def start(self, host: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mmfusion", *self.args]
        env = {"PYTHONPATH": jobs.ROOT}
        return hosts.start(host, command, self.home / f"{self.name}-{host}.log", env)

    def until(self, what: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def at_step(self, step: int) -> None:
        csv = self.run.path / "metrics.csv"
        self.until(lambda: csv.exists() and max(losses(self.run), default=-1) >= step)

    def codes(self, seconds: float = 240) -> list[int]:
        deadline = time.monotonic() + seconds
        for process in self.hosts.values():
            process.wait(max(deadline - time.monotonic(), 1))
        return [process.returncode for process in self.hosts.values()]

    def log(self, host: str) -> str:
        """What the line has said there."""
        return (self.home / f"{self.name}-{host}.log").read_text()

    def logs(self) -> str:
        files = sorted(self.home.glob(f"{self.name}-*.log"))
        return "".join(f"{path}\n{path.read_text()}" for path in files)

    def world_sizes(self) -> list[int]:
        files = [path / "attempt.json" for path in self.run.attempts()]
        return [json.loads(file.read_text())["world_size"] for file in files if file.exists()]

    def rank(self) -> int:
        """Process of rank 0."""
        file = self.run.attempts()[-1] / "attempt.json"
        return int(json.loads(file.read_text())["pid"])


@pytest.fixture(scope="module")
def whole(home: Path) -> dict[int, float]:
    two = Two(home, "whole", "2")
    assert two.codes() == [0, 0], two.logs()
    found = numbers(two)
    assert sorted(found) == [*range(STEPS)]
    return found


def numbers(two: Two) -> dict[int, float]:
    """On another number of hosts sums round in another way."""
    return {step: float(loss) for step, loss in losses(two.run).items()}


def test_a_killed_rank_is_started_again(home, whole):
    two = Two(home, "killed", "2")
    two.at_step(9)
    os.kill(two.rank(), signal.SIGKILL)
    assert two.codes() == [0, 0], two.logs()
    assert numbers(two) == whole
    assert two.world_sizes() == [2, 2]


def test_a_lost_host_is_done_without_until_it_is_back(home, whole):
    two = Two(home, "lost", "1:2")
    two.at_step(9)
    hosts.kill(B)
    two.until(lambda: two.world_sizes()[-1:] == [1])
    attempts = len(two.run.attempts())
    two.hosts[B] = two.start(B)
    two.until(lambda: len(two.run.attempts()) > attempts)
    assert two.codes() == [0, 0], two.logs()
    assert two.world_sizes()[0] == two.world_sizes()[-1] == 2
    assert numbers(two) == pytest.approx(whole, rel=1e-5)


def test_a_cut_cable_ends_the_job_on_both_sides(home):
    """Each says whom it does not hear of any more, for how long, and what to do; rank and agent."""
    two = Two(home, "cut", "2", "--timeout_minutes=0.25")
    two.at_step(9)
    hosts.cut(B)
    try:
        assert 0 not in two.codes(180), two.logs()
    finally:
        hosts.mend(B)
    assert two.run.status()["state"] == "failed"
    hosts_of_ranks = re.findall(r"GLOBAL_RANK: (\d)", two.log(A) + two.log(B))
    for own, other in ((A, B), (B, A)):
        ranks = {A: hosts_of_ranks[0], B: hosts_of_ranks[1]}
        said = two.log(own)
        lost = (
            f"rank {ranks[own]} on {own} has heard nothing of rank {ranks[other]} on {other} for "
            "15 seconds (timeout_minutes). That host is down, the network to it is cut,"
        )
        assert lost in said, said
        assert "The same command goes on from the newest checkpoint" in said
        assert f"{own}: no rank of this run was here for 60 seconds (ALONE_SECONDS)" in said, said
        assert f"have not met at {A}:29400; given up" in said
        assert "The same line on each goes on from the newest checkpoint" in said


def test_an_evicted_host_takes_the_other_one_along_with_all_saved(home, whole):
    """Started again, both go on."""
    two = Two(home, "evicted", "2")
    two.at_step(9)
    two.hosts[B].send_signal(signal.SIGTERM)
    assert two.codes(60) == [75, 75], two.logs()
    assert two.run.status()["state"] == "preempted"
    two.hosts = {host: two.start(host) for host in (A, B)}
    assert two.codes() == [0, 0], two.logs()
    assert numbers(two) == whole

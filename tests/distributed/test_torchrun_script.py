"""``launch/torchrun.sh`` by hand, two ranks on this machine: when it starts them again, when it
gives up, and with which code it ends.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmfusion.training.run import RunDirectory
from tests.training import jobs
from tests.training.tiny import HERE, losses, write_recipe

pytestmark = pytest.mark.slow


def start(recipe: Path, *options: str, **variables: str) -> subprocess.Popen[bytes]:
    """As it is typed; the output in ``log`` beside the recipe."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": jobs.ROOT, "GPUS": "2", **variables}
    with (recipe.parent / "log").open("wb") as log:
        return subprocess.Popen(
            ["bash", "launch/torchrun.sh", str(recipe), *options],
            cwd=jobs.ROOT, env=env, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def code_of(script: subprocess.Popen[bytes], seconds: float = 300) -> int:
    """A script that does not end is ended, with all it has started."""
    try:
        return script.wait(seconds)
    except subprocess.TimeoutExpired:
        script.terminate()
        script.wait(60)
        raise


def failing(folder: Path, steps: list[int], once: bool) -> Path:
    arguments = {"steps": steps, "folder": str(folder) if once else None}
    return write_recipe(
        folder,
        trainer__max_steps=6,
        trainer__devices="auto",
        trainer__callbacks=[{"class_path": f"{HERE}.Fails", "init_args": arguments}],
        checkpoint__every_n_steps=1,
    )


def until(what: Callable[[], object], recipe: Path) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline, (recipe.parent / "log").read_text()
        time.sleep(0.1)


def waiting_alone(recipe: Path) -> subprocess.Popen[bytes]:
    """One of two machines, the other of which never comes: its agent keeps the rendezvous."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = start(recipe, NODES="2", RENDEZVOUS=f"localhost:{port}")

    def listens() -> bool:
        with socket.socket() as asked:
            return asked.connect_ex(("127.0.0.1", port)) == 0

    until(listens, recipe)
    return script


def test_it_is_given_up_after_failures_in_a_row_that_leave_no_checkpoint(tmp_path: Path) -> None:
    recipe = failing(tmp_path, [0], once=False)
    code = code_of(start(recipe, MAX_FAILURES="2"))
    log = (tmp_path / "log").read_text()
    assert code == 3, log
    assert f"given up: 2 starts in a row left no new checkpoint in {tmp_path}/run\n" in log
    run = RunDirectory(tmp_path / "run")
    assert [len(run.attempts()), run.status()["state"]] == [2, "failed"]


def test_failures_with_checkpoints_between_them_are_not_counted(tmp_path: Path) -> None:
    """More of them than may be in a row."""
    recipe = failing(tmp_path, [1, 3], once=True)
    code = code_of(start(recipe, MAX_FAILURES="1"))
    run = RunDirectory(tmp_path / "run")
    assert code == 0, (tmp_path / "log").read_text()
    assert len(run.attempts()) == 3
    assert sorted(losses(run)) == [*range(6)]


def test_a_recipe_that_is_none_is_not_tried_again(tmp_path: Path) -> None:
    """Its ranks end before there is a run directory."""
    recipe = write_recipe(tmp_path)
    code = code_of(start(recipe, "--data.seed=oops"))
    log = (tmp_path / "log").read_text()
    assert code == 2, log
    assert "data.seed" in log
    assert "the recipe was refused" in log
    assert not (tmp_path / "run").exists()


def test_an_eviction_ends_an_agent_that_waits_for_other_machines(tmp_path: Path) -> None:
    script = waiting_alone(write_recipe(tmp_path))
    script.send_signal(signal.SIGTERM)
    assert code_of(script, 100) == 143, (tmp_path / "log").read_text()


def test_an_eviction_while_ranks_start_is_no_finished_run(tmp_path: Path) -> None:
    """Told to stop they end in order, and their agent with 0."""
    recipe = write_recipe(tmp_path, trainer__devices="auto")
    script = start(recipe, "--run_dir", str(tmp_path / "other"))
    children = Path(f"/proc/{script.pid}/task/{script.pid}/children")

    def ranks() -> list[str]:
        agents = [Path(f"/proc/{pid}/task/{pid}/children") for pid in children.read_text().split()]
        return [rank for agent in agents if agent.exists() for rank in agent.read_text().split()]

    until(lambda: len(ranks()) == 2, recipe)
    time.sleep(1)  # until Python has its handler
    script.send_signal(signal.SIGTERM)
    assert code_of(script, 100) == 143, (tmp_path / "log").read_text()
    assert not (tmp_path / "run").exists()
